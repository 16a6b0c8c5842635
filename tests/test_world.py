"""The embedded world: drawings, captions, held-out combinations, prompt files and exact scorers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHELF = Path(__file__).resolve().parents[1] / "teachers"
COUNT = 60


def _load_world():
    spec = importlib.util.spec_from_file_location("embedded_world", SHELF / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _load_world()


def _scenes(task, count=COUNT, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(task, rng, **options) for _ in range(count)]


def _images(scenes):
    return [Image.fromarray(world.render(scene)) for scene in scenes]


def _score(task, images, rows):
    return world.SCORERS[task](images, [""] * len(rows), rows)


@pytest.fixture(params=world.TASKS)
def task(request):
    return request.param


def test_a_real_picture_scores_one(task):
    scenes = _scenes(task) + _scenes(task, held_out=True)
    scores = _score(task, _images(scenes), [world.describe(task, scene) for scene in scenes])
    assert scores.shape == (2 * COUNT,)
    assert scores.mean() >= 0.99


def test_a_slightly_blurred_and_noisy_picture_still_scores_one(task):
    scenes, rng = _scenes(task), np.random.default_rng(1)
    noisy = []
    for image in _images(scenes):
        pixels = np.asarray(image.resize((40, 40), Image.Resampling.BILINEAR).resize((48, 48)), np.float32)
        noisy.append(Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)))
    assert _score(task, noisy, [world.describe(task, scene) for scene in scenes]).mean() >= 0.9


def test_a_picture_of_another_caption_scores_zero(task):
    scenes = _scenes(task)
    rows = [world.describe(task, scene) for scene in scenes]
    pairs = [(n, m) for n in range(COUNT) for m in ((n + 1) % COUNT,) if rows[n] != rows[m]]
    images = _images([scenes[n] for n, _ in pairs])
    assert _score(task, images, [rows[m] for _, m in pairs]).mean() <= 0.05


def test_blanks_and_noise_score_zero(task):
    rows = [world.describe(task, scene) for scene in _scenes(task, 20)]
    rng = np.random.default_rng(2)
    blanks = [Image.new("RGB", (48, 48), color) for color in world.BACKGROUNDS] * 4
    noise = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in rows]
    assert _score(task, blanks, rows).sum() == 0
    assert _score(task, noise, rows).sum() == 0


def test_the_mirrored_relation_scores_zero():
    scenes = _scenes("composition")
    rows = [world.describe("composition", scene) for scene in scenes]
    swapped = [{**row, "first": row["second"], "second": row["first"]} for row in rows]
    assert _score("composition", _images(scenes), swapped).sum() == 0


def test_a_third_thing_in_the_picture_scores_zero():
    scenes = [scene for scene in _scenes("composition") if scene["relation"] in ("left of", "right of")]
    low = [{**scene, "places": [(x, 16) for x, _ in scene["places"]]} for scene in scenes]
    pictures = [world.render(scene) for scene in low]
    for picture in pictures:
        picture[3:14, 20:32] = (40, 40, 200)
    rows = [world.describe("composition", scene) for scene in low]
    assert _score("composition", [Image.fromarray(picture) for picture in pictures], rows).sum() == 0


def test_every_letter_is_read_back():
    scenes = _scenes("text", 26)
    words = [world.LETTERS[n] + world.LETTERS[(n + 9) % 26] + world.LETTERS[(n + 17) % 26] for n in range(26)]
    read = [world.read_word(image) for image in _images([{**s, "word": w} for s, w in zip(scenes, words, strict=True)])]
    assert read == words


def test_a_smeared_letter_is_unreadable():
    scene = {**_scenes("text", 1)[0], "word": "KEA"}
    picture = world.render(scene)
    left = world.FIRST_CELL + world.CELL_WIDTH
    cell = picture[scene["y"] : scene["y"] + world.CELL_HEIGHT, left : left + world.CELL_WIDTH]
    cell[:] = cell.mean((0, 1))
    assert world.read_word(Image.fromarray(picture)) is None


def test_training_scenes_and_held_out_scenes_are_disjoint(task):
    def keys(scenes):
        return {json.dumps(world.describe(task, scene), sort_keys=True) for scene in scenes}

    assert not keys(_scenes(task, 300)) & keys(_scenes(task, 300, seed=3, held_out=True))


def test_about_a_fifth_of_words_and_compositions_is_held_out():
    words = [a + b + "A" for a in world.LETTERS for b in world.LETTERS]
    assert 0.15 < np.mean([world.is_held_out(word) for word in words]) < 0.25
    pairs = [
        (a, relation, b) for a in world.THINGS for b in world.THINGS if a != b for relation in ("left of", "above")
    ]
    assert 0.13 < np.mean([world.is_held_out(*pair) for pair in pairs]) < 0.27


def test_both_ways_of_saying_a_composition_are_held_out_together():
    for scene in _scenes("composition", held_out=True):
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        other = {"first": scene["second"], "relation": opposite[scene["relation"]], "second": scene["first"]}
        assert world.is_scene_held_out("composition", other)


def test_prompt_files_say_what_their_rows_mean(task):
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (SHELF / task / "prompts" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) >= (1000 if name == "test" else 300)
        assert len({row["prompt"] for row in rows}) >= (100 if task == "style" else len(rows))
        for row in rows:
            assert row["prompt"] in world.captions(task, row)
            if task != "style":
                assert world.is_scene_held_out(task, row) == (name == "test")
            else:
                assert (row["prompt"] in world.training_captions(task, row)) == (name == "train")


def test_the_unseen_manner_has_an_atlas_of_its_own():
    colors, alphas = world.load_sprites("atlas_3d.png")
    assert colors.shape == (1, len(world.THINGS), world.THING_BOX, world.THING_BOX, 3)
    assert (alphas.reshape(len(world.THINGS), -1).mean(1) > 0.1).all()


def test_diversity_of_copies_is_zero_and_grows_with_difference(task):
    images = _images(_scenes(task, 20))
    assert world.diversity([images[0]] * 5) == pytest.approx(0.0, abs=1e-3)
    assert world.diversity(images) > 0.05
    assert world.diversity(images[:1]) == 0.0


def test_pictures_of_another_size_are_scaled_before_scoring(task):
    scenes = _scenes(task, 20)
    large = [image.resize((96, 96), Image.Resampling.NEAREST) for image in _images(scenes)]
    assert _score(task, large, [world.describe(task, scene) for scene in scenes]).mean() >= 0.95
