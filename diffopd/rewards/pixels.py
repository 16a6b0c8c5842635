"""Rewards of the pixels alone: how well a picture compresses, how sharp it is. They need numpy and PIL."""

from __future__ import annotations

import io
from typing import Any

import numpy as np


class JpegCompressibility:
    """Minus the size in kilobytes (1000 bytes) of each picture as a JPEG; DDPO, arXiv:2305.13301, section 5.

    quality: the JPEG's, 1 to 95. Pictures must have equal sizes to be compared.
    """

    packages: tuple[str, ...] = ()

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality = {quality} is not allowed. Give a whole number from 1 to 95.")
        self._quality = quality

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        """(B,), at most 0."""
        return -np.array([self._kilobytes(image) for image in images])

    def _kilobytes(self, image: Any) -> float:
        held = io.BytesIO()
        image.convert("RGB").save(held, format="JPEG", quality=self._quality)
        return len(held.getvalue()) / 1000


class JpegIncompressibility(JpegCompressibility):
    """The size in kilobytes of each picture as a JPEG: detail, or noise."""

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        """(B,), above 0."""
        return -super().__call__(images, prompts, metadata)


class Sharpness:
    """Share of a grey picture's variance that its Laplacian (4 neighbours) has; 0 for a flat one.

    Relative to the variance, so that contrast alone does not raise it. Noise does: watch the pictures.
    """

    packages: tuple[str, ...] = ()

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        """(B,), at least 0; white noise has 20."""
        return np.array([self._of(image) for image in images])

    def _of(self, image: Any) -> float:
        gray = np.asarray(image.convert("L"), dtype=np.float64) / 255
        inner = gray[1:-1, 1:-1]
        laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner
        variance = inner.var()
        return float(laplacian.var() / variance) if variance > 0 else 0.0
