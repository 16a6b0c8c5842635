"""Estimators against hand-computed numbers, independent formulas and autograd."""

import math

import pytest
import torch

from diffopd.estimators import (
    advantages,
    grpo,
    grpo_guard,
    kl_to_base,
    matching,
    nft,
    optimality,
    velocity_distance,
)
from diffopd.path import PATHS
from diffopd.prediction import Prediction, Step, Transition
from diffopd.solver import get_solver

SHAPE = (3, 2, 4, 4)
DIMENSIONS = 32
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def drawn(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(path, sigma: float = 0.6):
    """(x0, the noised state, an old prediction there)."""
    x0, noise = drawn(0), drawn(1)
    sample = path.interpolate(x0, noise, sigma)
    return x0, sample, Prediction(sample, drawn(2), sigma, path)


def test_advantages_are_a_prompts_own_and_clipped():
    rewards = torch.tensor([0.0, 1.0, 5.0, 5.0, 2.0, 4.0])
    found = advantages(rewards, ["a", "a", "b", "b", "c", "c"])
    assert found.tolist() == pytest.approx([-1, 1, 0, 0, -1, 1], abs=3e-4)
    whole = advantages(rewards, ["a", "a", "b", "b", "c", "c"], std="batch")
    deviation = math.sqrt(sum((r - 17 / 6) ** 2 for r in rewards.tolist()) / 6)
    assert whole.tolist() == pytest.approx(
        [-0.5 / deviation, 0.5 / deviation, 0, 0, -1 / deviation, 1 / deviation], rel=1e-3
    )
    spike = advantages(torch.tensor([1.0] + [0.0] * 99), [0] * 100, clip=5.0)
    assert spike[0] == 5.0 and spike[1] == pytest.approx(-0.1005, abs=1e-3)


@pytest.mark.parametrize(
    ("rewards", "groups", "std", "words"),
    [
        ([1.0, float("nan")], [0, 0], "prompt", "finite"),
        ([1.0], [0, 0], "prompt", "1 rewards for 2 pictures"),
        ([1.0], [0], "world", '"prompt" or "batch"'),
    ],
)
def test_advantages_refuse_what_has_no_meaning(rewards, groups, std, words):
    with pytest.raises(ValueError, match=words):
        advantages(torch.tensor(rewards), groups, std=std)


def test_optimality_is_a_half_without_advantage_and_ends_at_0_and_1():
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0])).tolist() == [0, 0, 0.5, 0.75, 1, 1]


@paths
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_formula_of_the_paper_row_by_row(path, beta):
    x0, sample, old = state(path)
    said, good = Prediction(sample, drawn(3), 0.6, path), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = nft(said, old, x0, good, beta=beta)
    alpha = 0.4 if path.name == "flow" else 0.8
    kept = 1.0 if path.name == "flow" else alpha
    for row in range(3):
        v, v_old, r = said.velocity[row], old.velocity[row], float(good[row])
        total = 0.0
        for share, mixed in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
            error = kept * sample[row] - 0.6 * mixed - x0[row]
            total += share * float((error**2).mean() / error.abs().mean())
        assert float(found[row]) == pytest.approx(total / beta, rel=1e-9)


@paths
def test_nft_moves_towards_good_pictures_away_from_bad_ones_and_not_without_advantage(path):
    x0, sample, old = state(path)
    velocity = old.velocity.clone().requires_grad_(True)
    good = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    nft(Prediction(sample, velocity, 0.6, path), old, x0, good).sum().backward()
    target = Prediction.from_denoised(sample, x0, 0.6, path).velocity
    descent, toward = -velocity.grad, target - old.velocity
    cosines = torch.nn.functional.cosine_similarity(descent.flatten(1), toward.flatten(1))
    assert cosines[0] == pytest.approx(1) and cosines[2] == pytest.approx(-1)
    assert descent[1].abs().max() < 1e-12


