"""The whole road on the tiny world: train, evaluate, export, reload by a stranger."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from diffopd import distill as loop
from diffopd import evaluate as evaluation
from diffopd.cli import app
from diffopd.errors import UserError
from diffopd.evaluate import evaluate_run
from diffopd.export import export_run
from diffopd.load import student_pipeline
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder


def train(recipe_path, *overrides):
    recipe = read_recipe(recipe_path, list(overrides))
    parts = check(recipe, hash_weights=True)
    folder = RunFolder.create(recipe.output_dir, recipe, parts.hashes)
    loop.distill(recipe, folder)
    return folder.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_sd, tiny_teachers):
    """A trained and evaluated run of both tiny teachers."""
    place = tmp_path_factory.mktemp("finished")
    recipe = tiny.write_recipe(place / "r.toml", tiny_sd, tiny_teachers)
    path = train(recipe, "train.learning_rate=1e-2", "teachers.0.guidance_scale=5.0")
    evaluate_run(path, everything=True)
    return path


@pytest.fixture(scope="module")
def exported(finished, strangers):
    """The export of `finished`. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffopd.stranger.subprocess", strangers)
        return export_run(finished)


def scores_of(path):
    return json.loads((path / "evaluation" / "scores.json").read_text())["rows"]


def test_every_model_is_scored_on_every_task_at_its_settings(finished):
    rows = scores_of(finished)
    settings = {(row["model"], row["num_inference_steps"], row["guidance_scale"]) for row in rows}
    assert settings == {
        ("base", 8, 1.0),
        ("base", 8, 2.0),
        ("teacher:dots", 8, 5.0),
        ("teacher:dots", 2, 5.0),
        ("teacher:lines", 8, 1.0),
        ("teacher:lines", 2, 1.0),
        ("average", 8, 1.5),
        ("average", 2, 1.5),
        ("student", 2, 1.0),
    }
    assert len(rows) == 2 * len(settings)
    assert all(row["interval"][0] <= row["score"] <= row["interval"][1] for row in rows)


def test_the_bases_best_guidance_is_marked_once_a_task_and_ratios_are_paired(finished):
    rows = scores_of(finished)
    for task in ("dots", "lines"):
        base = [row for row in rows if row["model"] == "base" and row["task"] == task]
        best = [row for row in base if row.get("is_best_guidance")]
        assert len(best) == 1 and best[0]["score"] == max(row["score"] for row in base)
        student = next(row for row in rows if row["model"] == "student" and row["task"] == task)
        teacher = next(r for r in rows if r["model"] == f"teacher:{task}" and r["task"] == task and "is_reference" in r)
        assert student["ratio"]["value"] == pytest.approx(student["score"] / teacher["score"])


def test_the_score_is_the_reward_of_the_pictures_that_the_plain_pipeline_draws(finished):
    recipe = RunFolder.open(finished).recipe()
    task = evaluation.tasks_of([evaluation.teacher_card(recipe.teachers[0].name, recipe.path)], 2)[0]
    pipeline = student_pipeline(finished)
    latents = evaluation.noise.draw(
        (4, 8, 8),
        run_seed=0,
        update=evaluation.EVALUATION,
        solver_step=evaluation.noise.hash_of("dots"),
        sample_indices=[0, 1],
    )
    prompts = [row.prompt for row in task.rows]
    images = pipeline(prompt=prompts, latents=latents, num_inference_steps=2, guidance_scale=1.0).images
    student = next(r for r in scores_of(finished) if r["model"] == "student" and r["task"] == "dots")
    assert student["score"] == pytest.approx(np.mean(task.reward(images, prompts, [{}, {}])))


def test_the_grid_shows_the_same_prompts_for_base_teacher_and_student(finished):
    index = json.loads((finished / "evaluation" / "grid" / "index.json").read_text())
    assert [entry["prompt"] for entry in index if entry["task"] == "dots"] == ["a dot", "a line"]
    for entry in index:
        assert set(entry["models"]) == {"base", f"teacher-{entry['task']}", "student"}
        assert all((finished / "evaluation" / model["file"]).is_file() for model in entry["models"].values())


