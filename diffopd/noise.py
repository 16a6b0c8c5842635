"""Randomness as a pure function of integers: it never depends on batch split, process count or resume.

Every draw re-seeds a CPU generator with a 32-bit hash (CPU generators keep 32 bits of a seed; a generator that is kept
across steps would be a stream).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def hash_of(*keys: int | str) -> int:
    """A 32-bit hash of integers and strings."""
    words = (zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys)
    packed = b"".join(int(word).to_bytes(8, "little", signed=True) for word in words)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")


def seed_for(run_seed: int, update: int, solver_step: int, sample_index: int) -> int:
    """The generator seed of one sample's draw."""
    return hash_of(run_seed, update, solver_step, sample_index)


def draw(
    shape: Sequence[int],
    *,
    run_seed: int,
    update: int,
    solver_step: int,
    sample_indices: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Standard normal noise (len(sample_indices), *shape); row i depends on sample_indices[i] alone."""
    rows = []
    for index in sample_indices:
        generator = torch.Generator().manual_seed(seed_for(run_seed, update, solver_step, index))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows).to(device=device, dtype=dtype)


def uniform(*keys: int | str) -> float:
    """One number in (0, 1), a function of its keys."""
    return (hash_of(*keys) + 0.5) / 2**32


def choose(weights: Sequence[float], *keys: int | str) -> int:
    """An index with probability proportional to its weight, a function of the keys."""
    left = uniform(*keys) * math.fsum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return len(weights) - 1


def permuted(place: int, count: int, *keys: int | str) -> int:
    """Where `place` goes in a permutation of range(count) that is a function of the keys."""
    return _permutation(count, hash_of(*keys))[place]


@lru_cache(maxsize=64)
def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
