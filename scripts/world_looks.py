"""Changed manners: random but consistent looks, on which the image path learns to take a manner from a picture.

A look changes every drawing of a group of scenes in the same way: its outline, colours, light and surface. Some groups
show an object that has no word in the base's captions. Nothing here knows Fluent 3D.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from world_models import ROOT, world
from world_sprites import CODEPOINTS, OBJECTS, fit, load_drawing

CELL = world.ATLAS_CELL
PACKAGES = (
    "emoji-datasource-google-16.0.0/package/img/google/64",
    "emoji-datasource-twitter-16.0.0/package/img/twitter/64",
)
LUMA = np.float32([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Look:
    """How a group's drawings differ from the atlas. Angles in radians, lengths in pixels of a 64-pixel cell."""

    nodes: np.ndarray | None  # (4, 4, 2) displaced corners of a 3 x 3 mesh
    flip: bool
    colors: np.ndarray  # (3, 3) colour matrix
    contrast: float
    brightness: float
    levels: int  # per channel; 0: all
    light: float  # from dark to light across a drawing
    angle: float
    tint: np.ndarray  # (3,) colour of the light
    pillow: float  # edges darker (or, below 0, lighter) than the middle
    gloss: float
    blur: float
    outline: int  # width, odd; 0: none
    ink: np.ndarray  # (3,) colour of the outline


def sample_look(rng: np.random.Generator) -> Look:
    """One random look; each kind of change is left out about half of the time, a fifth are drawn as they are."""
    is_plain = rng.random() < 0.2

    def some(share: float, value: Any, default: Any) -> Any:
        return value if rng.random() < share and not is_plain else default

    grid = np.stack(np.meshgrid(*[np.linspace(0, CELL, 4)] * 2), -1)
    return Look(
        nodes=some(0.6, grid + _displacement(rng, grid), None),
        flip=bool(some(0.15, True, False)),
        colors=some(0.65, _color_matrix(rng), np.eye(3, dtype=np.float32)),
        contrast=some(0.4, float(rng.uniform(0.6, 1.4)), 1.0),
        brightness=some(0.4, float(rng.uniform(-0.2, 0.2)), 0.0),
        levels=some(0.12, int(rng.integers(2, 5)), 0),
        light=some(0.55, float(rng.uniform(0.1, 0.6)), 0.0),
        angle=float(rng.uniform(0, 2 * np.pi)),
        tint=rng.uniform(0.2, 1.0, 3).astype(np.float32),
        pillow=some(0.45, float(rng.uniform(-0.5, 0.8)), 0.0),
        gloss=some(0.4, float(rng.uniform(0.2, 0.7)), 0.0),
        blur=some(0.3, float(rng.uniform(0.5, 2.0)), 0.0),
        outline=some(0.2, int(rng.choice([3, 5, 7])), 0),
        ink=(rng.random(3) * rng.choice([0.3, 1.0])).astype(np.float32),
    )


