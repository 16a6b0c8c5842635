"""How near drawn pictures are to a set of pictures, in [0, 1]; no weights, so it is also a reward of its own.

Copied beside the prompts of a task it speaks of the pictures of prompts/train.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffopd.image_file import picture

SIDE = 16  # thumbnails: colours and their places, not texture


def thumbnail(image: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) values in [0, 1] of a PIL image."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255


def distance(image: Image.Image, other: Image.Image) -> float:
    """Root mean square between the thumbnails of two PIL images, in [0, 1]."""
    return nearest([image], np.stack([thumbnail(other)]))[0]


def nearest(images: Sequence[Image.Image], thumbnails: np.ndarray) -> list[float]:
    """The distance of each PIL image to the nearest of N thumbnails (N, SIDE, SIDE, 3)."""
    return [float(np.sqrt(((thumbnail(image) - thumbnails) ** 2).mean((1, 2, 3)).min())) for image in images]


def closeness(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 less the distance of each image to the nearest picture of the set, cut to the image's shape as in training."""
    return [1.0 - nearest([image], _thumbnails(image.size))[0] for image in images]


@lru_cache
def _thumbnails(size: tuple[int, int]) -> np.ndarray:
    lines = (Path(__file__).parent / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return np.stack([thumbnail(picture(json.loads(line)["file_name"], size)) for line in lines])
