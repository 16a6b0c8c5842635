"""Scores of cards stand in only for what they were measured on."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from run_helpers import recipe_with, run_to_end

from diffopd import evaluate as evaluation
from diffopd.drive import denoiser_of
from diffopd.errors import UserError
from diffopd.load import student_pipeline
from diffopd.recipe import read_recipe
from diffopd.teacher import teacher_card

ROOT = Path(__file__).parents[1]


def read(place, *overrides):
    recipe = read_recipe(place / "r.toml", list(overrides))
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    return recipe, cards


def known(place, *overrides):
    recipe, cards = read(place, *overrides)
    of_cards = [row for card in cards for row in json.loads((card.folder / "scores.json").read_text())["rows"]]
    asked = [evaluation.Contender(r["model"], None, r["num_inference_steps"], r["guidance_scale"]) for r in of_cards]
    return set(evaluation.card_results(recipe, cards, evaluation.tasks_of(cards, 2), asked))


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_sd, tiny_teachers):
    """Both tiny teachers with cards that scripts/world_scores.py wrote. Read only."""
    place = tmp_path_factory.mktemp("scored")
    shutil.copytree(tiny_sd, place / "base")
    folders = [shutil.copytree(folder, place / folder.name) for folder in tiny_teachers]
    tiny.write_recipe(place / "r.toml", "./base", [Path(f"./{folder.name}") for folder in folders])
    text = (place / "r.toml").read_text()
    (place / "r.toml").write_text(text.replace('name = "dots"', 'name = "./dots"').replace('"lines"', '"./lines"'))
    spec = importlib.util.spec_from_file_location("world_scores", ROOT / "scripts" / "world_scores.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["dots", "lines"], place / "r.toml", prompts=2, seeds=[0], guidance=[1.0, 2.0], batch=2)
    return place


@pytest.fixture
def place(scored, tmp_path):
    """A copy that a test may change; paths in it are relative."""
    return shutil.copytree(scored, tmp_path / "scored")


def test_a_card_holds_its_teacher_on_all_tasks_and_the_base_on_its_own(scored):
    scales = {"dots": 2.0, "lines": 1.0}
    teachers = [(f"teacher:{name}", steps, scale) for name, scale in scales.items() for steps in (8, 2)]
    base = [("base", 8, scale) for scale in (1.0, 2.0)]
    assert known(scored) == {(contender, task) for contender in (*teachers, *base) for task in ("dots", "lines")}


def test_scores_of_a_card_are_those_that_a_measurement_gives(scored):
    recipe, cards = read(scored)
    tasks = evaluation.tasks_of(cards, 2)
    references = evaluation.reference_contenders(recipe, cards)
    of_cards = evaluation.card_results(recipe, cards, tasks, references)
    teacher = next(c for c in references if c.key == ("teacher:dots", 8, 2.0))
    measured = evaluation.measure([(teacher, tasks[1])], recipe)[0]
    assert of_cards[teacher.key, "lines"].scores == pytest.approx(measured.scores, abs=1e-4)


def test_a_card_answers_only_for_the_settings_that_are_asked_for(scored):
    recipe, cards = read(scored, "evaluate.guidance_scales=[1.0]", "teachers.0.guidance_scale=3.0")
    tasks, references = evaluation.tasks_of(cards, 2), evaluation.reference_contenders(recipe, cards)
    found = {key for key, _ in evaluation.card_results(recipe, cards, tasks, references)}
    assert found == {("base", 8, 1.0), ("teacher:lines", 8, 1.0), ("teacher:lines", 2, 1.0)}
    assert evaluation.card_results(recipe, cards, tasks, []) == {}


@pytest.mark.parametrize(
    "file",
    [
        "base/unet/diffusion_pytorch_model.safetensors",
        "base/vae/diffusion_pytorch_model.safetensors",
        "base/text_encoder/model.safetensors",
        "base/scheduler/scheduler_config.json",
    ],
)
def test_another_base_is_measured(place, file):
    with (place / file).open("ab") as opened:
        opened.write(b"\n")
    assert known(place) == set()


@pytest.mark.parametrize("file", ["dots/prompts/test.jsonl", "dots/reward.py"])
def test_a_changed_task_is_measured_and_the_other_one_is_not(place, file):
    before = known(place)
    text = (place / file).read_text()
    (place / file).write_text(text.replace("a dot", "a spot").replace("Mean brightness", "The mean brightness"))
    assert (place / file).read_text() != text
    assert known(place) == {(contender, task) for contender, task in before if task == "lines"}


def test_training_prompts_do_not_matter_to_scores(place):
    (place / "dots" / "prompts" / "train.jsonl").write_text('{"prompt": "anything"}\n')
    assert len(known(place)) == 12


def test_another_lora_is_measured_and_the_other_teacher_is_not(place):
    tiny.save_lora(place / "dots", place / "base", seed=7)
    card = place / "dots" / "teacher.toml"
    card.write_text("\n".join(line for line in card.read_text().splitlines() if not line.startswith("sha256")) + "\n")
    assert {contender[0] for contender, _ in known(place)} == {"base", "teacher:lines"}
    assert {task for (model, *_), task in known(place) if model == "base"} == {"lines"}


@pytest.mark.parametrize(
    ("option", "left"),
    [
        ("student.scheduler.rescale_betas_zero_snr=false", set()),
        ("student.call.eta=0.5", set()),
        ("teachers.dots.call.guidance_rescale=0.5", {"base", "teacher:lines"}),
        ("evaluate.seeds=[1]", set()),
        ("evaluate.dtype=bf16", set()),
        ("train.learning_rate=0.5", {"base", "teacher:dots", "teacher:lines"}),
    ],
)
def test_other_settings_are_measured_where_they_matter(scored, option, left):
    assert {contender[0] for contender, _ in known(scored, option)} == left


def test_the_recipes_number_of_steps_of_a_teacher_is_used(scored):
    recipe, cards = read(scored, "teachers.dots.num_inference_steps=12")
    settings = {c.key for c in evaluation.reference_contenders(recipe, cards)}
    assert {("teacher:dots", 12, 2.0), ("teacher:dots", 2, 2.0), ("teacher:lines", 8, 1.0)} <= settings
    assert ("teacher:dots", 8, 2.0) not in settings
    assert {steps for model, steps, _ in settings if model in ("base", "average")} == {12, 2}


def test_a_base_that_teaches_by_a_call_of_its_own_is_scored_as_a_teacher(tiny_sd, tmp_path):
    itself = tiny.write_teacher(tmp_path / "itself", tiny_sd, form="base", guidance_scale=3.0)
    tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [itself])
    recipe, cards = read(tmp_path, "teachers.0.call.guidance_rescale=0.5", "teachers.0.num_inference_steps=3")
    references = evaluation.reference_contenders(recipe, cards)
    assert [c.key for c in references if c.model != "base"] == [("teacher:itself", n, 3.0) for n in (3, 2)]
    told = {c.model: c.call.arguments.get("guidance_rescale") for c in references}
    assert told == {"base": None, "teacher:itself": 0.5}
    results = [evaluation.Result(c.key, "itself", [0.5, 1.0], 0.0, 0.0) for c in references]
    rows = [{"model": c.model} for c in references]
    evaluation._add_ratios(rows, results, recipe, cards, {"itself": ["a", "b"]})
    assert [row["model"] for row in rows if row.get("is_reference")] == ["teacher:itself"]
    assert all(row["ratio"]["to"] == "teacher:itself" for row in rows if not row.get("is_reference"))

    as_student = ["teachers.0.guidance_scale=1.0", "teachers.0.num_inference_steps=2"]
    assert {c.model for c in evaluation.reference_contenders(*read(tmp_path, *as_student))} == {"base"}


def test_a_student_is_scored_at_its_own_steps_unless_the_recipe_says_otherwise(tiny_recipe, tiny_pipeline, monkeypatch):
    recipe = read_recipe(tiny_recipe, ["evaluate.student_steps=3"])
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    student = evaluation.student_contender(recipe, tiny_pipeline)
    asked, call = [], type(tiny_pipeline.scheduler).set_timesteps

    def set_timesteps(scheduler, count, **options):
        asked.append(count)
        return call(scheduler, count, **options)

    monkeypatch.setattr(type(tiny_pipeline.scheduler), "set_timesteps", set_timesteps)
    task = evaluation.tasks_of(cards, 2)[0]
    found = next(evaluation.pictures(student, task.rows, task.name, 0, 2))
    assert len(found) == 2 and set(asked) == {3} and student.key == ("student", 3, 1.0)
    references = {c.key[:2] for c in evaluation.reference_contenders(recipe, cards) if c.model.startswith("teacher")}
    assert references == {("teacher:dots", 8), ("teacher:dots", 3), ("teacher:lines", 8), ("teacher:lines", 3)}
    assert evaluation.student_contender(read_recipe(tiny_recipe), tiny_pipeline).num_inference_steps == 2


def test_a_lora_student_may_be_scored_rounded_on_one_trunk_with_its_references(tiny_recipe):
    """It draws what the float32 student draws but for bfloat16's rounding, and another thing than the base."""
    folder = run_to_end(recipe_with(tiny_recipe, "train.learning_rate=1e-1"))
    drawn = {}
    for dtype in ("float32", "bf16"):
        recipe = recipe_with(tiny_recipe, f"evaluate.dtype={dtype}")
        cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
        references, student = evaluation.contenders(folder, recipe, cards)
        base = next(c for c in references if c.model == "base")
        task = evaluation.tasks_of(cards, 2)[0]
        for one in (base, student):
            (images,) = evaluation.pictures(replace(one, num_inference_steps=2), task.rows, task.name, 0, 2)
            drawn[dtype, one.model] = np.stack([np.asarray(image, float) for image in images])
        assert base.call.pipeline.text_encoder is student.call.pipeline.text_encoder
        is_shared = denoiser_of(base.call.pipeline) is denoiser_of(student.call.pipeline)
        assert is_shared == (dtype == "bf16")
        assert denoiser_of(base.call.pipeline).dtype == (torch.bfloat16 if is_shared else torch.float32)
    exported = evaluation.student_contender(recipe, student_pipeline(folder.path))
    (images,) = evaluation.pictures(replace(exported, num_inference_steps=2), task.rows, task.name, 0, 2)
    assert np.array_equal(drawn["float32", "student"], np.stack([np.asarray(image, float) for image in images]))
    for model in ("base", "student"):
        assert 0 < np.abs(drawn["bf16", model] - drawn["float32", model]).mean() < 1
    assert np.abs(drawn["bf16", "student"] - drawn["bf16", "base"]).mean() > 5
    with pytest.raises(UserError, match='"full" has a network of its own'):
        recipe_with(tiny_recipe, "evaluate.dtype=bf16", 'student.train="full"')


