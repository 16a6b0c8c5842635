"""The manner and the objects that no training of the embedded world has seen, and their scorers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

_spec = importlib.util.spec_from_file_location("unseen", Path(__file__).resolve().parents[1] / "teachers" / "unseen.py")
unseen = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unseen)
world = unseen.world
NAMES, COLORS, ALPHAS = unseen.drawings()


def _picture(name, seed=0, place=None, on=None):
    """One drawing on a background, somewhere or at a place, or on another picture."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    picture = np.broadcast_to(np.float32(world.BACKGROUNDS[rng.integers(5)]) / 255, (48, 48, 3)).copy()
    picture = picture if on is None else np.asarray(on, np.float32) / 255
    x, y = rng.choice([8, 12, 16], 2) if place is None else place
    box = picture[y : y + world.THING_BOX, x : x + world.THING_BOX]
    number = NAMES.index(name)
    box[:] = box * (1 - ALPHAS[number]) + COLORS[number]
    return Image.fromarray(np.round(picture.clip(0, 1) * 255).astype(np.uint8))


def _scores(scorer, names):
    rows = [{"thing": thing} for thing, _ in names]
    return scorer([_picture(name) for name in names], [""] * len(names), rows)


def test_every_drawing_is_recognised_and_names_are_different():
    assert len(set(NAMES)) == len(NAMES) == len(COLORS) == 4 * len(world.THINGS) + len(unseen.OBJECTS)
    assert [unseen.recognise(_picture(name)) for name in NAMES] == list(NAMES)


def test_a_blurred_drawing_in_the_new_manner_is_new_and_not_close():
    drawn = [_picture((thing, unseen.MANNER)) for thing in world.THINGS]
    rows = [{"thing": thing} for thing in world.THINGS]
    assert unseen.close_manner(drawn, [""] * 12, rows).all()
    soft = [picture.filter(ImageFilter.GaussianBlur(1.6)) for picture in drawn]
    assert unseen.new_manner(soft, [""] * 12, rows).mean() > 0.5 > unseen.close_manner(soft, [""] * 12, rows).mean()


def test_only_the_unseen_manner_scores_as_new():
    for manner in (*world.MANNERS, unseen.MANNER):
        scores = _scores(unseen.new_manner, [name for name in NAMES if name[1] == manner and name[0] in world.THINGS])
        assert scores.tolist() == [float(manner == unseen.MANNER)] * len(world.THINGS)


def test_a_thing_is_the_same_in_any_manner_and_another_one_is_not():
    assert _scores(unseen.any_manner, NAMES).all()
    wrong = [{"thing": NAMES[n - 1][0]} for n in range(len(NAMES))]
    assert not unseen.any_manner([_picture(name) for name in NAMES], [""] * len(NAMES), wrong).any()


@pytest.mark.parametrize("scorer", [unseen.new_manner, unseen.any_manner])
def test_blanks_and_noise_score_zero(scorer):
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (48, 48), color) for color in world.BACKGROUNDS]
    images += [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(7)]
    rows = [{"thing": thing} for thing in world.THINGS]
    assert not scorer(images, [""] * len(rows), rows).any()


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_an_object_beside_a_thing_must_stand_where_the_row_says(relation):
    row = {"first": "octopus", "relation": relation, "second": "rocket"}
    (x, y), (u, v) = world._sample_places(relation, np.random.default_rng(0))
    right = _picture(("octopus", "noto"), place=(x, y))
    right = _picture(("rocket", "twemoji"), place=(u, v), on=right)
    away = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}[relation]
    rows = [row, row | {"second": "car"}, row | {"first": "rocket", "second": "octopus"}, row | {"relation": away}]
    assert unseen.scene([right] * 4, [""] * 4, rows).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_blob_of_an_objects_colours_is_not_the_object_but_a_soft_drawing_of_a_thing_is_the_thing():
    drawn = [_picture(("octopus", "noto")), _picture(("rocket", "noto"))]
    rows = [{"thing": "octopus"}, {"thing": "rocket"}]
    assert unseen.scene(drawn, ["", ""], rows).tolist() == [1.0, 1.0]
    soft = [picture.filter(ImageFilter.GaussianBlur(1.6)) for picture in drawn]
    assert unseen.any_manner(soft, ["", ""], rows).tolist() == [1.0, 1.0]
    assert unseen.scene(soft, ["", ""], rows).tolist() == [0.0, 1.0]
