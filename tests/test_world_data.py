"""What the embedded world's trainings are told: spoilt and confused captions; prompts to look at while training."""

import json
from pathlib import Path

import numpy as np
import pytest
from from_scripts import script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data():
    return script("world_data")


@pytest.fixture(params=["composition", "text", "style"])
def task(request):
    return request.param


def said(data, task, scene):
    return data.world.describe(task, scene)


def test_a_spoilt_scene_differs_in_one_element_and_is_never_held_out(data, task):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = data.world.sample_scene(task, rng)
        wrong = data.spoil(task, scene, rng)
        changed = [key for key in said(data, task, scene) if scene[key] != wrong[key]]
        assert len(changed) == 1
        if task == "text":
            assert sum(a != b for a, b in zip(scene["word"], wrong["word"], strict=True)) == 1
        assert not data.world.is_scene_held_out(task, wrong)


def test_a_confused_scene_takes_neighbours_and_is_never_held_out(data, task):
    rng = np.random.default_rng(1)
    changes = 0
    for _ in range(400):
        scene = data.world.sample_scene(task, rng)
        told = data.confuse(task, scene, rng, 0.5)
        assert not data.world.is_scene_held_out(task, told)
        for key in said(data, task, scene):
            pairs = list(zip(scene[key], told[key], strict=True)) if task == "text" else [(scene[key], told[key])]
            assert all(b in (a, data.NEIGHBOURS.get(a)) for a, b in pairs)
        changes += told != scene
        assert data.confuse(task, scene, rng, 0.0) == scene
    assert changes > 100


def test_validation_prompts_are_none_of_the_reported_ones(data, task):
    lines = (ROOT / "teachers" / task / "prompts" / "test.jsonl").read_text().splitlines()
    reported = {json.loads(line)["prompt"] for line in lines}
    rows = data.validation_rows(task, 200)
    assert len(rows) == 200
    assert not reported & {row["prompt"] for row in rows}