def test_nft_carries_no_gradient_into_the_old_policy_or_the_weights():
    path = PATHS["flow"]
    x0, sample, old = state(path)
    remembered = old.velocity.clone().requires_grad_(True)
    velocity = drawn(3).requires_grad_(True)
    held = Prediction(sample, remembered, 0.6, path)
    good = torch.full((3,), 0.7, dtype=torch.float64)
    nft(Prediction(sample, velocity, 0.6, path), held, x0, good, beta=1.0).sum().backward()
    assert remembered.grad is None
    # by hand at b = 1: 2 [r (x0(v) - x0) / w+ - (1 - r) (x0(2 v_old - v) - x0) / w-] (-sigma) / D
    plus, minus = (sample - 0.6 * v - x0 for v in (velocity.detach(), 2 * old.velocity - velocity.detach()))
    weight = [e.abs().flatten(1).mean(1).view(-1, 1, 1, 1) for e in (plus, minus)]
    expected = -0.6 * 2 / DIMENSIONS * (0.7 * plus / weight[0] - 0.3 * minus / weight[1])
    torch.testing.assert_close(velocity.grad, expected)


@paths
def test_matching_and_distance_are_mean_squares_of_each_row(path):
    x0, sample, _ = state(path)
    truth = Prediction.from_denoised(sample, x0, 0.6, path)
    off = Prediction(sample, truth.velocity + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1), 0.6, path)
    assert velocity_distance(off, truth).tolist() == pytest.approx([0, 1, 4])
    wanted = truth.velocity.clone().requires_grad_(True)
    found = matching(off.velocity.bfloat16(), wanted)
    assert found.dtype == wanted.dtype and found.tolist() == pytest.approx([0, 1, 4], abs=0.05)
    assert not found.requires_grad, "what is wanted does not learn"


def step_of(velocity: torch.Tensor, *, noise_level: float = 0.7) -> Transition:
    path, sample = PATHS["flow"], drawn(5)
    solver = get_solver("flow_sde", path, noise_level)
    return solver(Prediction(sample, velocity, 0.5, path), Step(sample, 0.5, 0.4, 3), ())


def test_at_equal_weights_the_ratio_is_1_and_the_gradient_the_score_functions():
    velocity = drawn(6).requires_grad_(True)
    said, old = step_of(velocity), step_of(velocity.detach())
    sample, advantage = old.draw(drawn(7)), torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    found = grpo(said, old, sample, advantage, clip=0.2, log_prob="sum")
    assert found.ratio.tolist() == pytest.approx([1, 1, 1]) and found.clipped == 0
    ours = torch.autograd.grad(found.loss.sum(), velocity, retain_graph=True)[0]
    score = torch.autograd.grad(-(advantage * said.log_prob(sample)).sum(), velocity)[0]
    torch.testing.assert_close(ours, score)


def test_the_ratio_is_that_of_two_gaussians_per_dimension_or_of_the_whole():
    mean, other = drawn(8), drawn(8) + 0.1
    said, old = Transition(other, 0.5), Transition(mean, 0.5)
    sample = mean + 0.5 * drawn(9)
    normal = torch.distributions.Normal
    logs = (normal(other, 0.5).log_prob(sample) - normal(mean, 0.5).log_prob(sample)).flatten(1)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(grpo(said, old, sample, ones).ratio, logs.mean(1).exp())
    torch.testing.assert_close(grpo(said, old, sample, ones, log_prob="sum").ratio, logs.sum(1).exp())
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        grpo(said, old, sample, ones, log_prob="median")


def test_the_clip_stops_a_good_picture_above_and_a_bad_one_below_only():
    mean = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    sample = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    said, old = Transition(mean + 0.5, 1.0), Transition(torch.zeros(4, 1, dtype=torch.float64), 1.0)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    found = grpo(said, old, sample, advantage, clip=0.2)
    up, down = math.exp(0.375), math.exp(-0.625)  # log rho = mean x' - mean^2 / 2
    assert found.ratio.tolist() == pytest.approx([up, down, up, down])
    assert found.loss.tolist() == pytest.approx([-1.2, -down, up, 0.8])
    assert found.clipped == 1.0
    found.loss.sum().backward()
    assert [bool(g) for g in mean.grad.flatten()] == [False, True, True, False]


def test_the_guards_ratio_is_the_means_move_along_the_noise_whatever_the_std():
    mean, move, noise = drawn(10), 0.01 * drawn(11), drawn(12)
    ratios = []
    for std in (0.05, 0.5, 2.0):
        said, old = Transition(mean + move, std), Transition(mean, std)
        found = grpo_guard(said, old, old.draw(noise), torch.ones(3, dtype=torch.float64), stride=-0.1, clip=1.0)
        torch.testing.assert_close(found.ratio, (move * noise).flatten(1).mean(1).exp())
        ratios.append(found.ratio)
        torch.testing.assert_close(found.loss, -found.ratio / 0.1)
    torch.testing.assert_close(ratios[0], ratios[2])


