"""The two answers that a guided prediction was made of: with the prompt, and with the negative one.

What a scheduler receives is their guided sum. The denoiser's own outputs are read beside it, and believed only where
they add up to that sum: nothing is assumed about a pipeline's order, signs or packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the sum's size; half precision rounds more
HALF_ROUNDING = 2e-2


def first_tensor(output: Any) -> Any:
    """The sample in what a denoiser's forward returned (output object, tuple or tensor)."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def split(answers: Sequence[Any], guided: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """(positive, negative), each like `guided` (B, ...), with guided = negative + w (positive - negative).

    answers: the denoiser's outputs of one state, two of B rows or one of 2B. Raises ValueError where no order and
    sign of them gives that sum, or where there is one branch only.
    """
    pair = _pair(answers, len(guided))
    if pair is not None:
        sized = [_cut(answer, guided) for answer in pair]
        tolerance = ROUNDING.get(sized[0].dtype, HALF_ROUNDING) * float(guided.detach().abs().max())
        for sign in (1.0, -1.0):
            for positive, negative in (sized, sized[::-1]):
                made = sign * (negative + guidance_scale * (positive - negative))
                if made.shape == guided.shape and float((made - guided).detach().abs().max()) <= tolerance:
                    return sign * positive, sign * negative
    raise ValueError(
        "the guided prediction is not negative + guidance_scale x (positive - negative) of two answers of the network, "
        'so the two cannot be compared on their own. Guide both sides (guidance_scale above 1), or take "velocity".'
    )


def _pair(answers: Sequence[Any], rows: int) -> list[Tensor] | None:
    if len(answers) == 2 and all(isinstance(answer, Tensor) for answer in answers):
        return list(answers)
    if len(answers) == 1 and isinstance(answers[0], Tensor) and len(answers[0]) == 2 * rows:
        return list(answers[0].chunk(2))
    return None


def _cut(answer: Tensor, guided: Tensor) -> Tensor:
    """Without what is behind the sample: tokens of a reference image, channels of a learned variance."""
    return answer[:, : guided.shape[1]]
