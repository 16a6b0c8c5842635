"""The shipped ways to teach: every one is read and checked, and the embedded world's pictures show what rows say."""

from pathlib import Path

import pytest

from diffopd.data import read_prompts
from diffopd.locate import shelf
from diffopd.teach_check import check_teach
from diffopd.teach_recipe import read_teach_recipe
from diffopd.teacher import load_reward, teacher_card

ROWS = 24


def shipped() -> list[Path]:
    """Every .toml in a teacher's folder that is neither its card nor a recipe to learn from it."""
    others = {"teacher.toml", "distill.toml"}
    return sorted(path for path in shelf("teachers").glob("*/*.toml") if path.name not in others)


def test_every_task_of_the_world_has_one():
    assert {path.parent.name for path in shipped() if path.name == "teach.toml"} >= {"composition", "text", "style"}


@pytest.mark.parametrize("path", shipped(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_way_to_teach_is_complete(path):
    recipe = read_teach_recipe(f"{path.parent.name}/{path.name}")
    assert recipe.path == path and check_teach(recipe).missing == []


@pytest.mark.parametrize("task", ["composition", "text", "style"])
def test_drawn_pictures_score_1_under_their_rows_and_differ_by_seed(task):
    card = teacher_card(task, shelf("teachers"))
    draw = load_reward(f"../pictures.py:{task}", card.folder)
    rows = read_prompts(card.prompts.train)[:ROWS]
    prompts, metadata = [row.prompt for row in rows], [row.metadata for row in rows]
    images = draw(prompts, metadata, list(range(ROWS)))
    assert list(load_reward(card.reward, card.folder)(images, prompts, metadata)) == [1.0] * ROWS
    assert [a.tobytes() for a in draw(prompts, metadata, list(range(ROWS)))] == [a.tobytes() for a in images]
    again = draw(prompts, metadata, list(range(100, 100 + ROWS)))
    assert sum(a.tobytes() != b.tobytes() for a, b in zip(images, again, strict=True)) > ROWS / 2