@pytest.mark.parametrize(("path", "solver"), [("flow", "flow_sde"), ("vp", "ddim")])
def test_the_guard_moves_the_velocity_alike_at_every_noise_level(path, solver):
    """Up to what the noise adds to the move, at most 1.3; by differences of sigmas it would be 8 to 1 on VP."""
    path, pushes = PATHS[path], []
    for sigma, sigma_next in ((0.9977, 0.9907), (0.9713, 0.9281), (0.73, 0.57), (0.57, 0.37)):
        sample, velocity = drawn(18), drawn(19).requires_grad_(True)
        step, told = Step(sample, sigma, sigma_next, 0), get_solver(solver, path, 0.7)
        said = told(Prediction(sample, velocity, sigma, path), step, ())
        old, ones = Transition(said.mean.detach(), said.std), torch.ones(3, dtype=torch.float64)
        stride = path.stride(sigma, sigma_next)
        found = grpo_guard(said, old, old.draw(drawn(20)), ones, stride=stride, clip=0.9)
        found.loss.sum().backward()
        pushes.append(float(velocity.grad.norm()))
    assert max(pushes) / min(pushes) < 1.35


def test_the_guard_removes_the_bias_of_the_plain_ratio():
    mean = torch.zeros(2000, 16, dtype=torch.float64)
    said, old = Transition(mean + 0.3, 0.5), Transition(mean, 0.5)
    sample = old.draw(drawn(13, (2000, 16)))
    ones = torch.ones(2000, dtype=torch.float64)
    plain, guarded = grpo(said, old, sample, ones).ratio, grpo_guard(said, old, sample, ones, stride=-1.0).ratio
    assert plain.log().mean() == pytest.approx(-0.18, abs=0.01)  # -|move|^2 / 2 s^2 per dimension
    assert guarded.log().mean() == pytest.approx(0, abs=0.01)


def test_the_kl_to_the_base_is_that_of_two_gaussians_per_dimension():
    said, base = step_of(drawn(14)), step_of(drawn(15))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(said.mean, said.std), torch.distributions.Normal(base.mean, base.std)
    )
    torch.testing.assert_close(kl_to_base(said, base), exact.flatten(1).mean(1))
    torch.testing.assert_close(kl_to_base(said, base, log_prob="sum"), exact.flatten(1).sum(1))
    with pytest.raises(ValueError, match="log_prob"):
        kl_to_base(said, base, log_prob="median")


@pytest.mark.parametrize("log_prob", ["mean", "sum"])
def test_the_kl_keeps_its_share_of_the_gradient_whatever_densities_are_divided_by(log_prob):
    """Both terms are over the same dimensions, so their ratio is that of the paper's."""
    step, base = step_of(drawn(14)), step_of(drawn(15))
    sample, advantage = step.draw(drawn(16)), torch.ones(3)

    def slope(of):
        mean = step.mean.clone().requires_grad_(True)
        of(Transition(mean, step.std)).sum().backward()
        return mean.grad.norm()

    policy = slope(lambda said: grpo(said, step, sample, advantage, clip=0.9, log_prob=log_prob).loss)
    away = slope(lambda said: kl_to_base(said, base, log_prob=log_prob))
    whole = slope(lambda said: grpo(said, step, sample, advantage, clip=0.9, log_prob="sum").loss)
    exact = slope(lambda said: kl_to_base(said, base, log_prob="sum"))
    assert float(away / policy) == pytest.approx(float(exact / whole), rel=1e-4)


def test_the_released_kl_is_divided_by_the_diffusion_coefficient_of_the_step():
    """Flow-GRPO's train_sd3.py: |mean - mean_base|^2 / (2 g^2), where the step's std is g sqrt|dt|."""
    said, base, dt = step_of(drawn(14)), step_of(drawn(15)), -0.07
    g = said.std / math.sqrt(-dt)
    released = ((said.mean - base.mean) ** 2).flatten(1).mean(1) / (2 * g**2)
    torch.testing.assert_close(kl_to_base(said, base, dt=dt), released)


def test_a_step_without_noise_has_no_ratio():
    still = Transition(drawn(16), 0.0)
    with pytest.raises(ValueError, match="std = 0"):
        grpo(still, still, drawn(17), torch.ones(3))
