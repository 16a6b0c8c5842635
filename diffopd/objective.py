"""Objectives: how the student's proposal at a state is compared with the teacher's.

An objective is `f(student: Proposal, teacher: Proposal, step: Step) -> (B,)`, the mean over all other dimensions, so
that a loss does not grow with the picture. The teacher's side carries no gradient. What each weights, in terms of the
velocity difference |dv|^2 at the same state, is in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffopd.path import Path
from diffopd.prediction import LEAST_STD, Proposal, Step

ObjectiveFunction = Callable[[Proposal, Proposal, Step], Tensor]


def mean(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """1/2 ||mean_S - mean_T||^2, DiffusionOPD's ODE loss, Eq. (12) of arXiv:2605.15055: dt^2/2 |dv|^2 on flow."""
    return 0.5 * mean_square(student.transition.mean - teacher.transition.mean)


def kl(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """Exact KL of the two transitions per dimension, Eq. (11) of arXiv:2605.15055: ||mean_S - mean_T||^2 / 2 std^2.

    Both sides share the student's std, so no sampling noise of its own remains. Raises ValueError for std = 0.
    """
    return student.transition.kl(teacher.transition) / teacher.transition.mean[0].numel()


def released_sde(student: Proposal, teacher: Proposal, step: Step, *, solver: str = "flow_sde") -> Tensor:
    """The weighting of DiffusionOPD's released code, which is not the KL; here only to reproduce it.

    delta^2 / (2 max(w^2, 1e-8)), where w is the diffusion coefficient g (std without sqrt|dt|) for the flow SDE and
    the step's std for others; a step with std 0 under an SDE is divided by 1e-8.
    """
    w2 = student.transition.std**2
    if solver == "flow_sde":
        w2 = w2 / abs(step.dt)
    return mean_square(student.transition.mean - teacher.transition.mean) / (2 * max(w2, 1e-8))


def velocity(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """|v_S - v_T|^2, D-OPSD's paper loss (arXiv:2605.05204)."""
    return mean_square(student.prediction.velocity - teacher.prediction.velocity)


def denoised(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """|x0_S - x0_T|^2 = sigma^2 |dv|^2, the loss of D-OPSD's released code: high noise weighs most."""
    return mean_square(student.prediction.denoised - teacher.prediction.denoised)


def noise(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """|eps_S - eps_T|^2 = alpha^2 |dv|^2: low noise weighs most. Raises ValueError at alpha = 0, where it is 0."""
    if is_pure_noise(student.prediction.path, step.sigma):
        raise ValueError(
            f"objective 'noise' compares nothing at step {step.index} (sigma {step.sigma:.4f}): alpha = 0 there, so "
            'the noise is the sample whatever is predicted. Take "velocity" or "mean", or a query without this step.'
        )
    return mean_square(student.prediction.noise - teacher.prediction.noise)


def positive_direction(student: Proposal, teacher: Proposal, step: Step) -> Tensor:
    """|v+_S - v+_T|^2 + |d_S - d_T|^2 with d = v+ - v-: positive-direction matching, arXiv:2607.24731.

    v+ answers the prompt, v- the negative one; guidance adds w d to v-. Where the teacher's negative branch sees the
    picture as well, the guided sum hides what the picture says: it cancels in d. So each is matched on its own, and w
    has no part in it. Raises ValueError where a side was not guided.
    """
    if student.branches is None or teacher.branches is None:
        raise ValueError('objective "positive_direction" compares two answers of each side; a side has one only.')
    (positive, negative), (taught, taught_negative) = student.branches, teacher.branches
    direction = positive.velocity - negative.velocity
    taught_direction = taught.velocity - taught_negative.velocity
    return mean_square(positive.velocity - taught.velocity) + mean_square(direction - taught_direction)


def is_pure_noise(path: Path, sigma: float) -> bool:
    """Whether alpha^2, the weight of a noise loss, is 0 up to what float32 resolves."""
    return float(path.alpha(sigma)) ** 2 < 1e-7


def mean_square(difference: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over all but the batch."""
    return difference.square().flatten(1).mean(1)


@dataclass(frozen=True)
class Objective:
    """One row. needs_std: it divides by the step's std, so `final_step` must say what a step without noise does.

    needs_branches: it compares the two answers that a guided prediction is made of.
    """

    name: str
    function: Callable[..., Tensor]
    needs_std: bool = False
    needs_branches: bool = False


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("mean", mean),
        Objective("kl", kl, needs_std=True),
        Objective("released_sde", released_sde, needs_std=True),
        Objective("velocity", velocity),
        Objective("denoised", denoised),
        Objective("noise", noise),
        Objective("positive_direction", positive_direction, needs_branches=True),
    )
}


def get_objective(name: str, final_step: str | None = None, solver: str = "native") -> ObjectiveFunction:
    """The objective `name`. final_step: what a step with std 0 (below `LEAST_STD`) does under one that divides by it.

    "skip" gives it loss 0, "mean" the mean matching of Eq. (12), None refuses it. solver: only `released_sde` asks.
    Raises ValueError for unknown names; the returned function raises it at a std-0 step when final_step is None.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known are {', '.join(OBJECTIVES)}.")
    if final_step not in (None, "skip", "mean"):
        raise ValueError(f'final_step = {final_step!r}; allowed are "skip" and "mean".')
    row = OBJECTIVES[name]
    function = partial(row.function, solver=solver) if name == "released_sde" else row.function
    if not row.needs_std:
        return function
    return partial(_with_final_step, function=function, name=name, final_step=final_step)


def _with_final_step(
    student: Proposal,
    teacher: Proposal,
    step: Step,
    *,
    function: ObjectiveFunction,
    name: str,
    final_step: str | None,
) -> Tensor:
    if student.transition.std > LEAST_STD:
        return function(student, teacher, step)
    if final_step == "mean":
        return mean(student, teacher, step)
    if final_step == "skip":  # zero, with a graph
        return mean(student, teacher, step) * torch.zeros(())
    raise ValueError(
        f"objective {name!r} divides by the step's std, which is 0 at step {step.index} (sigma {step.sigma:.4f} -> "
        f'{step.sigma_next:.4f}). Set final_step = "mean" or "skip", or walk with a stochastic solver.'
    )
