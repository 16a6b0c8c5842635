"""Solvers in a world where everything is known: Gaussian data N(0.7, 0.5^2), whose exact velocity is a formula.

The order of each ODE solver is measured by a fitted slope, the marginals of each SDE by propagating mean and
variance (every step is affine there, so nothing is sampled).
"""

import math
import re

import numpy as np
import pytest
import torch

from diffopd.path import PATHS, Path
from diffopd.prediction import Prediction, Step
from diffopd.solver import REASONS, SOLVERS, get_solver, implied_prediction

MEAN, STD, END = 0.7, 0.5, 0.1
PAIRS = [(name, path) for name, row in SOLVERS.items() for path in row.paths]
ODE = [(name, path) for name, path in PAIRS if not SOLVERS[name].stochastic]
ODE += [(name, path) for name, path in PAIRS if SOLVERS[name].noise]  # noise_level 0 makes an ODE step of them
NOISE_LEVELS = {"flow_sde": [0.7], "dance_sde": [0.5], "ddim": [0.5, 1.0]}
SDE = [(name, path, level) for name, path in PAIRS for level in NOISE_LEVELS.get(name, [])]


def variance(path: Path, sigma: float) -> float:
    """Of the exact marginal at a level."""
    return (float(path.alpha(sigma)) * STD) ** 2 + sigma**2


def exact(path: Path, sample: torch.Tensor, sigma: float) -> Prediction:
    """E[x0 | x] of Gaussian data, as a prediction."""
    alpha = float(path.alpha(sigma))
    denoised = MEAN + alpha * STD**2 / variance(path, sigma) * (sample - alpha * MEAN)
    return Prediction.from_denoised(sample, denoised, sigma, path)


