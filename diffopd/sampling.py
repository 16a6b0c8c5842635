"""Pictures of one update: groups per prompt, sampled through the driven pipeline, scored while the next are sampled."""

from __future__ import annotations

import site
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffopd import reward as sums
from diffopd.data import PromptRow
from diffopd.drive import Call, Walk, next_sample
from diffopd.errors import UserError
from diffopd.prediction import Step, Transition
from diffopd.supervise import Manner, StudentWalk, Watch
from diffopd.teacher import Reward

OURS = (__file__, sums.__file__)  # what stands between a training and a reward's own lines
# What these call: Python's own modules and installed libraries.
LIBRARIES = ("<", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *site.getsitepackages())
LIBRARIES += (site.getusersitepackages(),)
Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Taken:
    """One step that was drawn: the state and level it left, the state (B, ...) it reached, its distribution then."""

    step: Step
    sample: Tensor
    transition: Transition

    def rows(self, places: Tensor) -> Taken:
        """The same for some rows."""
        step = replace(self.step, sample=self.step.sample[places])
        return Taken(step, self.sample[places], Transition(self.transition.mean[places], self.transition.std))


@dataclass(frozen=True)
class Sampled:
    """Pictures as latents: denoised (B, ...), canonical; initial (B, ...), what the walk began with; the steps taken.

    numbers: the picture's number within the update, over all processes. taken is empty unless it was recorded.
    """

    rows: list[PromptRow]
    numbers: list[int]
    denoised: Tensor
    initial: Tensor
    taken: tuple[Taken, ...] = ()

    def part(self, places: Sequence[int]) -> Sampled:
        """Some of the pictures."""
        index = torch.tensor(places, device=self.denoised.device)
        return Sampled(
            [self.rows[place] for place in places],
            [self.numbers[place] for place in places],
            self.denoised[index],
            self.initial[index],
            tuple(taken.rows(index) for taken in self.taken),
        )


def sample(
    call: Call,
    rows: list[PromptRow],
    numbers: list[int],
    *,
    latents: Tensor,
    noise: Noise,
    manner: Manner | None = None,
    watch: Watch | None = None,
) -> tuple[Sampled, list[Any]]:
    """One batch by the pipeline's call, without gradients; returns it with its B PIL images.

    latents (B, ...): the call's initial ones. noise(i) -> (B, ...): the draw of the step from state i. manner: walk
    by its solver and record every step (policy gradients need them); None walks natively and records nothing.
    """
    watch, taken = watch or Watch(), []
    told = call.prompted([row.prompt for row in rows], latents=latents, output_type="pil")
    with watch("rollout"), torch.no_grad(), Walk(told) as walk:
        walked = StudentWalk(walk, manner) if manner else None
        visit, after = walk.advance(), None
        while visit is not None:
            place, step = visit.place, visit.step
            said = walked.propose(visit).transition if walked else None
            draw = noise(visit.index)
            reply = walked.move(visit, draw) if walked else visit.native_reply(draw)
            after = next_sample(reply).float() / place.scale_next
            if said:
                taken.append(Taken(step, after, said))
            visit = walk.advance(reply)
        images = walk.result.images if hasattr(walk.result, "images") else walk.result[0]
    watch.evaluations["rollout"] += walk.evaluations
    return Sampled(rows, numbers, after, latents, tuple(taken)), list(images)


def joined(parts: Sequence[Sampled]) -> Sampled:
    """Batches of one update as one; their steps stood at the same levels."""
    taken = []
    for steps in zip(*(part.taken for part in parts), strict=True):
        step = replace(steps[0].step, sample=torch.cat([s.step.sample for s in steps]))
        mean = torch.cat([s.transition.mean for s in steps])
        sample = torch.cat([s.sample for s in steps])
        taken.append(Taken(step, sample, Transition(mean, steps[0].transition.std)))
    return Sampled(
        [row for part in parts for row in part.rows],
        [number for part in parts for number in part.numbers],
        torch.cat([part.denoised for part in parts]),
        torch.cat([part.initial for part in parts]),
        tuple(taken),
    )


def score(reward: Reward, images: list[Any], rows: list[PromptRow]) -> Tensor:
    """The reward of B images, (B,) float64.

    Raises UserError where the reward refuses a row, for another number of scores, or one that is not finite.
    """
    try:
        given = reward(images, [row.prompt for row in rows], [row.metadata for row in rows])
    except (ValueError, KeyError, SystemExit) as error:
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in OURS]
        own = [f for f in lines if not f.filename.startswith(LIBRARIES)] or lines  # an installed reward has only these
        place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        told = f"{type(error).__name__}: {str(error).rstrip('.')}{place}"
        raise UserError(f"The reward cannot score pictures, of {rows[0].prompt!r} and others: {told}.") from error
    scores = torch.as_tensor(given, dtype=torch.float64).cpu().flatten()
    if len(scores) != len(images):
        found = f"{len(scores)} score{'s' * (len(scores) != 1)}"
        raise UserError(f"The reward gave {found} for {len(images)} pictures. It must give one for each.")
    if not bool(torch.isfinite(scores).all()):
        place = int((~torch.isfinite(scores)).nonzero()[0])
        raise UserError(
            f"The reward of a picture of {rows[place].prompt!r} is {float(scores[place])}. Rewards must be finite; "
            "correct the reward, or give such pictures a score of their own."
        )
    return scores


def gathered(futures: Sequence[Future[Tensor]]) -> Tensor:
    """The scores of all batches, in their order; an error of the reward is raised here."""
    held = [future.result() for future in futures]
    return torch.cat(held) if held else torch.zeros(0, dtype=torch.float64)
