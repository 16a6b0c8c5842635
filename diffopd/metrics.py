"""Numbers with their uncertainty: bootstrap over prompts, paired ratios, diversity of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of one score per prompt (average seeds first)."""
    values = np.asarray(scores, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(scores: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """mean(scores) / mean(reference) with its 95 % interval; prompt i is the same prompt on both sides.

    Raises ValueError for unequal lengths or a reference that scores 0.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (scores, reference))
    if len(a) != len(b):
        raise ValueError(f"a paired ratio needs the same prompts on both sides, not {len(a)} and {len(b)}.")
    if b.mean() == 0:
        raise ValueError("the reference scores 0, a ratio to it is undefined.")
    picks = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    bottoms = b[picks].mean(1)
    ratios = a[picks].mean(1)[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(a.mean() / b.mean()), float(low), float(high)


def diversity(images: Sequence[Any]) -> float:
    """Mean distance between pairs of PIL images, root mean square over 16 x 16 RGB thumbnails in [0, 1].

    0 for equal pictures. With a score it shows whether a model wins by always drawing the same.
    """
    if len(images) < 2:
        return 0.0
    thumbnails = [np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float64).ravel() / 255 for image in images]
    stack = np.stack(thumbnails)
    squares = ((stack[:, None] - stack[None]) ** 2).mean(2)
    upper = np.triu_indices(len(stack), 1)
    return float(np.sqrt(squares[upper]).mean())
