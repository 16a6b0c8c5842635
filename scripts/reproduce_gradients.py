"""Two gradients of one loss, the closed form of a step's KL and its score-function estimate, compared and trained by.

At a state x the student's step is N(m_S, s^2), the teacher's N(m_T, s^2), and the loss is their KL: |m_S - m_T|^2 over
2 s^2 (Eq. 11 of DiffusionOPD, arXiv:2605.15055). Policy gradients see it through drawn next states x' instead:
(log p_S(x') - log p_T(x') - baseline) grad log p_S(x') has the same mean. All is per dimension, as in training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopd import distill as loop
from diffopd import noise
from diffopd.adapters import fused_forward
from diffopd.assemble import ALONE, Teacher
from diffopd.data import PromptRow
from diffopd.drive import denoiser_of
from diffopd.objective import get_objective
from diffopd.prediction import Proposal, Step
from diffopd.recipe import read_recipe
from diffopd.supervise import Manner, supervise

DRAWS = 1000  # solver-step keys of the estimator's own draws begin here: walks never have so many states
Draw = Callable[[Step], Tensor]


def score_function(student: Proposal, teacher: Proposal, step: Step, *, draw: Draw, has_baseline: bool) -> Tensor:
    """A loss (B,) whose gradient is the score-function estimate of that of the KL per dimension.

    draw(step) -> (B, ...): standard normal noise of the next states. has_baseline: what the log ratio is on average,
    the KL itself, is taken off: the best that a baseline of the state alone can do. Raises ValueError for std = 0.
    """
    said = student.transition
    reached = said.draw(draw(step)).detach()
    with torch.no_grad():
        cost = said.log_prob(reached) - teacher.transition.log_prob(reached)
        if has_baseline:
            cost = cost - said.kl(teacher.transition)
    return cost * said.log_prob(reached) / reached[0].numel()


ESTIMATORS = {
    "score function": partial(score_function, has_baseline=False),
    "score function with baseline": partial(score_function, has_baseline=True),
}


def ready(seed: int, settings: Iterable[str]) -> loop.Run:
    """The main recipe's student (a fresh adapter) and teachers on a stochastic DDIM walk, m = 1."""
    fixed = ["objective.name=kl", "objective.final_step=skip", "objective.substeps=1", "student.solver=ddim"]
    recipe = read_recipe("together", [*fixed, f"seed={seed}", *settings])
    student, teachers = loop.assemble(recipe, "cpu")
    place = loop.survey(student.call.prompted([teachers[0].train_rows[0].prompt]))
    return loop.Run(recipe, student, teachers, place, ALONE, "cpu")


def walked(
    run: loop.Run,
    teacher: Teacher,
    rows: list[PromptRow],
    numbers: list[int],
    objective: Callable[..., Tensor],
    *,
    update: int,
    backward: Callable[[Tensor], None] | None,
) -> list[float]:
    """One on-policy walk under a teacher with this objective; noise as in training. Mean losses by state."""
    keys = {"run_seed": run.recipe.seed, "update": update, "sample_indices": numbers}
    latents = noise.draw(run.walk.latents_shape, solver_step=loop.INITIAL, **keys)
    prompts = [row.prompt for row in rows]
    told = run.recipe.student
    manner = Manner(objective, range(run.walk.num_visits - 1), told.solver, told.noise_level)
    losses = supervise(
        run.student.call.prompted(prompts, latents=latents),
        teacher.call.prompted(prompts, latents=latents),
        manner=manner,
        noise=lambda index: noise.draw(run.walk.shape, solver_step=index + 1, **keys),
        backward=backward,
    )
    return [float(state.loss.mean()) for state in losses]


def drawn(run: loop.Run, number: int, update: int, numbers: list[int]) -> Draw:
    """The estimator's own noise for its draw `number`, a function of integers like all noise."""
    keys = {"run_seed": run.recipe.seed, "update": update, "sample_indices": numbers}
    return lambda step: noise.draw(run.walk.shape, solver_step=DRAWS * (number + 1) + step.index, **keys)


@dataclass
class Moments:
    """Of per-picture gradients at one state of the walk: their mean and mean square, and what an estimator adds."""

    sigma: float
    count: int = 0
    total: Tensor | float = 0.0
    squares: float = 0.0
    added: float = 0.0

    def add(self, exact: Tensor, estimates: list[Tensor]) -> None:
        """The exact gradient (P,) of one picture and independent estimates of it."""
        self.count += 1
        self.total = self.total + exact.double()
        self.squares += float(exact.double().square().sum())
        self.added += sum(float((one - exact).double().square().sum()) for one in estimates) / len(estimates)

    @property
    def between(self) -> float:
        """Trace of the covariance of the exact gradient over pictures, unbiased."""
        mean = float((self.total / self.count).square().sum())
        return (self.squares / self.count - mean) * self.count / (self.count - 1)

    @property
    def ratio(self) -> float:
        """Variance of the estimate over that of the exact gradient: (between + added) / between."""
        return 1.0 + self.added / self.count / self.between