def test_scores_of_a_card_stand_in_for_exactly_its_weights(finished, tiny_sd, tiny_teachers, tmp_path, monkeypatch):
    shelf = tmp_path / "shelf" / "dots"
    shutil.copytree(tiny_teachers[0], shelf)
    recipe_path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [shelf])
    recipe = read_recipe(recipe_path, [])
    cards = [evaluation.teacher_card(str(shelf), recipe_path)]
    row = {
        "model": "teacher:dots", "task": "dots", "num_inference_steps": 8, "guidance_scale": 2.0, "score": 0.25,
        "scores": [0.25, 0.25], "diversity": 0.1, "seconds": 1.0, "seeds": [0],
    }  # fmt: skip
    base = evaluation.base_sha256(recipe)
    conditions = evaluation.card_conditions(recipe, recipe.teachers[0], cards[0], base)
    stored = {"conditions": conditions, "tasks": evaluation.task_conditions(cards), "rows": [row]}
    (shelf / "scores.json").write_text(json.dumps(stored))
    path = train(recipe_path)
    evaluate_run(path)
    found = [r for r in scores_of(path) if r["model"] == "teacher:dots" and r["num_inference_steps"] == 8]
    assert (found[0]["score"], found[0]["source"]) == (0.25, "card")
    evaluate_run(path, everything=True)
    found = [r for r in scores_of(path) if r["model"] == "teacher:dots" and r["num_inference_steps"] == 8]
    assert found[0]["source"] == "measured" and found[0]["score"] != 0.25
    (shelf / "scores.json").write_text(json.dumps(stored | {"conditions": conditions | {"weights_sha256": "0" * 64}}))
    references = evaluation.reference_contenders(recipe, cards)
    assert evaluation.card_results(recipe, cards, evaluation.tasks_of(cards, 2), references) == {}


def test_an_export_is_reloaded_by_a_stranger_to_the_students_pictures(exported):
    target = exported
    checks = json.loads((target / "checks.json").read_text())
    assert checks["diffusers"] == 0 and checks["lora"] < 1e-3
    assert (target / "pipeline" / "tokenizer" / "merges.txt").is_file()
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(target / "pipeline")
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    assert not hasattr(pipeline.unet, "peft_config"), "the adapter must be fused and unloaded"


def test_the_models_card_says_how_to_use_it_whom_it_learned_from_and_how(exported, tiny_teachers):
    card = (exported / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1.0" in card and "CC0-1.0" in card
    for folder, guidance in zip(tiny_teachers, ("5", "1"), strict=True):  # 5 by the recipe, 2 by its card
        digest = evaluation.teacher_card(str(folder), folder).digest()
        assert f"| {folder.name} | lora | {guidance} | `{digest}` | CC0-1.0 |" in card
    for line in (
        "| trained | LoRA, rank 2, alpha 4 |",
        "| objective | mean, query all, student states |",
        "| teacher substeps | 1 (auto) between two states of the student |",
        "| updates | 2 (8 pictures) |",
        "| batch | 2 x 1 pictures a task and process |",
        "| learning rate | 0.01, constant, 0 updates of warm-up |",
        "| seed | 3 |",
    ):
        assert line in card
    assert "walked with the solver" not in card


def test_the_commands_say_what_they_made(finished):
    evaluated = CliRunner().invoke(app, ["evaluate", str(finished)])
    assert evaluated.exit_code == 0, evaluated.output
    said = [line.split()[0] for line in evaluated.output.splitlines() if line.startswith(("base ", "student "))]
    assert said.count("student") == 2 and "base" in said
    for row in scores_of(finished):
        assert f"{row['score']:.3f}" in evaluated.output
    assert "scores.json" in evaluated.output
    reported = CliRunner().invoke(app, ["report", str(finished)])
    assert reported.exit_code == 0 and "report.html" in reported.output


@pytest.mark.usefixtures("soon")
def test_a_full_student_is_exported_too_and_a_scheduler_override_travels_with_it(tmp_path, tiny_sd, tiny_teachers):
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, tiny_teachers[:1])
    scheduler = 'student.scheduler={class="DPMSolverMultistepScheduler", rescale_betas_zero_snr=false}'
    path = train(recipe, "student.train=full", "train.learning_rate=1e-4", "train.max_train_steps=1", scheduler)
    target = export_run(path)
    assert json.loads((target / "checks.json").read_text()) == {"diffusers": 0.0}
    assert not (target / "lora").exists()
    assert "DPMSolverMultistepScheduler" in (target / "pipeline" / "model_index.json").read_text()


