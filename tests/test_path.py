"""The two paths: conversions are float64 round trips up to both ends, and undefined ones are refused."""

import pytest
import torch

from diffopd.path import PATHS

LEVELS = (0.0, 1e-6, 0.3, 0.7, 1 - 1e-6, 1.0)


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def velocity_of(path, denoised, noise, sigma):
    return noise - denoised if path.name == "flow" else path.alpha(sigma) * noise - sigma * denoised


def close(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_denoised_and_noise_come_back_from_sample_and_velocity_at_both_ends(path, sigma):
    denoised, noise = drawn(1), drawn(2)
    sample = path.interpolate(denoised, noise, sigma)
    velocity = velocity_of(path, denoised, noise, sigma)
    close(path.denoised(sample, velocity, sigma), denoised)
    close(path.noise(sample, velocity, sigma), noise)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_velocity_comes_back_from_denoised_and_from_noise_wherever_they_tell_it(path, sigma):
    sample, velocity = drawn(1), drawn(2)
    tolerance = 1e-8 if min(sigma, 1 - sigma) < 1e-3 else 1e-12  # the quotient by 1e-6 costs six digits
    if sigma > 0:
        denoised = path.denoised(sample, velocity, sigma)
        close(path.velocity_from_denoised(sample, denoised, sigma), velocity, tolerance)
    if sigma < 1:
        noise = path.noise(sample, velocity, sigma)
        close(path.velocity_from_noise(sample, noise, sigma), velocity, tolerance)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_what_an_end_does_not_tell_is_refused(path):
    with pytest.raises(ValueError, match="sigma = 0"):
        path.velocity_from_denoised(drawn(1), drawn(2), 0.0)
    with pytest.raises(ValueError, match="alpha = 0"):
        path.velocity_from_noise(drawn(1), drawn(2), 1.0)
    one_row_at_the_end = torch.tensor([0.5, 1.0, 0.5])
    with pytest.raises(ValueError, match="alpha = 0"):
        path.velocity_from_noise(drawn(1), drawn(2), one_row_at_the_end)


def test_alpha_is_what_the_paths_define_and_exact_at_the_ends():
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    close(PATHS["flow"].alpha(levels), 1 - levels)
    close(PATHS["vp"].alpha(levels) ** 2 + levels**2, torch.ones(11, dtype=torch.float64))
    for path in PATHS.values():
        assert float(path.alpha(1.0)) == 0 and float(path.alpha(0.0)) == 1


def test_at_pure_noise_the_noise_is_the_sample_whatever_the_velocity():
    for path in PATHS.values():
        assert torch.equal(path.noise(drawn(1), drawn(2), 1.0), drawn(1))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_level_per_row_is_every_row_at_its_own_level(path):
    levels = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    sample, velocity = drawn(1), drawn(2)
    for convert in (path.denoised, path.noise, path.interpolate, path.velocity_from_denoised, path.velocity_from_noise):
        rows = [convert(sample[i : i + 1], velocity[i : i + 1], float(level)) for i, level in enumerate(levels)]
        close(convert(sample, velocity, levels), torch.cat(rows))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_conversions_keep_the_samples_dtype(path):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sample, velocity = drawn(1, dtype), drawn(2, dtype)
        assert path.denoised(sample, velocity, 0.5).dtype == path.noise(sample, velocity, 0.5).dtype == dtype