def carried(path: Path, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Where the exact ODE carries a sample: the same quantile of the next marginal."""
    a, a_next = float(path.alpha(sigma)), float(path.alpha(sigma_next))
    stretch = math.sqrt(variance(path, sigma_next) / variance(path, sigma))
    return a_next * MEAN + stretch * (sample - a * MEAN)


def levels(start: float, count: int) -> list[float]:
    return [start + (END - start) * i / count for i in range(count + 1)]


def slope(counts: list[int], errors: list[float]) -> float:
    """Minus the slope of log error over log count."""
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize(("name", "path"), ODE)
def test_the_order_of_every_ode_solver_is_the_fitted_slope_of_its_error(name, path):
    solver, path, errors, counts = get_solver(name, PATHS[path], 0.0), PATHS[path], [], [16, 32, 64, 128]
    start = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    for count in counts:
        grid, sample, history = levels(0.9, count), start, ()
        for i in range(count):
            said = exact(path, sample, grid[i])
            transition = solver(said, Step(sample, grid[i], grid[i + 1], i), history)
            sample, history = transition.mean, (*history, said)
            assert transition.std == 0
        errors.append(float((sample - carried(path, start, 0.9, END)).abs().max()))
    assert slope(counts, errors) == pytest.approx(SOLVERS[name].order, abs=0.2)


def marginal_error(name: str, path: Path, noise_level: float, start: float, count: int) -> tuple[float, float]:
    """Errors of mean and variance at END of a walk of so many steps that starts in the exact marginal."""
    solver, grid = get_solver(name, path, noise_level), levels(start, count)
    mean, var = float(path.alpha(start)) * MEAN, variance(path, start)
    sample = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(count):
        transition = solver(exact(path, sample, grid[i]), Step(sample, grid[i], grid[i + 1], i), ())
        offset, gain = float(transition.mean[0]), float(transition.mean[1] - transition.mean[0])
        mean, var = offset + gain * mean, gain**2 * var + transition.std**2
    return mean - float(path.alpha(END)) * MEAN, var - variance(path, END)


@pytest.mark.parametrize(("name", "path", "noise_level"), SDE)
def test_sde_marginals_from_below_pure_noise_converge_with_slope_one(name, path, noise_level):
    counts = [100, 200, 400]
    errors = [marginal_error(name, PATHS[path], noise_level, 0.9, count) for count in counts]
    assert slope(counts, [abs(var) for _, var in errors]) == pytest.approx(1, abs=0.15)
    assert all(abs(mean) < 1e-12 for mean, _ in errors), "the mean is exact at any number of steps"
    assert abs(errors[-1][1]) < 0.02 * variance(PATHS[path], END)


@pytest.mark.parametrize("path", PATHS)
def test_lcm_is_no_sde_of_the_path_its_variance_error_does_not_fall_with_the_steps(path):
    """Re-noising the mean of x0 given x loses, at every step, how x0 varies around that mean."""
    errors = [marginal_error("lcm", PATHS[path], 0.0, 0.9, count)[1] for count in (100, 200)]
    assert max(errors) < -0.05 * variance(PATHS[path], END)
    assert errors[1] / errors[0] > 0.9


@pytest.mark.parametrize("noise_level", [0.5, 0.7])
def test_the_flow_sde_from_pure_noise_injects_a_squared_whatever_the_number_of_steps(noise_level):
    """Its first step's variance is a^2, and the sample there has an excess variance that tends to a^4/4."""
    solver, path = get_solver("flow_sde", PATHS["flow"], noise_level), PATHS["flow"]
    excess = []
    for count in (100, 1000, 10_000):
        sigma_next = levels(1.0, count)[1]
        sample = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        transition = solver(exact(path, sample, 1.0), Step(sample, 1.0, sigma_next, 0), ())
        assert transition.std == pytest.approx(noise_level, rel=1e-9)
        gain = float(transition.mean[1] - transition.mean[0])
        excess.append(gain**2 + transition.std**2 - variance(path, sigma_next))
    assert excess[-1] == pytest.approx(noise_level**4 / 4, rel=2e-3)
    assert slope([100, 1000], [abs(e - noise_level**4 / 4) for e in excess[:2]]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("first", [0.999999, 0.99967])
def test_a_first_sigma_a_hair_below_one_gives_the_flow_sde_no_other_noise(first):
    """UniPC's and DPM-Solver++'s flow grids begin there."""
    solver, sample = get_solver("flow_sde", PATHS["flow"], 0.7), torch.zeros(1, 1)
    stds = [solver(exact(PATHS["flow"], sample, s), Step(sample, s, 0.96, 0), ()).std for s in (1.0, first)]
    assert stds[1] == pytest.approx(stds[0], rel=0.01)


def test_a_whole_flow_sde_walk_from_pure_noise_does_not_converge_but_one_from_below_does():
    def ratio(start: float) -> float:
        few, many = (abs(marginal_error("flow_sde", PATHS["flow"], 0.7, start, count)[1]) for count in (400, 800))
        return many / few

    assert ratio(0.9) == pytest.approx(0.5, abs=0.05)
    assert ratio(1.0) > 0.6


@pytest.mark.parametrize("path", PATHS)
def test_ddim_at_eta_zero_is_dpm_solver_of_first_order_and_euler_on_flow(path):
    sample = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    step, said = Step(sample, 0.8, 0.5, 0), exact(PATHS[path], sample, 0.8)
    wanted = get_solver("ddim", PATHS[path])(said, step, ()).mean
    names = ["dpmpp_1", "euler"] if path == "flow" else ["dpmpp_1"]
    for name in names:
        torch.testing.assert_close(get_solver(name, PATHS[path])(said, step, ()).mean, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_next", [0.5, 0.0])
@pytest.mark.parametrize("sigma", [1.0, 0.8])
@pytest.mark.parametrize(("name", "path"), PAIRS)
def test_every_solver_is_finite_from_pure_noise_and_to_the_picture(name, path, sigma, sigma_next):
    sample = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    said = Prediction(sample, 0.4 * sample + 0.1, sigma, PATHS[path])
    solver = get_solver(name, PATHS[path], 0.7 if SOLVERS[name].noise else 0.0)
    transition = solver(said, Step(sample, sigma, sigma_next, 0), ())
    assert torch.isfinite(transition.mean).all() and math.isfinite(transition.std) and transition.std >= 0


@pytest.mark.parametrize("path", PATHS)
def test_dpmpp_2m_is_first_order_after_pure_noise_and_at_the_last_step(path):
    sample = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    path = PATHS[path]
    two, one = get_solver("dpmpp_2m", path), get_solver("dpmpp_1", path)
    said = exact(path, sample, 0.8)
    for history, sigma_next in (((exact(path, sample, 1.0),), 0.5), ((exact(path, sample, 0.9),), 0.0), ((), 0.5)):
        step = Step(sample, 0.8, sigma_next, 1)
        assert torch.equal(two(said, step, history).mean, one(said, step, ()).mean)
    near = Prediction(sample, 0.4 * sample, 1 - 1e-13, path)  # the limit, not a jump
    step = Step(sample, 0.8, 0.5, 1)
    torch.testing.assert_close(two(said, step, (near,)).mean, one(said, step, ()).mean, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("sigma_next", [0.5, 0.0])
@pytest.mark.parametrize(("name", "path"), [("euler", "flow"), ("ddim", "flow"), ("ddim", "vp")])
def test_the_implied_prediction_lands_there_and_is_the_prediction_that_made_the_step(name, path, sigma_next):
    sample = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    said, step = exact(PATHS[path], sample, 0.8), Step(sample, 0.8, sigma_next, 0)
    landing = get_solver(name, PATHS[path])(said, step, ()).mean
    implied = implied_prediction(landing, step, PATHS[path])
    torch.testing.assert_close(implied.velocity, said.velocity, rtol=1e-12, atol=1e-12)


def test_pairs_that_are_not_defined_are_refused_with_the_reason():
    refused = [(name, path) for name in SOLVERS for path in PATHS if path not in SOLVERS[name].paths]
    assert {name for name, _ in refused} == set(REASONS) == {"euler", "flow_sde", "dance_sde"}
    for name, path in refused:
        with pytest.raises(ValueError, match=re.escape(f"not defined on the {path} path: {REASONS[name]}")):
            get_solver(name, PATHS[path], 0.0)


@pytest.mark.parametrize(
    ("name", "noise_level", "reason"),
    [
        ("eular", 0.0, "known are native, euler"),
        ("ddim", -0.1, "at least 0"),
        ("ddim", math.nan, "finite"),
        ("ddim", 1.5, "at most 1"),
        ("dpmpp_2m", 0.7, "no effect"),
        ("lcm", 0.7, "no effect"),
    ],
)
def test_names_and_noise_levels_that_mean_nothing_are_refused(name, noise_level, reason):
    with pytest.raises(ValueError, match=reason):
        get_solver(name, PATHS["vp"], noise_level)