@pytest.mark.usefixtures("soon")
def test_a_guided_student_with_negative_prompt_and_noisy_scheduler_goes_the_whole_road(
    tmp_path, tiny_sd, tiny_teachers, monkeypatch
):
    """LCM's scheduler draws noise at each step: a stranger must draw the same. Both sides keep a negative prompt."""
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, tiny_teachers[:1])
    path = train(
        recipe, 'student.scheduler={class="LCMScheduler"}', "student.guidance_scale=3.0",
        'student.negative_prompt="ugly"', 'teachers.0.call.negative_prompt="dull"', "train.max_train_steps=1",
    )  # fmt: skip
    asked, prompted = [], evaluation.Call.prompted

    def noted(call, prompts, **arguments):
        asked.append(prompted(call, prompts, **arguments).arguments)
        return prompted(call, prompts, **arguments)

    monkeypatch.setattr(evaluation.Call, "prompted", noted)
    evaluate_run(path, everything=True)
    told = {tuple(call["negative_prompt"]) for call in asked if "negative_prompt" in call and len(call["prompt"]) == 2}
    assert told == {("ugly", "ugly"), ("dull", "dull")}
    assert {row["model"] for row in scores_of(path)} == {"base", "teacher:dots", "student"}
    target = export_run(path)
    checks = json.loads((target / "checks.json").read_text())
    assert checks["diffusers"] == 0 and checks["lora"] < 1e-3
    card = (target / "README.md").read_text()
    assert "| negative prompt | ugly |" in card and "negative_prompt = 'dull'" in card


def test_a_student_of_a_run_without_checkpoint_is_refused(tmp_path, tiny_recipe):
    recipe = read_recipe(tiny_recipe, [])
    folder = RunFolder.create(tmp_path / "empty", recipe, {})
    with pytest.raises(UserError, match="no checkpoint"):
        student_pipeline(folder.path)


def test_off_policy_states_need_pictures_and_train_on_them(tmp_path, tiny_sd):
    from PIL import Image

    teacher = tiny.write_teacher(tmp_path / "shelf" / "dots", tiny_sd)
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [teacher])
    options = ['objective.states="data"', f'output_dir="{tmp_path}/off"']
    with pytest.raises(UserError, match="file_name"):
        train(recipe, *options[:1])
    prompts = teacher / "prompts"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(prompts / "red.png")
    for split in ("train", "test"):
        rows = [json.loads(line) | {"file_name": "red.png"} for line in (prompts / f"{split}.jsonl").open()]
        (prompts / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = train(recipe, *options)
    assert len([r for r in RunFolder.open(path).metrics() if r["kind"] == "update"]) == 2


def test_noised_data_states_have_the_paths_statistics():
    from diffopd.data_states import noised
    from diffopd.path import PATHS
    from diffopd.schedulers import Place

    latents, noise = torch.full((2, 4, 8, 8), 3.0), torch.zeros(2, 4, 8, 8)
    assert noised(latents, noise, Place(0.6, 0.0, PATHS["vp"])).mean() == pytest.approx(3 * 0.8)
    assert noised(latents, noise, Place(1.0, 0.0, PATHS["vp"])).abs().max() == 0
