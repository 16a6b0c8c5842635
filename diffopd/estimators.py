"""Estimators: what pulls a model towards reward, or towards pictures, at one state of a batch.

Pure functions of what the trained model and its past or base selves say at the same state; each returns one loss
per row (B,), means over a picture's dimensions, so that a loss does not grow with the picture. Only the trained
model's side carries a gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffopd.objective import mean_square
from diffopd.prediction import Prediction, Transition

STD_FLOOR = 1e-4  # Flow-GRPO's: a group of equal rewards has advantage 0, not 0 / 0
WEIGHT_FLOOR = 1e-5  # DiffusionNFT's: the limit of an exact prediction, where the squared error vanishes faster


def advantages(rewards: Tensor, groups: Sequence[Hashable], *, std: str = "prompt", clip: float = 5.0) -> Tensor:
    """How much better a picture is than others of its prompt: (r - mean) / (std + 1e-4), in [-clip, clip]; (B,).

    The advantage of Flow-GRPO, Eq. (4) of arXiv:2505.05470. rewards (B,); rows of one group are pictures of one
    prompt. The mean is always the group's; std "prompt" is the group's too, "batch" that of all rewards (the released
    code's global_std): a prompt whose pictures hardly differ then hardly counts. Both are population deviations.

    Raises ValueError for another `std`, lengths that differ, or rewards that are not finite.
    """
    if std not in ("prompt", "batch"):
        raise ValueError(f'std = {std!r} is not allowed. Give "prompt" or "batch".')
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards for {len(groups)} pictures.")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"rewards must be finite numbers, not {rewards.tolist()}.")
    rewards = rewards.double()
    result = torch.empty_like(rewards)
    for group in dict.fromkeys(groups):
        rows = torch.tensor([place for place, other in enumerate(groups) if other == group])
        own = rewards[rows]
        spread = own.std(correction=0) if std == "prompt" else rewards.std(correction=0)
        result[rows] = (own - own.mean()) / (spread + STD_FLOOR)
    return result.clamp(-clip, clip).float()


def optimality(advantage: Tensor, *, clip: float = 5.0) -> Tensor:
    """DiffusionNFT's r = 1/2 + 1/2 clip(A / clip, -1, 1): how surely a picture belongs to the good ones; (B,)."""
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def nft(said: Prediction, old: Prediction, denoised: Tensor, good: Tensor, *, beta: float = 1.0) -> Tensor:
    """DiffusionNFT's loss, Eq. (5) of arXiv:2509.16117 with its self-normalised x0 regression; (B,).

    v+ = b v + (1 - b) v_old, v- = (1 + b) v_old - b v;
    loss = [r |x0(v+) - x0|^2 / w+ + (1 - r) |x0(v-) - x0|^2 / w-] / b, with w = sg mean |x0(v) - x0|.
    denoised (B, ...): the final picture x0 that the state was noised from; good (B,): `optimality`. x0(v) is linear
    in v on every path, so the loss is defined on variance-preserving models as well as on flow (the paper's).
    The released code multiplies it by the clip of the advantages (5); we do not: AdamW does not see the factor,
    `max_grad_norm` and the weight of the KL do.
    """
    positive = beta * said.velocity + (1 - beta) * old.velocity.detach()
    negative = (1 + beta) * old.velocity.detach() - beta * said.velocity
    toward, away = (_normalised_error(said, velocity, denoised) for velocity in (positive, negative))
    return (good * toward + (1 - good) * away) / beta


def _normalised_error(said: Prediction, velocity: Tensor, denoised: Tensor) -> Tensor:
    difference = Prediction(said.sample, velocity, said.sigma, said.path).denoised - denoised
    weight = difference.detach().abs().flatten(1).mean(1).clamp(min=WEIGHT_FLOOR)
    return difference.square().flatten(1).mean(1) / weight


def matching(answer: Tensor, wanted: Tensor) -> Tensor:
    """|answer - wanted|^2 (B,): the loss of the base itself, both (B, ...) in its own terms (noise or velocity)."""
    return mean_square(answer - wanted.detach())


def velocity_distance(said: Prediction, base: Prediction) -> Tensor:
    """|v - v_base|^2, what holds DiffusionNFT near the base; (B,)."""
    return mean_square(said.velocity - base.velocity.detach())


def kl_to_base(said: Transition, base: Transition, *, log_prob: str = "mean", dt: float = 1.0) -> Tensor:
    """KL of the step to the base's, |mean - mean_base|^2 / (2 std^2), times |dt|; (B,).

    log_prob: as in `grpo`, so that the KL is over the same dimensions as the ratio that it stands beside. With dt = 1
    it is the exact KL; with the step's own dt it is that of the released Flow-GRPO, which divides by the square of its
    diffusion coefficient, std / sqrt|dt|. Raises ValueError for a step without noise.
    """
    return said.kl(Transition(base.mean.detach(), base.std)) * abs(dt) / _dimensions(said.mean, log_prob)


@dataclass(frozen=True)
class PolicyLoss:
    """loss (B,); ratio (B,), detached; clipped: the share of rows whose ratio was out of bounds."""

    loss: Tensor
    ratio: Tensor
    clipped: float


def grpo(
    said: Transition, old: Transition, sample: Tensor, advantage: Tensor, *, clip: float = 1e-4, log_prob: str = "mean"
) -> PolicyLoss:
    """Flow-GRPO, Eq. (5) of arXiv:2505.05470: max(-A rho, -A clip(rho, 1 - e, 1 + e)), rho = p(x') / p_old(x').

    said, old: the same step under the trained weights and under those that sampled; sample (B, ...): the next state
    x' that was drawn. log_prob "mean" divides log densities by the number of dimensions, as released (hence the
    tiny clip range); "sum" is the paper's density. Raises ValueError for a step without noise.
    """
    return _clipped(_log_ratio(said, old, sample, log_prob), advantage, clip)


def grpo_guard(
    said: Transition,
    old: Transition,
    sample: Tensor,
    advantage: Tensor,
    *,
    stride: float,
    clip: float = 1e-4,
    log_prob: str = "mean",
) -> PolicyLoss:
    """GRPO-Guard, Eq. (8) of arXiv:2510.22319: rho = exp[(log p - log p_old + |mean - mean_old|^2 / 2 s^2) s].

    s is the std of the step. The correction removes the ratio's bias below 1, the factor s makes its spread that of
    the mean's move at every noise level, and the loss is divided by |dt|, so that every step moves the velocity alike.
    stride: `Path.stride` of the step, which on flow is dt. (On variance-preserving models the difference of sigmas
    would not do: it vanishes near sigma = 1, where the first step would count ten times the others.) log_prob as in
    `grpo`; the correction is taken over the same dimensions. Raises ValueError for a step without noise.
    """
    size = _dimensions(said.mean, log_prob)
    bias = (said.mean - old.mean.detach()).square().flatten(1).sum(1) / (2 * said.std**2 * size)
    plain = _clipped((_log_ratio(said, old, sample, log_prob) + bias) * said.std, advantage, clip)
    return PolicyLoss(plain.loss / abs(stride), plain.ratio, plain.clipped)


def _log_ratio(said: Transition, old: Transition, sample: Tensor, log_prob: str) -> Tensor:
    with torch.no_grad():
        before = old.log_prob(sample)
    return (said.log_prob(sample) - before) / _dimensions(sample, log_prob)


def _dimensions(of: Tensor, log_prob: str) -> int:
    """What densities are divided by: the dimensions of a row for "mean", 1 for "sum"."""
    if log_prob not in ("mean", "sum"):
        raise ValueError(f'log_prob = {log_prob!r} is not allowed. Give "mean" or "sum".')
    return of[0].numel() if log_prob == "mean" else 1


def _clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> PolicyLoss:
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    return PolicyLoss(loss, ratio.detach(), float((ratio != bounded).float().mean()))
