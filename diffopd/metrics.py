"""Numbers with their uncertainty: clustered bootstrap, paired ratios, diversity of pictures."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
OUTSIDE = 0.025  # on each side of an interval
Scores = Sequence[float] | np.ndarray


def bootstrap_interval(
    scores: Scores,
    *,
    groups: Sequence[Hashable] | None = None,
    shares: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """95 % percentile interval of the mean score, by the randomised cluster bootstrap (Field and Welsh 2007).

    scores: (prompts,), seeds averaged first, or (trainings, prompts); several trainings are drawn, too.
    groups: one value per prompt, equal for prompts that ask for the same (`data.asked_of`). They are drawn together,
    for their scores depend on each other. None, or one group for all: each prompt is its own.
    shares: scores are from 0 to 1, and where all are 0, or all 1, of which a bootstrap draws nothing else, the other
    bound is that of Clopper and Pearson (1934) for as many trials as groups.

    Raises ValueError for another number of groups than of prompts.
    """
    rows = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    drawn = _draws(rows.shape, groups, seed, resamples)
    if shares and rows.min() == rows.max() and rows.flat[0] in (0, 1):
        reach = OUTSIDE ** (1 / drawn[1].shape[1])
        return (reach, 1.0) if rows.flat[0] else (0.0, 1 - reach)
    return _interval(_sums(rows, *drawn) / _sums(np.ones((1, rows.shape[1])), *drawn))


def ratio_interval(
    scores: Scores,
    reference: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """mean(scores) / mean(reference) with its 95 % interval; prompt i is the same prompt on both sides.

    scores, groups: as `bootstrap_interval` has them; reference: (prompts,). A draw whose reference is 0 or less is left
    out.

    Raises ValueError for unequal lengths or a reference that scores 0 or less: a share of that says nothing.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (scores, reference))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a paired ratio needs the same prompts on both sides, not {a.shape[1]} and {b.shape[1]}.")
    if b.mean() <= 0:
        raise ValueError(f"the reference scores {b.mean():g}; a ratio is to a score above 0.")
    drawn = _draws(a.shape, groups, seed, resamples)
    tops, bottoms = _sums(a, *drawn), _sums(b, *drawn)
    return float(a.mean() / b.mean()), *_interval(tops[bottoms > 0] / bottoms[bottoms > 0])


def _draws(
    shape: tuple[int, int], groups: Sequence[Hashable] | None, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of each prompt's group (prompts,), groups drawn (resamples, groups), trainings drawn (resamples, .)."""
    trainings, prompts = shape
    if groups is not None and len(groups) != prompts:
        raise ValueError(f"{prompts} prompts have {len(groups)} groups; give one for each.")
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(group, len(numbers)) for group in (() if groups is None else groups)])
    if len(numbers) < 2:
        member = np.arange(prompts)
    count, rng = int(member.max()) + 1, np.random.default_rng(seed)
    drawn = [(rng.integers(count, size=count), rng.integers(trainings, size=trainings)) for _ in range(resamples)]
    picks, runs = (np.stack(part) for part in zip(*drawn, strict=True))
    return member, picks, runs


def _sums(rows: np.ndarray, member: np.ndarray, picks: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Sum over the prompts of each draw's groups, mean over its trainings: (resamples,) of (trainings, prompts)."""
    held = np.stack([np.bincount(member, weights=row) for row in rows])
    if len(held) == 1:
        return held[0][picks].sum(1)
    return held[runs[:, :, None], picks[:, None, :]].sum((1, 2)) / len(held)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (OUTSIDE, 1 - OUTSIDE))
    return float(low), float(high)


def diversity(images: Sequence[Any]) -> float:
    """Mean distance between pairs of PIL images, root mean square over 16 x 16 RGB thumbnails in [0, 1].

    0 for equal pictures. With a score it shows whether a model wins by always drawing the same.
    """
    if len(images) < 2:
        return 0.0
    thumbnails = [np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float64).ravel() / 255 for image in images]
    stack = np.stack(thumbnails)
    pairs = [np.sqrt(((stack[place + 1 :] - one) ** 2).mean(1)) for place, one in enumerate(stack[:-1])]
    return float(np.concatenate(pairs).mean())
