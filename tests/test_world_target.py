"""The target's table: students paired with their teacher by prompt, prompts and trainings both drawn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from from_scripts import script
from typer.testing import CliRunner

from diffopd.data import PromptRow
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder

world_target = script("world_target")


def put(folder, label, scores, *, steps=4, guidance=1.0, model=None, asked=None):
    row = {"task": "text", "model": model or label, "label": label, "steps": steps, "guidance_scale": guidance}
    row |= {"diversity": 0.1, "seconds": 1.0, "scores": scores, "asked": asked or list(range(len(scores)))}
    (folder / f"text--{label}--{steps}.json").write_text(json.dumps(row))


@pytest.fixture
def scored(tmp_path):
    rng = np.random.default_rng(0)
    teacher = (rng.random(400) < 0.9).astype(float)
    put(tmp_path, "teacher-text", teacher.tolist(), steps=20, guidance=2.0)
    put(tmp_path, "teacher-text", (teacher * 0.5).tolist(), steps=4, guidance=2.0)
    put(tmp_path, "student-a", teacher.tolist(), model="student")
    put(tmp_path, "student-b", (teacher * (rng.random(400) < 0.8)).tolist(), model="student")
    return tmp_path


def table(folder):
    result = CliRunner().invoke(world_target.app, ["table", "--output", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return {(row["model"], row["steps"]): row for row in json.loads(result.output)}


def test_everyone_is_compared_with_the_teacher_at_its_own_steps(scored):
    rows = table(scored)
    assert rows["teacher-text", 20]["ratio"] == pytest.approx(1.0)
    assert rows["teacher-text", 4]["ratio"] == pytest.approx(0.5)
    assert rows["student-a", 4]["ratio_interval"] == pytest.approx([1.0, 1.0])  # paired: it never differs
    assert rows["student-a", 4]["interval"][0] < rows["student-a", 4]["score"] < rows["student-a", 4]["interval"][1]


def test_students_of_all_trainings_are_one_row_whose_interval_knows_that_trainings_differ(scored):
    rows = table(scored)
    both, one = rows["student, all runs", 4], rows["student-b", 4]
    assert both["trainings"] == 2 and both["num_prompts"] == 400
    assert both["score"] == pytest.approx((rows["student-a", 4]["score"] + one["score"]) / 2)
    width = np.diff(both["ratio_interval"])[0]
    assert width > np.diff(one["ratio_interval"])[0] and width > 0.15  # the two trainings are .2 apart


def test_a_task_without_its_teacher_and_an_empty_folder_are_named(tmp_path):
    empty = CliRunner().invoke(world_target.app, ["table", "--output", str(tmp_path)])
    assert empty.exit_code == 1 and "no scores" in empty.output
    put(tmp_path, "student-a", [1.0, 0.0], model="student")
    alone = CliRunner().invoke(world_target.app, ["table", "--output", str(tmp_path)])
    assert alone.exit_code == 1 and "text: the teacher is not measured" in alone.output


def test_a_folder_without_a_run_is_named_without_a_traceback(tmp_path):
    result = CliRunner().invoke(world_target.app, ["measure", str(tmp_path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1 and "is not a run folder" in result.output and isinstance(result.exception, SystemExit)


def test_unknown_tasks_and_kinds_are_refused(tmp_path):
    for option in ("--task", "--what"):
        told = ["measure", str(tmp_path), "--output", str(tmp_path / "out"), option, "nothing"]
        result = CliRunner().invoke(world_target.app, told)
        assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_prompts_that_ask_for_the_same_are_drawn_together(tmp_path):
    """Ten words of forty noises each tell as much as ten prompts: half of the words are never drawn right."""
    rights = [1.0] * 200 + [0.0] * 200
    for name, asked in (("alone", None), ("together", [n // 40 for n in range(400)])):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "teacher-text", [1.0] * 400, steps=20, asked=asked)
        put(tmp_path / name, "student-a", rights, model="student", asked=asked)
    alone, together = (table(tmp_path / name)["student-a", 4] for name in ("alone", "together"))
    assert (alone["num_asked"], together["num_asked"]) == (400, 10)
    assert np.diff(together["interval"])[0] > 4 * np.diff(alone["interval"])[0]


@pytest.fixture
def runs(tmp_path, tiny_recipe):
    return lambda name, *options: RunFolder.create(
        tmp_path / name, read_recipe(tiny_recipe, list(options)), hashes={}, processes=1
    )


def test_runs_of_one_name_or_of_different_recipes_are_refused(runs):
    world_target.check_runs([runs("a/one", "seed=1"), runs("a/two", "seed=2")])
    with pytest.raises(typer.BadParameter, match="two runs are named 'one'"):
        world_target.check_runs([runs("b/one"), runs("c/one", "seed=1")])
    with pytest.raises(typer.BadParameter, match=r"differ in \[objective\]"):
        world_target.check_runs([runs("d/one"), runs("d/two", "objective.name=velocity")])


def test_a_student_is_scored_on_the_device_of_its_references(runs, tmp_path, monkeypatch):
    class Pipeline:
        device = "cpu"

        def to(self, device):
            self.device = device
            return self

        def __call__(self): ...

    scored = []
    for name, answer in {
        "default_device": "there",
        "student_pipeline": Pipeline(),
        "tasks_of": [SimpleNamespace(name="text")],
        "references": [],
        "reference_weights": "",
        "weights_sha256": "",
    }.items():
        monkeypatch.setattr(world_target, name, lambda *told, answer=answer: answer)
    monkeypatch.setattr(world_target, "score", lambda student, *told: scored.append(student.call.pipeline.device))
    folder, out = runs("one").path, tmp_path / "out"
    result = CliRunner().invoke(world_target.app, ["measure", str(folder), "--output", str(out), "--task", "text"])
    assert result.exit_code == 0 and scored == ["there"]


def test_scores_of_other_weights_are_neither_reused_nor_overwritten(tmp_path):
    task = SimpleNamespace(name="text", rows=[SimpleNamespace(metadata={"word": "KEA"})])
    contender = SimpleNamespace(model="base", num_inference_steps=4, guidance_scale=1.0)
    kept = tmp_path / "text--base--4-steps--guidance-1.json"
    kept.write_text(json.dumps({"weights": "old", "scores": [1.0]}))
    world_target.score(contender, "base", "old", task, None, tmp_path)
    with pytest.raises(typer.BadParameter, match="scores of other weights"):
        world_target.score(contender, "base", "new", task, None, tmp_path)
    assert json.loads(kept.read_text())["weights"] == "old"


def test_the_difference_of_two_models_is_paired_by_row(scored):
    files = [str(scored / f"text--student-{name}--4.json") for name in "ab"]
    result = CliRunner().invoke(world_target.app, ["difference", *files])
    both = [json.loads((scored / f"text--student-{name}--4.json").read_text())["scores"] for name in "ab"]
    assert result.exit_code == 0 and result.output.startswith("text: +")
    assert float(result.output.split()[1]) == pytest.approx(np.mean(both[0]) - np.mean(both[1]), abs=6e-4)
    same = CliRunner().invoke(world_target.app, ["difference", files[0], files[0]])
    assert "+0.000 (+0.000 to +0.000), 400 rows" in same.output
    other = json.loads((scored / "text--student-b--4.json").read_text())
    other["asked"][0] = 10**6
    (scored / "text--student-b--4.json").write_text(json.dumps(other))
    refused = CliRunner().invoke(world_target.app, ["difference", *files])
    said = " ".join(refused.output.replace("│", " ").split())
    assert refused.exit_code == 2 and "do not say the same of what is asked" in said


def test_what_is_asked_does_not_depend_on_wording_or_on_the_picture_that_goes_with_it():
    rows = [PromptRow("a cat", {"thing": "cat", "file_name": "0.png"}), PromptRow("one cat", {"thing": "cat"})]
    rows += [PromptRow("a dog", {"thing": "dog", "file_name": "0.png"})]
    assert world_target.asked_of(SimpleNamespace(rows=rows)) == [0, 0, 1]
