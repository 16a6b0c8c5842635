"""The comparison's table: what a run cost, and its student's share of each shelf teacher's own score."""

import json

import numpy as np
import pytest
from from_scripts import script
from typer.testing import CliRunner

from diffopd.data import asked_of, read_prompts
from diffopd.metrics import bootstrap_interval

world_compare = script("world_compare")
TASKS = world_compare.world.TASKS


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "student-m2-10min-seed0"
    (folder / "evaluation").mkdir(parents=True)
    rows = [
        {"kind": "update", "update": n, "seconds": 3.0 * n, "network_calls": {"student": 4, "teacher": 16}}
        for n in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = [
        {"model": "student", "task": task, "prompt": n, "score": score / 2}
        for task in TASKS
        for n, score in enumerate(world_compare.teacher_scores(task)[:40])
    ]
    (folder / "evaluation" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))
    (folder / "evaluation" / "scores.json").write_text("{}")
    return folder


def test_a_student_is_compared_with_the_shelfs_own_teachers_prompt_by_prompt(run):
    result = CliRunner().invoke(world_compare.app, ["table", "--output", str(run.parent), "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    assert (row["updates"], row["seconds"], row["teacher_calls"]) == (3, 9.0, 48)
    for task in TASKS:
        own = np.mean(world_compare.teacher_scores(task)[:40])
        assert row[task]["score"] == pytest.approx(own / 2)
        rows = read_prompts(world_compare.ROOT / "teachers" / task / "prompts" / "test.jsonl")[:40]
        student = np.array(world_compare.teacher_scores(task)[:40]) / 2
        assert row[task]["interval"] == pytest.approx(bootstrap_interval(student, groups=asked_of(rows)))
        assert row[task]["ratio"] == pytest.approx(0.5) and row[task]["ratio_interval"] == pytest.approx([0.5, 0.5])


def test_copies_of_the_teachers_name_a_picture_for_every_prompt_and_are_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(world_compare, "draw_row", lambda task, row, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world_compare.with_pictures(tmp_path)
    assert not (tmp_path / TASKS[0]).exists()
    picture = world_compare.Image.new("RGB", (4, 4))
    monkeypatch.setattr(world_compare, "draw_row", lambda task, row, rng: picture)
    for folder in world_compare.with_pictures(tmp_path):
        first = json.loads((folder / "prompts" / "train.jsonl").read_text().splitlines()[0])
        assert (folder / "prompts" / first["file_name"]).is_file()
