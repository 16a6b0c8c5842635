"""The two noising paths and their conversions; everything about alpha and sigma is decided here.

x = alpha(sigma) x0 + sigma eps with sigma in [0, 1], 1 = noise. Conversions start from the velocity, which is defined
at both ends: at sigma = 1 on the flow path the noise is x whatever the velocity is. Coefficients are computed in
float64 and cast to the sample's dtype last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Level = float | Tensor  # a noise level: a number, a 0-dim tensor, or one per row (B,)


@dataclass(frozen=True)
class Path:
    """ "flow": alpha = 1 - sigma, velocity = eps - x0. "vp": alpha^2 + sigma^2 = 1, velocity = alpha eps - sigma x0.

    All methods take sample-shaped tensors (B, ...) and a level; they return (B, ...) in the sample's dtype.
    """

    name: str

    def alpha(self, sigma: Level) -> Tensor:
        """alpha(sigma), float64."""
        level = torch.as_tensor(sigma, dtype=torch.float64)
        return 1 - level if self.name == "flow" else ((1 - level) * (1 + level)).clamp(min=0).sqrt()

    def interpolate(self, denoised: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        """x = alpha x0 + sigma eps."""
        return _times(self.alpha(sigma), denoised) + _times(sigma, noise)

    def denoised(self, sample: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
        """x0 = x - sigma v (flow), alpha x - sigma v (vp)."""
        kept = sample if self.name == "flow" else _times(self.alpha(sigma), sample)
        return kept - _times(sigma, velocity)

    def noise(self, sample: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
        """eps = x + alpha v (flow), sigma x + alpha v (vp)."""
        kept = sample if self.name == "flow" else _times(sigma, sample)
        return kept + _times(self.alpha(sigma), velocity)

    def velocity_from_denoised(self, sample: Tensor, denoised: Tensor, sigma: Level) -> Tensor:
        """v = (x - x0) / sigma (flow), (alpha x - x0) / sigma (vp). Raises ValueError at sigma = 0."""
        if bool((torch.as_tensor(sigma) <= 0).any()):
            raise ValueError("denoised says nothing about the velocity at sigma = 0, where x0 = x.")
        kept = sample if self.name == "flow" else _times(self.alpha(sigma), sample)
        return _times(1 / torch.as_tensor(sigma, dtype=torch.float64), kept - denoised)

    def velocity_from_noise(self, sample: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        """v = (eps - x) / alpha (flow), (eps - sigma x) / alpha (vp). Raises ValueError at alpha = 0."""
        alpha = self.alpha(sigma)
        if bool((alpha <= 0).any()):
            raise ValueError(
                "an epsilon prediction is undefined at alpha = 0 (sigma = 1): the sample is pure noise and says "
                "nothing about x0. Use a v-prediction model, or a grid that starts below sigma = 1."
            )
        kept = sample if self.name == "flow" else _times(sigma, sample)
        return _times(1 / alpha, noise - kept)

    def stride(self, sigma: float, sigma_next: float) -> float:
        """What multiplies v in the deterministic step, negative: s' - s (flow), s'a - a's, an angle's sine (vp)."""
        if self.name == "flow":
            return sigma_next - sigma
        return sigma_next * float(self.alpha(sigma)) - sigma * float(self.alpha(sigma_next))


def _times(level: Level, tensor: Tensor) -> Tensor:
    """level * tensor with a level per row broadcast over the tensor's other dimensions."""
    factor = torch.as_tensor(level, dtype=torch.float64)
    if factor.ndim == 1:
        factor = factor.view(-1, *[1] * (tensor.ndim - 1))
    return factor.to(device=tensor.device, dtype=tensor.dtype) * tensor


PATHS: dict[str, Path] = {"flow": Path("flow"), "vp": Path("vp")}
