"""What `tune` is shown on the embedded world: a manner and objects that no training has seen, and their exact scorers.

The manner is Fluent 3D (`sprites/atlas_3d.png`), the objects are in `sprites/atlas_objects.png`. Scorers are those of
`world.py` with these drawings among the templates: (images, prompts, metadata), each of length B, to B floats.
"""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

_spec = importlib.util.spec_from_file_location("diffopd_world", Path(__file__).parent / "world.py")
world = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world
_spec.loader.exec_module(world)

MANNER = "fluent 3d"
MAX_OBJECT_RESIDUAL = 0.12  # of a new object, which is the only one of its colours: a blob of them leaves .2
CLOSE = 0.12  # residual of a drawing that is also close: the autoencoder leaves .02 to .06, a blur of 1.5 pixels .13
ANYWHERE = range(4, 21)  # corners of a drawing across the direction in which two stand beside each other
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


def close_manner(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """As `new_manner`, but at most CLOSE of the drawing may be unexplained, where there it may be .3."""
    found = [best_match(image, ANYWHERE, ANYWHERE) for image in images]
    wanted = [(row["thing"], MANNER) for row in metadata]
    return np.array([float(f.drawing == w and f.residual < CLOSE) for f, w in zip(found, wanted, strict=True)])


def any_manner(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the picture is of metadata["thing"], in whatever manner: what a student must not forget."""
    found = [recognise(image) for image in images]
    return np.array([float(f is not None and f[0] == row["thing"]) for f, row in zip(found, metadata, strict=True)])


def scene(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the picture shows what the row says, in whatever manner: a thing, or two in their relation and alone.

    An object must be explained to MAX_OBJECT_RESIDUAL.
    """
    return np.array([score_scene(image, row) for image, row in zip(images, metadata, strict=True)])


def score_scene(image: Image.Image, row: dict[str, Any]) -> float:
    """`world.composition` with the unseen drawings among the templates; without a relation one thing, anywhere."""
    if "relation" not in row:
        return float(is_shown(row["thing"], best_match(image, ANYWHERE, ANYWHERE)))
    first, relation, second = world.canonical(row["first"], row["relation"], row["second"])
    pixels = world._pixels(image)
    stray = np.abs(pixels - world._background(pixels)).max(-1) > 0.19
    for thing, along in ((first, range(0, 5)), (second, range(20, 25))):
        xs, ys = (ANYWHERE, along) if relation == "above" else (along, ANYWHERE)
        found = best_match(image, xs, ys)
        if not is_shown(thing, found):
            return 0.0
        x, y = found.corner
        stray[y : y + world.THING_BOX, x : x + world.THING_BOX] = False
    return float(stray.sum() <= world.MAX_STRAY)


def recognise(image: Image.Image) -> Drawing | None:
    """The drawing that explains a picture of one thing best, or None where none does (`world.recognise_drawing`)."""
    found = best_match(image, ANYWHERE, ANYWHERE)
    return found.drawing if found.residual < world.MAX_RESIDUAL else None


class Match(NamedTuple):
    """What explains a box of a picture best."""

    drawing: Drawing
    corner: tuple[int, int]  # x, y
    residual: float


def is_shown(thing: str, found: Match) -> bool:
    """Whether that is the thing, in any manner, well enough explained."""
    limit = MAX_OBJECT_RESIDUAL if thing in OBJECTS else world.MAX_RESIDUAL
    return found.drawing[0] == thing and found.residual < limit


def best_match(image: Image.Image, xs: range, ys: range) -> Match:
    """The drawing that explains a box of the picture with its corner in xs and ys best."""
    names, _, _ = drawings()
    residuals = explain(image, xs, ys)
    place, best = np.unravel_index(residuals.argmin(), residuals.shape)
    corner = xs[int(place) % len(xs)], ys[int(place) // len(xs)]
    return Match(names[best], corner, float(residuals[place, best]))


def explain(image: Image.Image, xs: range, ys: range) -> np.ndarray:
    """Residuals (places, N) of every drawing, with its corner in xs and ys, as `world._best_match` has them."""
    _, colors, alphas = drawings()
    pixels = world._pixels(image)
    background = world._background(pixels)
    targets = (colors - alphas * background).reshape(len(colors), -1)
    windows = sliding_window_view(pixels - background, (world.THING_BOX, world.THING_BOX), axis=(0, 1))
    windows = windows[ys.start : ys.stop, xs.start : xs.stop]
    patches = windows.transpose(0, 1, 3, 4, 2).reshape(-1, targets.shape[1])
    energy = (targets**2).sum(-1)
    return ((patches**2).sum(-1, keepdims=True) - 2 * patches @ targets.T + energy) / energy
