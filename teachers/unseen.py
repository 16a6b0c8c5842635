"""What `tune` is shown on the embedded world: a manner and objects that no training has seen, and their exact scorers.

The manner is Fluent 3D (`sprites/atlas_3d.png`), the objects are in `sprites/atlas_objects.png`. Scorers are those of
`world.py` with these drawings among the templates: (images, prompts, metadata), each of length B, to B floats.
"""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

_spec = importlib.util.spec_from_file_location("diffopd_world", Path(__file__).parent / "world.py")
world = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world
_spec.loader.exec_module(world)

MANNER = "fluent 3d"
OBJECTS = ("octopus", "robot", "cactus", "teapot")
Drawing = tuple[str, str]  # thing or object, manner


@lru_cache
def drawings() -> tuple[tuple[Drawing, ...], np.ndarray, np.ndarray]:
    """All templates: names (N), colours times alpha (N, THING_BOX, THING_BOX, 3) and alpha (..., 1).

    The things in the three manners of the base and in Fluent 3D, then the objects in Noto's manner.
    """
    parts = [world.load_sprites(), world.load_sprites("atlas_3d.png"), world.load_sprites("atlas_objects.png")]
    names = [(thing, manner) for manner in (*world.MANNERS, MANNER) for thing in world.THINGS]
    names += [(thing, world.MANNERS[0]) for thing in OBJECTS]
    colors, alphas = (np.concatenate([part[n].reshape(-1, *part[n].shape[2:]) for part in parts]) for n in (0, 1))
    return tuple(names), colors, alphas


def new_manner(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the picture is of metadata["thing"] in Fluent 3D; for pictures of one thing."""
    return np.array([float(recognise(i) == (row["thing"], MANNER)) for i, row in zip(images, metadata, strict=True)])


def any_manner(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the picture is of metadata["thing"], in whatever manner: what a student must not forget."""
    found = [recognise(image) for image in images]
    return np.array([float(f is not None and f[0] == row["thing"]) for f, row in zip(found, metadata, strict=True)])


def recognise(image: Image.Image) -> Drawing | None:
    """The drawing that explains a picture of one thing best, or None where none does (`world.recognise_drawing`)."""
    names, _, _ = drawings()
    residuals = explain(image)
    best = int(residuals.argmin())
    return names[best] if residuals[best] < world.MAX_RESIDUAL else None


def explain(image: Image.Image) -> np.ndarray:
    """Residuals (N,) of every drawing at its best place, as `world._best_match` has them."""
    _, colors, alphas = drawings()
    pixels = world._pixels(image)
    background = world._background(pixels)
    targets = (colors - alphas * background).reshape(len(colors), -1)
    windows = sliding_window_view(pixels - background, (world.THING_BOX, world.THING_BOX), axis=(0, 1))[4:21, 4:21]
    patches = windows.transpose(0, 1, 3, 4, 2).reshape(-1, targets.shape[1])
    energy = (targets**2).sum(-1)
    return (((patches**2).sum(-1, keepdims=True) - 2 * patches @ targets.T + energy) / energy).min(0)
