"""Objectives weight the velocity difference as their docstrings say; the KL is the exact one."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffopd.objective import OBJECTIVES, get_objective
from diffopd.path import PATHS
from diffopd.prediction import Prediction, Proposal, Step, Transition
from diffopd.solver import SOLVERS, get_solver

NOISY = [name for name, row in OBJECTIVES.items() if row.needs_std]
STILL = [name for name in OBJECTIVES if name not in NOISY]


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides(path: str, solver: str, noise_level: float = 0.0, sigma: float = 0.8, sigma_next: float = 0.5):
    """Two proposals at one state, the step, and |dv|^2 (B,)."""
    step, walk = Step(drawn(1), sigma, sigma_next, 2), get_solver(solver, PATHS[path], noise_level)
    said, taught = (Prediction(step.sample, drawn(seed), sigma, PATHS[path]) for seed in (2, 3))
    branches = [tuple(Prediction(step.sample, drawn(seed + n), sigma, PATHS[path]) for n in (2, 4)) for seed in (2, 3)]
    proposals = [
        Proposal(prediction, walk(prediction, step, ()), pair)
        for prediction, pair in zip((said, taught), branches, strict=True)
    ]
    return *proposals, step, square(said.velocity - taught.velocity)


def first_row(side: Proposal) -> Proposal:
    first = [Prediction(p.sample[:1], p.velocity[:1], p.sigma, p.path) for p in (side.prediction, *side.branches)]
    return Proposal(first[0], Transition(side.transition.mean[:1], side.transition.std), tuple(first[1:]))


def square(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().flatten(1).mean(1)


@pytest.mark.parametrize("path", PATHS)
def test_predictions_are_compared_with_the_weights_of_their_kind(path):
    said, taught, step, dv2 = sides(path, "ddim")
    weights = {"velocity": 1.0, "denoised": step.sigma**2, "noise": float(PATHS[path].alpha(step.sigma)) ** 2}
    for name, weight in weights.items():
        torch.testing.assert_close(get_objective(name)(said, taught, step), weight * dv2)


def test_positive_and_direction_are_matched_each_on_its_own():
    """The guided sum has no part in it; a side of one answer is refused."""
    said, taught, step, _ = sides("flow", "euler")
    (positive, negative), (of_teacher, negative_of_teacher) = (
        [branch.velocity for branch in side.branches] for side in (said, taught)
    )
    direction = (positive - negative) - (of_teacher - negative_of_teacher)
    wanted = square(positive - of_teacher) + square(direction)
    torch.testing.assert_close(get_objective("positive_direction")(said, taught, step), wanted)
    with pytest.raises(ValueError, match="one only"):
        get_objective("positive_direction")(said, replace(taught, branches=None), step)


def test_mean_matching_is_half_the_square_of_the_means_and_dt_squared_on_flow():
    said, taught, step, dv2 = sides("flow", "euler")
    torch.testing.assert_close(get_objective("mean")(said, taught, step), step.dt**2 / 2 * dv2)
    said, taught, step, _ = sides("vp", "ddim", 0.7)
    wanted = 0.5 * square(said.transition.mean - taught.transition.mean)
    torch.testing.assert_close(get_objective("mean")(said, taught, step), wanted)


@pytest.mark.parametrize(
    ("path", "solver"), [(path, name) for name, row in SOLVERS.items() if row.stochastic for path in row.paths]
)
def test_the_kl_is_that_of_torch_distributions_per_dimension(path, solver):
    said, taught, step, _ = sides(path, solver, 0.0 if solver == "lcm" else 0.7)
    std = said.transition.std
    mine, its = Normal(said.transition.mean, std), Normal(taught.transition.mean, std)
    torch.testing.assert_close(get_objective("kl")(said, taught, step), kl_divergence(mine, its).flatten(1).mean(1))
    short = 0.5 * square(said.transition.mean - taught.transition.mean) / std**2
    torch.testing.assert_close(get_objective("kl")(said, taught, step), short)


def test_the_released_weighting_misses_the_kl_by_dt_for_the_flow_sde_only():
    said, taught, step, _ = sides("flow", "flow_sde", 0.7)
    kl = get_objective("kl")(said, taught, step)
    torch.testing.assert_close(get_objective("released_sde", None, "flow_sde")(said, taught, step), kl * abs(step.dt))
    for solver in ("dance_sde", "ddim"):
        said, taught, step, _ = sides("flow", solver, 0.7)
        kl = get_objective("kl")(said, taught, step)
        torch.testing.assert_close(get_objective("released_sde", None, solver)(said, taught, step), kl)


@pytest.mark.parametrize("name", NOISY)
def test_a_step_without_noise_does_what_final_step_says(name):
    said, taught, step, _ = sides("vp", "ddim", 0.7, sigma_next=0.0)
    assert said.transition.std == 0
    matched = get_objective("mean")(said, taught, step)
    assert get_objective(name, "skip")(said, taught, step).abs().max() == 0
    torch.testing.assert_close(get_objective(name, "mean")(said, taught, step), matched)
    with pytest.raises(ValueError, match=f"'{name}' divides by the step's std.*step 2.*final_step"):
        get_objective(name)(said, taught, step)


@pytest.mark.parametrize("name", NOISY)
def test_a_std_that_float32_cannot_resolve_counts_as_none(name):
    """DDPM's last step has 1e-10: a KL of 1e15 there would drown every other step."""
    said, taught, step, _ = sides("vp", "ddim", 0.7, sigma_next=0.0)
    tiny = [replace(side, transition=Transition(side.transition.mean, 1e-10)) for side in (said, taught)]
    assert get_objective(name, "skip")(*tiny, step).abs().max() == 0
    with pytest.raises(ValueError, match="final_step"):
        get_objective(name)(*tiny, step)


def test_a_skipped_step_keeps_a_graph_so_that_backward_can_be_called():
    step, velocity = Step(drawn(1), 0.8, 0.0, 3), drawn(2).requires_grad_()
    said, taught = (
        Proposal(Prediction(step.sample, v, 0.8, PATHS["flow"]), Transition(v, 0.0)) for v in (velocity, drawn(3))
    )
    get_objective("kl", "skip")(said, taught, step).sum().backward()
    assert velocity.grad.abs().max() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("path", PATHS)
def test_every_objective_is_a_number_per_row_and_zero_at_equal_sides(path, name):
    said, taught, step, _ = sides(path, "ddim", 0.7)
    objective = get_objective(name)
    assert objective(said, taught, step).shape == (3,) and float(objective(said, taught, step).min()) > 0
    assert objective(said, said, step).abs().max() == 0
    alone = [first_row(side) for side in (said, taught)]
    torch.testing.assert_close(objective(*alone, step), objective(said, taught, step)[:1])


@pytest.mark.parametrize(("path", "sigma"), [("flow", 1.0), ("vp", 1.0), ("vp", math.sqrt(1 - 2.0**-24))])
def test_the_noise_is_refused_where_it_says_nothing_and_the_others_are_not(path, sigma):
    said, taught, step, _ = sides(path, "ddim", sigma=sigma)
    with pytest.raises(ValueError, match="alpha = 0.*without this step"):
        get_objective("noise")(said, taught, step)
    for name in STILL:
        if name != "noise":
            assert float(get_objective(name)(said, taught, step).min()) > 0


def test_unknown_names_are_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match="known are mean, kl"):
        get_objective("mse")
    with pytest.raises(ValueError, match='"skip" and "mean"'):
        get_objective("kl", "clamp")
