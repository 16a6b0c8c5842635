"""One micro-batch learns: every side is held at the same states, the estimator compares, backward runs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffopd import estimators
from diffopd.data_states import as_latents, next_place, noised
from diffopd.drive import Call, Survey, Visit, Walk
from diffopd.errors import UserError
from diffopd.prediction import LEAST_STD, Prediction, Transition
from diffopd.sampling import Sampled
from diffopd.supervise import Manner, NonFiniteLoss, StudentWalk, Watch
from diffopd.teach_recipe import EstimatorSettings

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Sides:
    """The trained call, and where the estimator asks them the old policy's and the base's (no gradients)."""

    student: Call
    old: Call | None = None
    base: Call | None = None

    def told(self, prompts: list[str], latents: Tensor) -> list[Call]:
        """The calls that are there, for a batch; the student's first."""
        return [call.prompted(prompts, latents=latents) for call in (self.student, self.old, self.base) if call]


class Held:
    """Calls in lockstep at given states. `arrive` puts all of them at a canonical state (B, ...)."""

    def __init__(self, walks: list[Walk]) -> None:
        self._walks = walks
        self._visits: list[Visit] = []

    def arrive(self, state: Tensor | None, *, asked: bool) -> list[Visit]:
        """The visits of all sides at `state` (None: where the calls begin); only the first carries gradients.

        asked: False only passes through, so a UNet is not evaluated.
        """
        replies = [visit.reply(state) for visit in self._visits] or [None] * len(self._walks)
        self._visits = [
            walk.advance(reply, grad=asked and number == 0, idle=not asked)
            for number, (walk, reply) in enumerate(zip(self._walks, replies, strict=True))
        ]
        return self._visits

    @property
    def evaluations(self) -> list[int]:
        """Rows that each side's networks have computed."""
        return [walk.evaluations for walk in self._walks]


@dataclass
class Measures:
    """Sums over rows and states of what an estimator reports; `mean` divides by their number."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, values: Tensor) -> None:
        """One value per row (B,)."""
        self.sums[name] += float(values.detach().double().sum())
        self.counts[name] += len(values)


def learn(
    sides: Sides,
    batch: Sampled,
    good: Tensor,
    *,
    settings: EstimatorSettings,
    manner: Manner,
    start: Survey,
    noise: Callable[[int], Tensor],
    backward: Backward,
    measures: Measures,
    watch: Watch | None = None,
) -> None:
    """Back the loss of one micro-batch at every supervised state of `manner`, divided by their number.

    good (B,): advantages, for nft optimality in [0, 1], unused where pictures supervise. start: where walks begin.
    noise(i) -> (B, ...): what noises the pictures to state i (estimators on the forward process).

    Raises NonFiniteLoss at the first state whose loss is not finite, before its backward.
    """
    watch, policy = watch or Watch(), bool(batch.taken)
    latents = batch.initial
    if not policy:
        states = noised(batch.denoised, noise(0), start.place)
        latents = as_latents(sides.student.pipeline, states, start.latents_shape)
    indices = with_noise(batch, manner.indices) if policy else manner.indices
    prompts = [row.prompt for row in batch.rows]
    with ExitStack() as stack:
        walks = [stack.enter_context(Walk(call)) for call in sides.told(prompts, latents)]
        held, walked, state = Held(walks), StudentWalk(walks[0], manner), None
        for index in range(max(indices) + 1):
            asked = index in indices
            with watch("networks"):
                visits = held.arrive(state, asked=asked)
            if asked:
                with watch("objective"), torch.enable_grad():
                    others = [visit.prediction for visit in visits[1:]]
                    if policy:
                        loss = _policy_loss(walked, visits, batch, index, good, settings, measures)
                    else:
                        old = others.pop(0) if sides.old else None
                        loss = _forward_loss(visits[0], old, others, batch, good, settings, measures)
                if not bool(torch.isfinite(loss).all()):
                    raise NonFiniteLoss(index, visits[0].step.sigma)
                measures.add("loss", loss)
                with watch("backward"):
                    backward(loss / len(indices))
            if index < max(indices):
                here = visits[0]
                state = (
                    batch.taken[index].sample if policy else noised(batch.denoised, noise(index + 1), next_place(here))
                )
    for name, count in zip(_names(sides), held.evaluations, strict=True):
        watch.evaluations[name] += count


def noisy_steps(batch: Sampled) -> list[int]:
    """The steps of recorded walks that drew noise."""
    return [index for index, taken in enumerate(batch.taken) if taken.transition.std > LEAST_STD]


def with_noise(batch: Sampled, indices: Collection[int]) -> list[int]:
    """The supervised states whose step drew noise: a step without has no density and teaches nothing.

    Raises UserError where none is left.
    """
    kept = [index for index in noisy_steps(batch) if index in indices]
    if not kept:
        raise UserError(
            f"objective.query supervises steps {sorted(indices)} of this walk, none of which draws noise: there is no "
            'density that a ratio could be of. Name other steps, or "all": those without noise are left out.'
        )
    return kept


def _names(sides: Sides) -> list[str]:
    named = {"student": sides.student, "old": sides.old, "base": sides.base}
    return [name for name, call in named.items() if call]


def _forward_loss(
    here: Visit,
    old: Any,
    base: list[Any],
    batch: Sampled,
    good: Tensor,
    settings: EstimatorSettings,
    measures: Measures,
) -> Tensor:
    """The estimators on noised final pictures: nft and supervised."""
    said = here.prediction
    if old is None:
        truth = Prediction.from_denoised(said.sample, batch.denoised, said.sigma, said.path)
        return estimators.matching(here.model_output, here.answer_for(truth))
    loss = estimators.nft(said, old, batch.denoised, good, beta=settings.beta)
    for reference in base:
        distance = estimators.velocity_distance(said, reference)
        measures.add("from_base", distance)
        loss = loss + settings.reference_weight * distance
    return loss


def _policy_loss(
    walked: StudentWalk,
    visits: list[Visit],
    batch: Sampled,
    index: int,
    good: Tensor,
    settings: EstimatorSettings,
    measures: Measures,
) -> Tensor:
    """The estimators on recorded steps: grpo and grpo_guard."""
    taken = batch.taken[index]
    said = walked.transition(visits[0], visits[0].prediction)
    options = {"clip": settings.clip_range, "log_prob": settings.log_prob}
    if settings.name == "grpo_guard":
        options["stride"] = visits[0].place.path.stride(taken.step.sigma, taken.step.sigma_next)
        found = estimators.grpo_guard(said, taken.transition, taken.sample, good, **options)
    else:
        found = estimators.grpo(said, taken.transition, taken.sample, good, **options)
    measures.add("ratio", found.ratio)
    measures.add("clipped", torch.full((len(good),), found.clipped))
    loss = found.loss
    for visit in visits[1:]:
        dt = taken.step.dt if settings.kl == "released" else 1.0
        distance = estimators.kl_to_base(said, _of_base(visit, walked), log_prob=settings.log_prob, dt=dt)
        measures.add("from_base", distance)
        loss = loss + settings.reference_weight * distance
    return loss


def _of_base(visit: Visit, walked: StudentWalk) -> Transition:
    with torch.no_grad():
        return walked.transition(visit, visit.prediction)
