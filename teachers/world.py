"""The embedded world: scenes made of real emoji drawings, their captions, and an exact scorer for each task.

A picture is 48 x 48 RGB. The three tasks are
    composition  "an apple left of a rocket"        two different things of one manner
    text         "a sign that says KEA"             three capital letters on a board
    style        "a rocket in twemoji style"        one thing
Drawings sit on a grid of four pixels, one latent of the base model's autoencoder. Needs numpy and PIL only.

A scorer takes (images, prompts, metadata), each of length B, and returns B floats, 1.0 for a picture
that shows exactly what its metadata row says and 0.0 otherwise. Scorers know the drawings: they explain
each picture by the best fitting one and reject what no drawing explains.
"""

from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw

SIZE = 48
THINGS = (
    "apple",
    "rocket",
    "cat",
    "fish",
    "tree",
    "car",
    "house",
    "star",
    "umbrella",
    "mushroom",
    "penguin",
    "frog",
)
MANNERS = ("noto", "twemoji", "fluent")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("composition", "text", "style")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BACKGROUNDS = ((252, 241, 224), (222, 238, 250), (226, 243, 224), (247, 226, 234), (236, 229, 248))
SIGN_COLORS = ((38, 120, 72), (36, 84, 160), (190, 48, 52))
LETTER_COLOR = (255, 255, 255)

THING_SIZE, THING_BOX = 22, 24  # longer side of a drawing and the square it stands in
CELL_WIDTH, CELL_HEIGHT = 12, 16  # one letter with its margin
FIRST_CELL = 6  # left edge of the first letter's cell
ATLAS_CELL = 64

PREFIXES = ("", "a picture of ", "a drawing of ", "an icon of ")
RELATION_FORMS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "just above", "right above"),
    "below": ("below", "just below", "right below"),
}
TEXT_FORMS = ("a sign that says {word}", "a sign that reads {word}")
STYLE_FORMS = (
    "{thing} in {manner} style",
    "{thing} in the {manner} style",
    "{thing} in the style of {manner}",
    "{thing} drawn in {manner} style",
    "{thing} as {manner}",
)
# Pairs of thing and manner that no style caption of any training names (prompts/unseen.jsonl asks for them).
UNSEEN_PAIRS = (("cat", "fluent"), ("car", "twemoji"), ("mushroom", "noto"), ("house", "fluent"))

MAX_RESIDUAL = 0.30  # share of a drawing's energy that the picture may leave unexplained
MAX_STRAY = 24  # pixels of foreground that belong to nothing
MIN_CORRELATION = 0.75  # below it a letter is unreadable
MIN_MARGIN = 0.03  # between the best and the second best letter
MIN_CONTRAST = 0.08  # standard deviation of a letter's cell

# 5 x 7 capitals, one number a row, most significant bit left.
# fmt: off
FONT = {
    "A": (14, 17, 17, 31, 17, 17, 17), "B": (30, 17, 17, 30, 17, 17, 30), "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (28, 18, 17, 17, 17, 18, 28), "E": (31, 16, 16, 30, 16, 16, 31), "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14), "H": (17, 17, 17, 31, 17, 17, 17), "I": (31, 4, 4, 4, 4, 4, 31),
    "J": (7, 2, 2, 2, 2, 18, 12), "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 25, 21, 19, 19, 17), "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16), "Q": (14, 17, 17, 17, 21, 18, 13), "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30), "T": (31, 4, 4, 4, 4, 4, 4), "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 10, 10, 10, 4), "W": (17, 17, 17, 21, 21, 27, 17), "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4), "Z": (31, 1, 2, 4, 8, 16, 31),
}
# fmt: on


# Drawings.


@lru_cache
def load_sprites(atlas: str = "atlas.png") -> tuple[np.ndarray, np.ndarray]:
    """Colours times alpha (manners, things, THING_BOX, THING_BOX, 3) and alpha (..., 1), both in [0, 1]."""
    sheet = Image.open(Path(__file__).parent / "sprites" / atlas).convert("RGBa")
    rows, columns = sheet.height // ATLAS_CELL, sheet.width // ATLAS_CELL
    margin = (THING_BOX - THING_SIZE) // 2
    inner = slice(margin, margin + THING_SIZE)
    sprites = np.zeros((rows, columns, THING_BOX, THING_BOX, 4), np.float32)
    for row in range(rows):
        for column in range(columns):
            corner = (column * ATLAS_CELL, row * ATLAS_CELL)
            cell = sheet.crop((*corner, corner[0] + ATLAS_CELL, corner[1] + ATLAS_CELL))
            small = cell.resize((THING_SIZE, THING_SIZE), Image.Resampling.LANCZOS)
            sprites[row, column, inner, inner] = np.asarray(small, np.float32) / 255
    return sprites[..., :3], sprites[..., 3:]


