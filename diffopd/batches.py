"""Micro-batches: rows that one call of a pipeline can walk together, because their pictures have one size."""

from __future__ import annotations

from collections.abc import Sequence

from diffopd.data import PromptRow

Size = tuple[int, int]
MicroBatch = tuple[list[int], list[PromptRow]]


def micro_batches(rows: Sequence[tuple[int, PromptRow]], most: int) -> list[MicroBatch]:
    """Numbered rows in batches of one size and at most `most` rows, in order within a size.

    How rows are batched changes no gradient: rows are weighted by count.
    """
    by_size: dict[Size | None, list[tuple[int, PromptRow]]] = {}
    for number, row in rows:
        by_size.setdefault(row.bucket, []).append((number, row))
    batches = []
    for group in by_size.values():
        for start in range(0, len(group), most):
            numbers, held = zip(*group[start : start + most], strict=True)
            batches.append((list(numbers), list(held)))
    return batches
