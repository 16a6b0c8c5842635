"""How near drawn pictures are to a set of pictures, in [0, 1]; no weights, so it is also a reward of its own.

Copied beside the prompts of a task it needs nothing but PIL and numpy: the pictures are those of prompts/train.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16  # thumbnails: colours and their places, not texture


def thumbnail(image: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) values in [0, 1] of a PIL image."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255


def distance(image: Image.Image, other: Image.Image) -> float:
    """Root mean square between the thumbnails of two PIL images, in [0, 1]."""
    return float(np.sqrt(((thumbnail(image) - thumbnail(other)) ** 2).mean()))


def closeness(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 less the distance of each image to the nearest picture of the set."""
    lines = (Path(__file__).parent / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = []
    for line in lines:
        with Image.open(json.loads(line)["file_name"]) as picture:
            pictures.append(picture.convert("RGB"))
    return [1.0 - min(distance(image, picture) for picture in pictures) for image in images]