@lru_cache
def load_letters() -> np.ndarray:
    """Masks (26, CELL_HEIGHT, CELL_WIDTH): letters of 10 x 14 pixels, smoothed, in the middle of a cell."""
    masks = np.zeros((len(LETTERS), CELL_HEIGHT, CELL_WIDTH), np.float32)
    for index, letter in enumerate(LETTERS):
        bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in FONT[letter]], np.uint8)
        masks[index, 1:-1, 1:-1] = _double(bits)
    return masks


def _double(bits: np.ndarray) -> np.ndarray:
    """Twice as large with half-filled corners where a diagonal passes (the Scale2x rule)."""
    padded = np.pad(bits, 1)
    up, down, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    large = np.zeros((2 * bits.shape[0], 2 * bits.shape[1]), np.float32)
    corners = ((0, 0, up, left), (0, 1, up, right), (1, 0, down, left), (1, 1, down, right))
    for row, column, vertical, horizontal in corners:
        is_diagonal = (vertical == horizontal) & (up != down) & (left != right)
        large[row::2, column::2] = np.where(is_diagonal, 0.5 * bits + 0.5 * vertical, bits)
    return large


@lru_cache
def draw_board(color: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An empty sign on its post, cells at y = 4: colours times alpha (48, 48, 3) and alpha (48, 48, 1)."""
    scale = 4
    canvas = Image.new("RGBA", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(canvas)
    post, edge = (150, 106, 66, 255), (*LETTER_COLOR, 255)
    draw.rectangle((22 * scale, 20 * scale, 26 * scale - 1, SIZE * scale), fill=post)
    draw.rounded_rectangle((2 * scale, 0, 46 * scale - 1, 24 * scale - 1), 4 * scale, fill=(*color, 255))
    frame = (3 * scale, scale, 45 * scale - 1, 23 * scale - 1)
    draw.rounded_rectangle(frame, 3 * scale, outline=edge, width=scale)
    board = canvas.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(board, np.float32) / 255
    return pixels[..., :3], pixels[..., 3:]


# Scenes: what is drawn where, and what is said about it.


def is_held_out(*key: str) -> bool:
    """Whether a combination belongs to the fifth that no training ever shows (a stable hash of its parts)."""
    return blake2b("|".join(key).encode(), digest_size=4).digest()[0] % 5 == 0


def canonical(first: str, relation: str, second: str) -> tuple[str, str, str]:
    """The same scene said with "left of" or "above"."""
    opposite = {"right of": "left of", "below": "above"}
    return (second, opposite[relation], first) if relation in opposite else (first, relation, second)


def is_scene_held_out(task: str, scene: dict[str, Any]) -> bool:
    """Composition: the two things and where they are; text: the word; style: the pair of thing and manner."""
    if task == "composition":
        return is_held_out(*canonical(scene["first"], scene["relation"], scene["second"]))
    if task == "text":
        return is_held_out(scene["word"])
    return (scene["thing"], scene["manner"]) in UNSEEN_PAIRS


def sample_scene(task: str, rng: np.random.Generator, *, held_out: bool = False) -> dict[str, Any]:
    """One random scene of a task, from the held-out combinations or from all the others."""
    while True:
        scene = {"task": task, "background": int(rng.integers(len(BACKGROUNDS)))}
        if task == "composition":
            first, second = rng.choice(len(THINGS), 2, replace=False)
            scene |= {
                "first": THINGS[first],
                "relation": str(rng.choice(RELATIONS)),
                "second": THINGS[second],
            }
            scene |= {"manner": str(rng.choice(MANNERS)), "places": _sample_places(scene["relation"], rng)}
        elif task == "text":
            word = "".join(LETTERS[index] for index in rng.integers(len(LETTERS), size=3))
            scene |= {"word": word, "sign": int(rng.integers(len(SIGN_COLORS))), "y": 12}
        else:
            scene |= {"thing": str(rng.choice(THINGS)), "manner": str(rng.choice(MANNERS))}
            x, y = (int(place) for place in rng.choice([8, 12, 16], 2))
            scene |= {"x": x, "y": y}
        if is_scene_held_out(task, scene) == held_out:
            return scene


def _sample_places(relation: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Corners (x, y) of the two boxes on the grid of four pixels; the first thing's box comes first."""
    near, far = 0, SIZE - THING_BOX
    across = [int(place) for place in rng.choice([8, 12, 16], 2)]
    if relation in ("left of", "right of"):
        places = [(near, across[0]), (far, across[1])]
    else:
        places = [(across[0], near), (across[1], far)]
    return places if relation in ("left of", "above") else places[::-1]


def render(scene: dict[str, Any]) -> np.ndarray:
    """The picture (48, 48, 3), uint8, of a scene."""
    picture = np.broadcast_to(np.float32(BACKGROUNDS[scene["background"]]) / 255, (SIZE, SIZE, 3)).copy()
    if scene["task"] == "composition":
        for thing, (x, y) in zip((scene["first"], scene["second"]), scene["places"], strict=True):
            _paste(picture, thing, scene["manner"], x, y)
    elif scene["task"] == "text":
        _paste_sign(picture, scene)
    else:
        _paste(picture, scene["thing"], scene["manner"], scene["x"], scene["y"])
    return np.round(picture.clip(0, 1) * 255).astype(np.uint8)


def _paste(picture: np.ndarray, thing: str, manner: str, x: int, y: int) -> None:
    colors, alphas = load_sprites()
    index = MANNERS.index(manner), THINGS.index(thing)
    window = picture[y : y + THING_BOX, x : x + THING_BOX]
    window[:] = window * (1 - alphas[index]) + colors[index]


def _paste_sign(picture: np.ndarray, scene: dict[str, Any]) -> None:
    colors, alphas = draw_board(SIGN_COLORS[scene["sign"]])
    top = scene["y"] - 4
    picture[top:] = picture[top:] * (1 - alphas[: SIZE - top]) + colors[: SIZE - top]
    for place, letter in enumerate(scene["word"]):
        mask = load_letters()[LETTERS.index(letter)][..., None]
        x = FIRST_CELL + CELL_WIDTH * place
        cell = picture[scene["y"] : scene["y"] + CELL_HEIGHT, x : x + CELL_WIDTH]
        cell[:] = cell * (1 - mask) + np.float32(LETTER_COLOR) / 255 * mask


def with_article(thing: str) -> str:
    """`apple` becomes `an apple`."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def captions(task: str, scene: dict[str, Any]) -> list[str]:
    """Every way in which a scene may be described, the plainest first."""
    if task == "text":
        return [form.format(word=scene["word"]) for form in TEXT_FORMS]
    if task == "style":
        thing = with_article(scene["thing"])
        said = [form.format(thing=thing, manner=scene["manner"]) for form in STYLE_FORMS]
        return [prefix + text for text in said for prefix in PREFIXES]
    first, second = with_article(scene["first"]), with_article(scene["second"])
    return [f"{prefix}{first} {form} {second}" for form in RELATION_FORMS[scene["relation"]] for prefix in PREFIXES]


def training_captions(task: str, scene: dict[str, Any]) -> list[str]:
    """The captions that trainings may use: for style a fifth of the wordings of each pair is held out."""
    every = captions(task, scene)
    return [text for text in every if not is_held_out(text)] or every[:1] if task == "style" else every


def describe(task: str, scene: dict[str, Any]) -> dict[str, str]:
    """The part of a scene that its scorer needs: a metadata row."""
    keys = {"composition": ("first", "relation", "second"), "text": ("word",), "style": ("thing", "manner")}[task]
    return {key: scene[key] for key in keys}


# Scorers.


def composition(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where both things stand in their relation and alone; metadata: first, relation, second."""
    pairs = zip(images, metadata, strict=True)
    return np.array([_score_composition(_pixels(image), row) for image, row in pairs])


def text(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the word read back from the sign equals metadata["word"]."""
    pairs = zip(images, metadata, strict=True)
    return np.array([float(read_word(image) == row["word"]) for image, row in pairs])


def style(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """1.0 where the drawing is recognised as metadata["thing"] in metadata["manner"]."""
    pairs = zip(images, metadata, strict=True)
    return np.array([float(recognise_drawing(image) == (row["thing"], row["manner"])) for image, row in pairs])


SCORERS = {"composition": composition, "text": text, "style": style}


def read_word(image: Image.Image) -> str | None:
    """The three letters on a sign, or None where one is unreadable."""
    gray = _pixels(image).mean(-1)
    tops, lefts = range(4, 23), range(FIRST_CELL - 3, FIRST_CELL + 4)
    windows = sliding_window_view(gray, (CELL_HEIGHT, CELL_WIDTH))
    columns = np.array(lefts)[:, None] + CELL_WIDTH * np.arange(3)
    cells = windows[tops.start : tops.stop][:, columns].reshape(-1, 3, CELL_HEIGHT * CELL_WIDTH)
    cells = cells - cells.mean(-1, keepdims=True)
    contrast = cells.std(-1)
    templates = load_letters().reshape(len(LETTERS), -1)
    templates = templates - templates.mean(-1, keepdims=True)
    templates /= np.linalg.norm(templates, axis=-1, keepdims=True)
    correlation = cells @ templates.T / np.maximum(np.linalg.norm(cells, axis=-1), 1e-6)[..., None]
    signed = np.stack([correlation, -correlation])  # light letters on a dark board, and dark on light
    polarity, place = np.unravel_index(signed.max(-1).sum(-1).argmax(), signed.shape[:2])
    ranked = np.sort(signed[polarity, place], axis=-1)
    is_readable = (ranked[:, -1] > MIN_CORRELATION) & (ranked[:, -1] - ranked[:, -2] > MIN_MARGIN)
    if not (is_readable & (contrast[place] > MIN_CONTRAST)).all():
        return None
    return "".join(LETTERS[index] for index in signed[polarity, place].argmax(-1))


def recognise_drawing(image: Image.Image) -> tuple[str, str] | None:
    """The (thing, manner) of a picture of one large drawing, or None where no drawing explains it."""
    pixels = _pixels(image)
    manner, thing, _, residual = _best_match(pixels, _background(pixels), range(4, 21), range(4, 21))
    return (THINGS[thing], MANNERS[manner]) if residual < MAX_RESIDUAL else None


def _score_composition(pixels: np.ndarray, row: dict[str, Any]) -> float:
    first, relation, second = canonical(row["first"], row["relation"], row["second"])
    if relation == "above":
        return _score_pair(pixels, first, second, is_vertical=True)
    return _score_pair(pixels, first, second, is_vertical=False)


def _score_pair(pixels: np.ndarray, first: str, second: str, *, is_vertical: bool) -> float:
    background = _background(pixels)
    stray = np.abs(pixels - background).max(-1) > 0.19
    for thing, along in ((first, range(0, 5)), (second, range(20, 25))):
        xs, ys = (range(4, 21), along) if is_vertical else (along, range(4, 21))
        _, found, (x, y), residual = _best_match(pixels, background, xs, ys)
        if THINGS[found] != thing or residual >= MAX_RESIDUAL:
            return 0.0
        stray[y : y + THING_BOX, x : x + THING_BOX] = False
    return float(stray.sum() <= MAX_STRAY)


def _best_match(
    pixels: np.ndarray, background: np.ndarray, xs: range, ys: range
) -> tuple[int, int, tuple[int, int], float]:
    """(manner, thing, (x, y), residual) of the drawing that explains a box of the picture best.

    With p the picture and t the drawing on the estimated background, both less that background, the residual
    is |p - t|^2 / |t|^2: 0 for the drawing itself, 1 for an empty box.
    """
    colors, alphas = load_sprites()
    targets = (colors - alphas * background).reshape(len(MANNERS) * len(THINGS), -1)
    energy = (targets**2).sum(-1)
    difference = pixels - background
    windows = sliding_window_view(difference, (THING_BOX, THING_BOX), axis=(0, 1))
    windows = windows[ys.start : ys.stop, xs.start : xs.stop]
    patches = windows.transpose(0, 1, 3, 4, 2).reshape(len(ys) * len(xs), -1)
    errors = (patches**2).sum(-1, keepdims=True) - 2 * patches @ targets.T + energy
    residuals = errors / energy
    place, drawing = np.unravel_index(residuals.argmin(), residuals.shape)
    corner = xs[int(place) % len(xs)], ys[int(place) // len(xs)]
    return drawing // len(THINGS), drawing % len(THINGS), corner, float(residuals[place, drawing])


def _background(pixels: np.ndarray) -> np.ndarray:
    """Median colour (3,) of the two outermost pixels on every side."""
    inner = np.zeros(pixels.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return np.median(pixels[~inner], axis=0)


def _pixels(image: Image.Image) -> np.ndarray:
    """(48, 48, 3) in [0, 1]; a picture of another size is scaled."""
    picture = image.convert("RGB")
    picture = picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture, np.float32) / 255


def diversity(images: list[Image.Image]) -> float:
    """Mean pairwise root-mean-square distance of the pictures at 12 x 12 pixels; 0.0 below two pictures."""
    if len(images) < 2:
        return 0.0
    small = [np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BOX)) for image in images]
    features = np.stack(small).reshape(len(images), -1) / 255.0
    squares = (features**2).sum(-1)
    distances = np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0) / features.shape[1]
    return float(np.sqrt(distances).sum() / (len(images) * (len(images) - 1)))