def test_prompts_that_ask_for_the_same_are_drawn_together_in_what_is_written(tiny_recipe, tmp_path):
    recipe = read_recipe(tiny_recipe)
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    teacher = f"teacher:{cards[0].name}", cards[0].num_inference_steps, cards[0].guidance_scale
    reference = evaluation.Result(teacher, cards[0].name, [1.0] * 40, 0.1, 1.0)
    student = evaluation.Result(("student", 2, 1.0), cards[0].name, [1.0] * 20 + [0.0] * 20, 0.1, 1.0)
    widths = {}
    for name, asked in (("alone", [str(n) for n in range(40)]), ("together", [str(n // 10) for n in range(40)])):
        (tmp_path / name).mkdir()
        results, kinds = [reference, student], {cards[0].name: asked}
        path = evaluation._write(tmp_path / name, results, recipe, cards, kinds, "checkpoint-4")
        written = json.loads(path.read_text())
        row = written["rows"][1]
        assert written["checkpoint"] == "checkpoint-4"
        assert (row["score"], row["num_prompts"], row["num_asked"]) == (0.5, 40, len(set(asked)))
        widths[name] = [high - low for low, high in (row["interval"], row["ratio"]["interval"])]
    assert all(wide > 2 * narrow for wide, narrow in zip(widths["together"], widths["alone"], strict=True))