def variances(run: loop.Run, *, pictures: int, draws: int) -> dict[str, dict[str, list[Moments]]]:
    """teacher -> estimator -> moments by state, over one walk of each of `pictures` prompts."""
    found = {}
    with fused_forward(denoiser_of(run.student.pipeline)):
        for teacher in run.teachers:
            found[teacher.name] = _of_teacher(run, teacher, pictures, draws)
    return found


def _of_teacher(run: loop.Run, teacher: Teacher, pictures: int, draws: int) -> dict[str, list[Moments]]:
    sigmas = _sigmas(run, teacher)
    found = {name: [Moments(sigma) for sigma in sigmas] for name in ESTIMATORS}
    exact = get_objective("kl", "skip", run.recipe.student.solver)
    for number in range(pictures):
        truth = _gradients(run, teacher, number, exact)
        for name, estimator in ESTIMATORS.items():
            told = [partial(estimator, draw=drawn(run, d, 0, [number])) for d in range(draws)]
            estimates = [_gradients(run, teacher, number, objective) for objective in told]
            for index, moments in enumerate(found[name]):
                moments.add(truth[index], [estimate[index] for estimate in estimates])
    return found


def _gradients(run: loop.Run, teacher: Teacher, number: int, objective: Callable[..., Tensor]) -> list[Tensor]:
    """The gradient (P,) of one picture's loss at each state of its walk, by the student's trained parameters."""
    parameters, found = list(run.student.parameters.values()), []

    def backward(loss: Tensor) -> None:
        parts = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        zeros = (torch.zeros_like(parameter) for parameter in parameters)
        found.append(torch.cat([(z if g is None else g).flatten() for g, z in zip(parts, zeros, strict=True)]))

    walked(run, teacher, [teacher.train_rows[number]], [number], objective, update=0, backward=backward)
    return found


def _sigmas(run: loop.Run, teacher: Teacher) -> list[float]:
    seen: list[float] = []

    def looked(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
        seen.append(step.sigma)
        return get_objective("mean")(student, teacher, step)

    walked(run, teacher, [teacher.train_rows[0]], [0], looked, update=0, backward=None)
    return seen


def curve(run: loop.Run, name: str, *, updates: int, batch: int, every: int) -> list[tuple[int, float]]:
    """(update, held-out KL) while a fresh student learns by the gradient `name`, teachers in turn.

    Held out: the closed form on test prompts, the same ones and the same noise at every look.
    """
    optimizer = torch.optim.AdamW(run.student.parameters.values(), lr=run.recipe.train.learning_rate)
    exact, found = get_objective("kl", "skip", run.recipe.student.solver), []
    with fused_forward(denoiser_of(run.student.pipeline)):
        for update in range(updates + 1):
            if update % every == 0:
                found.append((update, _held_out(run, exact, batch)))
            if update == updates:
                break
            _learn(run, optimizer, name, exact, update, batch)
    return found


def _learn(run: loop.Run, optimizer: Any, name: str, exact: Callable[..., Tensor], update: int, batch: int) -> None:
    teacher = run.teachers[update % len(run.teachers)]
    numbers = list(range(batch))
    objective = exact
    if name in ESTIMATORS:
        objective = partial(ESTIMATORS[name], draw=drawn(run, 0, update + 1, numbers))
    rows = [loop.pick_row(run, teacher, update, 0, number) for number in numbers]
    optimizer.zero_grad(set_to_none=True)
    walked(run, teacher, rows, numbers, objective, update=update + 1, backward=lambda loss: loss.mean().backward())
    torch.nn.utils.clip_grad_norm_(run.student.parameters.values(), run.recipe.train.max_grad_norm)
    optimizer.step()


def _held_out(run: loop.Run, exact: Callable[..., Tensor], batch: int) -> float:
    losses: dict[str, float] = defaultdict(float)
    for teacher in run.teachers:
        rows = teacher.watched_rows[:batch]
        by_state = walked(run, teacher, rows, list(range(len(rows))), exact, update=loop.VALIDATION, backward=None)
        losses[teacher.name] = sum(by_state) / len(by_state)
    return sum(losses.values()) / len(losses)
