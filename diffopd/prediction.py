"""The currency: what a network says at a state (`Prediction`), and what a solver makes of it (`Transition`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffopd.path import Level, Path


@dataclass(frozen=True)
class Prediction:
    """A velocity (B, ...) at a sample (B, ...) of noise level sigma on a path; denoised and noise are derived."""

    sample: Tensor
    velocity: Tensor
    sigma: Level
    path: Path

    @property
    def denoised(self) -> Tensor:
        """x0 (B, ...)."""
        return self.path.denoised(self.sample, self.velocity, self.sigma)

    @property
    def noise(self) -> Tensor:
        """eps (B, ...)."""
        return self.path.noise(self.sample, self.velocity, self.sigma)

    @classmethod
    def from_noise(cls, sample: Tensor, noise: Tensor, sigma: Level, path: Path) -> Prediction:
        """From eps. Raises ValueError at alpha = 0, where it is undefined."""
        return cls(sample, path.velocity_from_noise(sample, noise, sigma), sigma, path)

    @classmethod
    def from_denoised(cls, sample: Tensor, denoised: Tensor, sigma: Level, path: Path) -> Prediction:
        """From x0. Raises ValueError at sigma = 0, where it is undefined."""
        return cls(sample, path.velocity_from_denoised(sample, denoised, sigma), sigma, path)

    def detach(self) -> Prediction:
        """The same without gradients."""
        return Prediction(self.sample.detach(), self.velocity.detach(), self.sigma, self.path)


@dataclass(frozen=True)
class Step:
    """A state (B, ...) and the step about to be taken: from sigma to sigma_next (0 at the last), index from 0."""

    sample: Tensor
    sigma: float
    sigma_next: float
    index: int

    @property
    def dt(self) -> float:
        """sigma_next - sigma, negative."""
        return self.sigma_next - self.sigma


LEAST_STD = 1e-5  # below it a draw is lost in the rounding of a float32 sample near 1 (DDPM's last step has 1e-10)


@dataclass(frozen=True)
class Transition:
    """N(mean, std^2) over the next sample; std is the standard deviation of THIS step, 0 for an ODE step.

    mean (B, ...); std a number >= 0.
    """

    mean: Tensor
    std: float

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std noise, for standard normal noise (B, ...)."""
        return self.mean + self.std * noise

    def log_prob(self, sample: Tensor) -> Tensor:
        """log density of a next sample (B, ...), summed over dimensions: (B,). Raises ValueError for std = 0."""
        self._need_noise("log_prob")
        squares = ((sample - self.mean) / self.std).square().flatten(1)
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return (-0.5 * squares - constant).sum(1)

    def kl(self, other: Transition) -> Tensor:
        """KL(self || other), summed over dimensions: (B,). Raises ValueError where either std is 0."""
        self._need_noise("kl")
        other._need_noise("kl")
        ratio = self.std / other.std
        squares = ((self.mean - other.mean) / other.std).square().flatten(1)
        return (0.5 * squares + (0.5 * (ratio**2 - 1) - math.log(ratio))).sum(1)

    def _need_noise(self, what: str) -> None:
        if self.std <= 0:
            raise ValueError(f"{what} needs a step with noise; this one has std = 0 and its density is a point.")


@dataclass(frozen=True)
class Proposal:
    """What one side says at a state: its prediction and the transition it would make of it.

    For a teacher that integrates several substeps the prediction is implied by its landing. branches: the answers
    with the prompt and with the negative one, for an objective that asks for them.
    """

    prediction: Prediction
    transition: Transition
    branches: tuple[Prediction, Prediction] | None = None
