"""Predictions are one currency, transitions exact Gaussians: held to torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffopd.path import PATHS
from diffopd.prediction import Prediction, Step, Transition


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 2, 4)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [1e-3, 0.4, 0.999])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_prediction_is_the_same_from_velocity_denoised_or_noise(path, sigma):
    said = Prediction(drawn(1), drawn(2), sigma, path)
    for other in (
        Prediction.from_denoised(said.sample, said.denoised, sigma, path),
        Prediction.from_noise(said.sample, said.noise, sigma, path),
    ):
        torch.testing.assert_close(other.velocity, said.velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.interpolate(said.denoised, said.noise, sigma), said.sample, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_prediction_is_refused_where_its_kind_is_undefined(path):
    with pytest.raises(ValueError, match="alpha = 0"):
        Prediction.from_noise(drawn(1), drawn(2), 1.0, path)
    with pytest.raises(ValueError, match="sigma = 0"):
        Prediction.from_denoised(drawn(1), drawn(2), 0.0, path)


def test_detach_ends_the_gradient_and_dt_is_negative():
    said = Prediction(drawn(1), drawn(2).requires_grad_(), 0.5, PATHS["flow"])
    assert said.denoised.requires_grad and not said.detach().denoised.requires_grad
    assert Step(drawn(1), 0.5, 0.2, 0).dt == pytest.approx(-0.3)


@pytest.mark.parametrize(("std", "other_std"), [(0.5, 0.5), (0.5, 0.8), (1.3, 0.2)])
def test_kl_and_log_prob_are_those_of_torch_distributions(std, other_std):
    mine, other = Transition(drawn(1), std), Transition(drawn(2), other_std)
    wanted = kl_divergence(Normal(mine.mean, std), Normal(other.mean, other_std)).flatten(1).sum(1)
    torch.testing.assert_close(mine.kl(other), wanted, rtol=1e-12, atol=1e-12)
    wanted = Normal(mine.mean, std).log_prob(drawn(3)).flatten(1).sum(1)
    torch.testing.assert_close(mine.log_prob(drawn(3)), wanted, rtol=1e-12, atol=1e-12)


def test_a_draw_is_the_mean_plus_this_steps_std_times_the_noise():
    assert torch.equal(Transition(drawn(1), 0.5).draw(drawn(2)), drawn(1) + 0.5 * drawn(2))
    many = Transition(torch.zeros(200_000), 0.3).draw(drawn(4, 200_000))
    assert float(many.std()) == pytest.approx(0.3, rel=0.01)


def test_a_step_without_noise_has_neither_kl_nor_density():
    still, noisy = Transition(drawn(1), 0.0), Transition(drawn(1), 0.5)
    for undefined in (lambda: still.kl(noisy), lambda: noisy.kl(still), lambda: still.log_prob(drawn(1))):
        with pytest.raises(ValueError, match="std = 0"):
            undefined()


def test_score_function_and_analytic_gradient_of_one_transition_agree_in_expectation():
    """Delta grad log pi averages to the KL's own gradient; its error falls as one over the root of the draws."""
    std, mine, target = 0.4, drawn(1, 6), drawn(2, 1, 6)
    weights = mine.clone().requires_grad_()
    analytic = torch.autograd.grad(Transition(weights[None], std).kl(Transition(target, std)).sum(), weights)[0]

    def estimate(draws: int) -> torch.Tensor:
        actions = mine + std * drawn(3, draws, 6)
        advantage = Transition(mine[None], std).log_prob(actions) - Transition(target, std).log_prob(actions)
        log_prob = Transition(weights[None].expand(draws, 6), std).log_prob(actions)
        return torch.autograd.grad((advantage * log_prob).mean(), weights)[0]

    def error(draws: int) -> float:
        return float((estimate(draws) - analytic).abs().max() / analytic.abs().max())

    assert error(400_000) < 0.03  # four of its standard errors
    assert error(100) > error(400_000)
