"""Training pictures of the embedded world's tasks: (prompts, metadata, seeds) -> PIL images that show what rows say.

What a row leaves open (place, background, colour of the sign, manner of a composition) is drawn from its seed.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_spec = importlib.util.spec_from_file_location("diffopd_world", Path(__file__).parent / "world.py")
world = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world
_spec.loader.exec_module(world)


def composition(prompts: list[str], metadata: list[dict[str, Any]], seeds: list[int]) -> list[Image.Image]:
    """Two things in their relation; a row has first, relation, second."""
    return [_draw("composition", row, seed) for row, seed in zip(metadata, seeds, strict=True)]


def text(prompts: list[str], metadata: list[dict[str, Any]], seeds: list[int]) -> list[Image.Image]:
    """A word on a sign; a row has word."""
    return [_draw("text", row, seed) for row, seed in zip(metadata, seeds, strict=True)]


def style(prompts: list[str], metadata: list[dict[str, Any]], seeds: list[int]) -> list[Image.Image]:
    """A thing in a manner; a row has thing, manner."""
    return [_draw("style", row, seed) for row, seed in zip(metadata, seeds, strict=True)]


def _draw(task: str, row: dict[str, Any], seed: int) -> Image.Image:
    """The row's own words over a random scene of its task (of its relation, where it has one)."""
    rng = np.random.default_rng(seed)
    while True:
        scene = world.sample_scene(task, rng)
        if scene.get("relation") == row.get("relation"):  # places belong to the relation
            return Image.fromarray(world.render(scene | row))
