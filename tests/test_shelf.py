"""Contract of the shipped shelves: every teacher draws what its card says, and all fits in the promised size."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffopd.data import asked_of, read_prompts
from diffopd.evaluate import CARD_SCORES, measure, reference_contenders, tasks_of
from diffopd.locate import shelf, teacher_names
from diffopd.metrics import bootstrap_interval
from diffopd.recipe import read_recipe
from diffopd.teacher import teacher_card

NUM_PROMPTS = 24
WORLD = [name for name in teacher_names() if teacher_card(name, shelf("teachers")).base == "emoji"]


@pytest.fixture(scope="module")
def world():
    recipe = read_recipe("together", [f"evaluate.num_prompts={NUM_PROMPTS}", "evaluate.batch_size=24"])
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    return recipe, cards, reference_contenders(recipe, cards)


@pytest.mark.parametrize("name", WORLD)
def test_a_teacher_scores_at_few_steps_what_its_card_says(name, world):
    recipe, cards, contenders = world
    steps = recipe.student.num_inference_steps
    contender = next(c for c in contenders if c.model == f"teacher:{name}" and c.num_inference_steps == steps)
    task = next(task for task in tasks_of(cards, NUM_PROMPTS) if task.name == name)
    (result,) = measure([(contender, task)], recipe)
    card = next(card for card in cards if card.name == name)
    rows = json.loads((card.folder / CARD_SCORES).read_text())["rows"]
    said = next(r for r in rows if (r["model"], r["task"], r["num_inference_steps"]) == (contender.model, name, steps))
    # Same prompts and noise: only a different machine's rounding may tip a picture over a threshold.
    assert np.mean(np.array(result.scores) != np.array(said["scores"][:NUM_PROMPTS])) <= 0.15


@pytest.mark.parametrize("name", WORLD)
def test_a_card_holds_the_base_the_teacher_and_the_other_tasks(name):
    card = teacher_card(name, shelf("teachers"))
    rows = json.loads((card.folder / CARD_SCORES).read_text())["rows"]
    assert {row["task"] for row in rows if row["model"] == f"teacher:{name}"} == set(WORLD)
    assert len({row["guidance_scale"] for row in rows if row["model"] == "base"}) >= 2
    assert all(len(row["scores"]) == row["num_prompts"] and row["diversity"] > 0.02 for row in rows)


@pytest.mark.parametrize("name", WORLD)
def test_a_cards_intervals_are_over_what_the_prompts_ask_for(name):
    folder = teacher_card(name, shelf("teachers")).folder
    page = (folder / "README.md").read_text()
    for row in json.loads((folder / CARD_SCORES).read_text())["rows"]:
        prompts = read_prompts(teacher_card(row["task"], shelf("teachers")).prompts.test)
        asked = asked_of(prompts[: row["num_prompts"]])
        assert row["num_asked"] == len(set(asked))
        low, high = row["interval"]
        assert bootstrap_interval(row["scores"], groups=asked) == pytest.approx((low, high))
        assert f"| {row['score']:.3f} | {low:.3f} to {high:.3f} |" in page


def size(*patterns):
    files = {
        file for name in ("teachers", "pipelines") for pattern in patterns for file in Path(shelf(name)).glob(pattern)
    }
    return sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts)


def test_base_and_teachers_are_at_most_30_megabytes_and_the_few_step_model_that_a_wheel_holds_18():
    few, fewer = size("emoji-4-steps/**/*"), size("emoji-2-steps/**/*")
    assert size("**/*") - few - fewer <= 30e6
    assert few - size("emoji-4-steps/**/*.many-steps.safetensors") <= 18.5e6


def test_the_2_step_model_is_the_4_step_one_but_for_its_denoisers_weights():
    two, four = (Path(shelf("pipelines")) / name for name in ("emoji-2-steps", "emoji-4-steps"))
    files = {f.relative_to(four) for f in four.rglob("*") if f.is_file() and "many-steps" not in f.name}
    assert files == {file.relative_to(two) for file in two.rglob("*") if file.is_file()}
    different = {str(file) for file in files if (two / file).read_bytes() != (four / file).read_bytes()}
    assert different == {"README.md", "unet/diffusion_pytorch_model.safetensors"}
