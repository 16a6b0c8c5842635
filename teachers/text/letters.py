"""What the text teacher may be taught by: the share of a word's letters that can be read.

The card's own reward is 0 or 1, and a base that takes every other letter for its neighbour rarely earns it: by shares
more pictures of a prompt differ, and a picture with two right letters counts for more than one with none.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_spec = importlib.util.spec_from_file_location("diffopd_world", Path(__file__).parents[1] / "world.py")
world = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world
_spec.loader.exec_module(world)


def share(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """(B,) in [0, 1]: right letters over all letters of metadata["word"]; 0 where one is unreadable."""
    read = [world.read_word(image) or "" for image in images]
    return np.array([_matches(found, row["word"]) for found, row in zip(read, metadata, strict=True)])


def _matches(found: str, word: str) -> float:
    return sum(one == other for one, other in zip(found, word, strict=False)) / len(word)