def _displacement(rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """(4, 4, 2): turned, stretched and bent about the middle."""
    turn, stretch = rng.normal(0, 0.15), rng.uniform(1.0, 1.25, 2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * stretch
    centred = grid - CELL / 2
    return centred @ matrix.T - centred + rng.normal(0, 2.0, grid.shape)


def _color_matrix(rng: np.random.Generator) -> np.ndarray:
    """(3, 3): hue turned about the grey axis, saturation scaled, channels sometimes swapped."""
    angle = rng.choice([rng.uniform(-0.6, 0.6), rng.uniform(-np.pi, np.pi)])
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    saturation = rng.uniform(0.1, 1.6) if rng.random() < 0.5 else 1.0
    gray = np.outer(np.ones(3), LUMA)
    matrix = saturation * turn + (1 - saturation) * gray
    return matrix[rng.permutation(3)].astype(np.float32) if rng.random() < 0.15 else matrix.astype(np.float32)


def redraw(cell: Image.Image, look: Look) -> np.ndarray:
    """A drawing (RGBA, 64 x 64) in a look: colours times alpha and alpha, (THING_BOX, THING_BOX, 4) in [0, 1]."""
    bent = cell.convert("RGBa")
    if look.nodes is not None:
        bent = bent.transform((CELL, CELL), Image.Transform.MESH, _mesh(look.nodes), Image.Resampling.BILINEAR)
    bent = bent.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if look.flip else bent
    bent = bent.filter(ImageFilter.GaussianBlur(look.blur)) if look.blur else bent
    pixels = np.asarray(bent, np.float32) / 255
    alpha = pixels[..., 3:]
    colors = _light(_recolor(pixels[..., :3] / np.maximum(alpha, 1e-3), look), alpha, look).clip(0, 1)
    drawn = np.concatenate([colors * alpha, alpha], -1)
    if look.outline:
        wide = Image.fromarray(np.uint8(255 * alpha[..., 0])).filter(ImageFilter.MaxFilter(look.outline))
        under = np.asarray(wide, np.float32)[..., None] / 255
        drawn += (1 - alpha) * under * np.concatenate([look.ink, np.ones(1, np.float32)])
    return _reduce(drawn)


def _mesh(nodes: np.ndarray) -> list[tuple[tuple[int, int, int, int], tuple[float, ...]]]:
    """PIL's mesh: each of 3 x 3 boxes and the quadrilateral that it is taken from."""
    edges = np.linspace(0, CELL, 4).round().astype(int)
    return [
        (
            (int(edges[x]), int(edges[y]), int(edges[x + 1]), int(edges[y + 1])),
            (*nodes[y, x], *nodes[y + 1, x], *nodes[y + 1, x + 1], *nodes[y, x + 1]),
        )
        for y in range(3)
        for x in range(3)
    ]


def _recolor(colors: np.ndarray, look: Look) -> np.ndarray:
    colors = (colors @ look.colors.T - 0.5) * look.contrast + 0.5 + look.brightness
    return np.round(colors.clip(0, 1) * (look.levels - 1)) / (look.levels - 1) if look.levels else colors


def _light(colors: np.ndarray, alpha: np.ndarray, look: Look) -> np.ndarray:
    """A gradient, shaded edges and a highlight, on the side where the light is."""
    y, x = np.mgrid[-1 : 1 : CELL * 1j, -1 : 1 : CELL * 1j].astype(np.float32)
    side = np.float32([np.cos(look.angle), np.sin(look.angle)])
    across = (x * side[0] + y * side[1])[..., None]
    colors = colors * (1 + look.light * across) + 0.4 * look.light * across.clip(0) * look.tint
    soft = Image.fromarray(np.uint8(255 * alpha[..., 0])).filter(ImageFilter.GaussianBlur(5))
    edge = 2 * (1 - np.asarray(soft, np.float32)[..., None] / 255).clip(0, 0.5)
    spot = np.exp(-((x - 0.35 * side[0]) ** 2 + (y - 0.35 * side[1]) ** 2) / 0.05)[..., None]
    return colors * (1 - look.pillow * edge) + look.gloss * spot


def _reduce(drawn: np.ndarray) -> np.ndarray:
    """From a cell of the atlas to a box of a picture, as `world.load_sprites` does."""
    small = Image.fromarray(np.uint8(255 * drawn.clip(0, 1)), "RGBa")
    small = small.resize((world.THING_SIZE,) * 2, Image.Resampling.LANCZOS)
    margin = (world.THING_BOX - world.THING_SIZE) // 2
    return np.pad(np.asarray(small, np.float32) / 255, ((margin, margin), (margin, margin), (0, 0)))


@lru_cache
def load_cells() -> list[list[Image.Image]]:
    """The drawings of the base's training, by manner and thing."""
    sheet = Image.open(ROOT / "teachers" / "sprites" / "atlas.png").convert("RGBA")
    return [
        [sheet.crop((x, y, x + CELL, y + CELL)) for x in range(0, sheet.width, CELL)]
        for y in range(0, sheet.height, CELL)
    ]


def plain_drawings(
    atlas: str = "atlas.png", row: int = 0, names: tuple[str, ...] = world.THINGS
) -> dict[str, np.ndarray]:
    """The drawings of one row of an atlas as they are, by name: what `render` takes."""
    drawn = np.concatenate(world.load_sprites(atlas), -1)[row]
    return dict(zip(names, drawn, strict=True))


def find_objects(folder: Path) -> list[Path]:
    """Files of drawings that have no word here: all single emoji of the packages but things and OBJECTS."""
    known = {code.removesuffix("-fe0f") for code in (*CODEPOINTS.values(), *OBJECTS.values())}
    files = [file for package in PACKAGES for file in sorted((folder / package).glob("*.png"))]
    found = [f for f in files if "-" not in (code := f.stem.removesuffix("-fe0f")) and code not in known]
    if not found:
        raise FileNotFoundError(f"no drawings in {folder}; unpack {' and '.join(PACKAGES)} there")
    return found


@dataclass(frozen=True)
class Group:
    """Scenes of one look. captions: per picture what may be said of it; the word of an object is nonsense."""

    pictures: np.ndarray  # (count, 48, 48, 3) uint8
    captions: list[list[str]]


def draw_group(count: int, rng: np.random.Generator, objects: list[Path]) -> Group:
    """`count` scenes in one random look: half of them of one thing; in a third of the groups it is a new object."""
    look, cells = sample_look(rng), load_cells()[rng.integers(len(world.MANNERS))]
    word = "".join(world.LETTERS[n] for n in rng.integers(26, size=3)).lower()
    drawn = dict(zip(world.THINGS, cells, strict=True))
    if objects and rng.random() < 0.35:
        drawn[word] = fit(load_drawing(objects[rng.integers(len(objects))]), CELL)
        scenes = [_name_object(sample_scene(rng), word, rng) for _ in range(count)]
    else:
        scenes = [sample_scene(rng) for _ in range(count)]
    shown = {scene[key] for scene in scenes for key in ("thing", "first", "second") if key in scene}
    known = {name: redraw(cell, look) for name, cell in drawn.items() if name in shown}
    pictures = np.stack([render(scene, known) for scene in scenes])
    return Group(pictures, [tell(scene, word, rng) for scene in scenes])


def sample_scene(rng: np.random.Generator) -> dict[str, Any]:
    """A training scene of drawings."""
    return world.sample_scene("style" if rng.random() < 0.55 else "composition", rng)


def _name_object(scene: dict[str, Any], word: str, rng: np.random.Generator) -> dict[str, Any]:
    """The scene with the new object in the place of one thing."""
    key = "thing" if scene["task"] == "style" else str(rng.choice(["first", "second"]))
    return scene | {key: word}


def render(scene: dict[str, Any], drawings: dict[str, np.ndarray]) -> np.ndarray:
    """The picture (48, 48, 3), uint8, of a scene with these drawings."""
    background = np.float32(world.BACKGROUNDS[scene["background"]]) / 255
    picture = np.broadcast_to(background, (world.SIZE, world.SIZE, 3)).copy()
    if scene["task"] == "composition":
        placed = list(zip((scene["first"], scene["second"]), scene["places"], strict=True))
    else:
        placed = [(scene["thing"], (scene["x"], scene["y"]))]
    for thing, (x, y) in placed:
        window = picture[y : y + world.THING_BOX, x : x + world.THING_BOX]
        window[:] = window * (1 - drawings[thing][..., 3:]) + drawings[thing][..., :3]
    return np.round(picture.clip(0, 1) * 255).astype(np.uint8)


def tell(scene: dict[str, Any], word: str, rng: np.random.Generator) -> list[str]:
    """Captions of a scene: its manner is not named, or by a word that means nothing, or by one that is not its own."""
    if scene["task"] == "composition":
        return world.captions("composition", scene)
    thing = world.with_article(scene["thing"])
    plain = [prefix + thing for prefix in world.PREFIXES]
    named = [world.captions("style", scene | {"manner": manner})[0] for manner in (word, *world.MANNERS)]
    return [*plain, named[0], named[0], *named[1:]]
