"""Tune: pictures become a task, and the run is a recipe of the one loop."""

import json
import shutil
import sys

import contexts
import pytest
import tiny
import torch
from PIL import Image
from run_helpers import assert_same_state, prepared, rows_of, state_of, weights_of
from safetensors.torch import load_file
from test_cli import command as run_cli
from tuning import SMALL, asked, trained

from diffopd import distill as loop
from diffopd.cli import app
from diffopd.data import PromptRow
from diffopd.errors import UserError
from diffopd.lock import at_work
from diffopd.preflight import check
from diffopd.run_folder import LOCK, RunFolder
from diffopd.tune import prepare, task_written, write_task
from diffopd.tune_facts import facts
from diffopd.tune_recipe import read_tune_recipe


def test_a_model_and_a_folder_are_enough_and_the_rest_is_the_papers(tiny_sd, pictures):
    recipe = read_tune_recipe(None, str(tiny_sd), str(pictures), [])
    assert recipe.name == "dots" and recipe.output_dir == "runs/dots"
    assert (recipe.student.rank, recipe.student.lora_alpha, recipe.objective.name) == (64, 128, "denoised")
    assert (recipe.train.batch_size, recipe.train.learning_rate) == (4, 1e-4)
    assert recipe.ema_decay == pytest.approx(0.9999, abs=2e-6)
    text = pictures.parent / "again.toml"
    text.write_text(recipe.source.text)
    assert read_tune_recipe(str(text), None, None).model_dump() == recipe.model_dump()


def test_a_recipe_file_takes_options_and_names_its_mistakes(tiny_sd, pictures, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(
        f'name = "mine"\n[student]\npretrained_model_name_or_path = "{tiny_sd}"\n[images]\nfolder = "dots"\n'
        "[look]\nevry = 3\n"
    )
    with pytest.raises(UserError, match=r'my\.toml:7: unknown key look\.evry.*"every"'):
        read_tune_recipe(str(file), None, None)
    file.write_text(file.read_text().replace("evry", "every"))
    recipe = read_tune_recipe(str(file), None, None, ['images.instance_prompt="a 😀"'])
    assert recipe.images.folder == str(pictures) and recipe.look.every == 3
    assert recipe.images.instance_prompt == "a 😀"
    with pytest.raises(UserError, match=r"z-image-turbo.toml: which pictures\? Give --images FOLDER"):
        read_tune_recipe("z-image-turbo", None, None)
    with pytest.raises(UserError, match="^command line: nowhere/model: no local folder"):
        prepare(read_tune_recipe(None, "nowhere/model", str(pictures)))
    with pytest.raises(UserError, match="name is missing"):
        file.write_text("[look]\n")
        read_tune_recipe(str(file), "a", "b")


@pytest.mark.parametrize("updates", [10, 100, 5000])
def test_the_average_ends_up_18_percent_of_the_way_whatever_the_length(tiny_sd, pictures, updates):
    recipe = asked(tiny_sd, pictures, f"train.max_train_steps={updates}")
    assert 1 - recipe.ema_decay**updates == pytest.approx(0.18, abs=1e-4)
    assert asked(tiny_sd, pictures, "teacher.ema_decay=0.5").ema_decay == 0.5
    assert asked(tiny_sd, pictures, 'teacher.weights="live"').ema_decay == 0.0
    with pytest.raises(UserError, match="number of updates"):
        _ = asked(tiny_sd, pictures, "train.max_train_steps=0", "train.max_train_seconds=5.0").ema_decay


def test_the_context_falls_to_the_second_caption_or_is_explained(tiny_sd, pictures, ip_options):
    assert prepare(asked(tiny_sd, pictures)).context.kind == "enhanced_prompt"
    assert prepare(asked(tiny_sd, pictures, *ip_options)).context.kind == "ip_adapter"
    gone = json.dumps(str(pictures / "ip.safetensors"))
    with pytest.raises(UserError, match=r"--set context.ip_adapter=.*there is no file or folder .*ip\.safetensors"):
        prepare(asked(tiny_sd, pictures, *ip_options, f"context.ip_adapter={gone}"))
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in line.items() if k != "enhanced_text"} for line in lines]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, plain)))
    with pytest.raises(UserError, match="(?s)needs ip_adapter.*Or do without a picture"):
        prepare(asked(tiny_sd, pictures))
    with pytest.raises(UserError, match="not every picture has one"):
        prepare(asked(tiny_sd, pictures, "context.kind=enhanced_prompt"))


def test_a_model_that_comes_with_an_ip_adapter_needs_no_more_words(tiny_sd, pictures, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "seeing")
    file, encoder = contexts.save_ip_adapter(model, tiny.build_pipeline().unet)
    file.rename(model / "ip-adapter.safetensors")
    encoder.rename(model / "image_encoder")
    context = prepare(asked(model, pictures)).context
    assert context.kind == "ip_adapter"
    assert context.ip_adapter == str(model / "ip-adapter.safetensors")
    assert context.image_encoder == str(model / "image_encoder")
    assert prepare(asked(model, pictures, "context.kind=enhanced_prompt")).context.kind == "enhanced_prompt"
    (model / "ip-adapter-face.safetensors").touch()
    assert prepare(asked(model, pictures)).context.kind == "enhanced_prompt"


def test_a_task_is_a_teacher_folder_that_names_pictures_and_buckets(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    assert write_task(tuning) and not write_task(tuning)
    parts = check(tuning.recipe)
    (card,) = parts.cards
    rows = parts.train_rows["itself"]
    assert card.form == "ema" and [row.bucket for row in rows] == [(32, 32), (40, 24), (32, 32)]
    assert rows[0].metadata["file_name"] == str((pictures / "0.png").resolve())
    assert [row.prompt for row in parts.test_rows["itself"]] == [row.prompt for row in rows]
    told = dict(facts(tuning))["teacher"]
    assert told.endswith("decay 0.90553851 an update: after 2 updates its beginning still weighs 82%")
    assert dict(facts(tuning))["sizes"].startswith("32 x 32: 2, 40 x 24: 1")


def test_a_model_is_not_guided_unless_it_is_asked_for(pictures):
    """Z-Image guides from above 0, others from above 1."""

    def prepared(*asked_for):
        options = ["context.kind=enhanced_prompt", *asked_for]
        told = read_tune_recipe(None, "Tongyi-MAI/Z-Image-Turbo", str(pictures), options)
        return prepare(told, pictures.parent / "task", shipped=True).recipe

    assert prepared().student.guidance_scale == prepared().teachers[0].guidance_scale == 0.0
    assert prepared("student.guidance_scale=1.0").student.guidance_scale == 1.0


def test_a_call_that_the_pipeline_refuses_is_named(tiny_sd, pictures):
    for method in ("d-opsd", "sft"):
        with pytest.raises(UserError, match="student.call.*cannot be called like this: .*divisible by 8"):
            prepare(asked(tiny_sd, pictures, "student.call={height = 33, width = 32}", f"method={method}"))


def test_without_buckets_every_picture_is_square(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures, "images.aspect_buckets=false", "images.resolution=20"))
    assert tuning.buckets == [(16, 16)] * 3
    assert tuning.recipe.student.call == {"width": 16, "height": 16}
    with pytest.raises(UserError, match="resolution = 3 is below 8"):
        prepare(asked(tiny_sd, pictures, "images.resolution=3"))


def test_other_pictures_are_refused_once_a_run_has_begun(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    folder.append_metrics({"kind": "update", "update": 1})
    Image.new("RGB", (16, 16), "yellow").save(pictures / "1.png")
    with pytest.raises(UserError, match=r"task/prompts/train.jsonl differs"):
        write_task(prepare(asked(tiny_sd, pictures)))


def test_after_a_failed_check_the_same_folder_takes_other_captions_and_contexts(tiny_sd, pictures, ip_options):
    tuning = prepare(asked(tiny_sd, pictures))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    assert folder.recipe().teachers[0].context.kind == "enhanced_prompt"
    for name in ("teacher-check.png", "teacher-check.json"):
        (folder.path / name).write_text("no better")
    Image.new("RGB", (16, 16), "yellow").save(pictures / "1.png")
    other = prepare(asked(tiny_sd, pictures, *ip_options))
    assert write_task(other)
    assert folder.recipe().teachers[0].context.kind == "enhanced_prompt"
    taken = RunFolder.create(other.recipe.output_dir, other.recipe, {})
    assert taken.recipe().teachers[0].context.kind == "ip_adapter"


def test_an_error_before_the_run_leaves_nothing_behind(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    with pytest.raises(UserError, match="later"), task_written(tuning):
        assert tuning.folder.is_dir()
        raise UserError("later")
    assert not tuning.folder.parent.exists()


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["ip"],
        ["ip", 'teacher.weights="frozen"', "objective.name=velocity"],
        ["ip", 'student.train="full"', "train.learning_rate=1e-4", "student.guidance_scale=2.0"],
    ],
)
def test_a_run_trains_over_buckets_and_resumes_exactly(tiny_sd, pictures, ip_options, monkeypatch, tmp_path, extra):
    """Under every context and kind of teacher: finite losses, moved weights, 2 + 1 updates as 3."""
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    options = [*extra, *(ip_options if "ip" in extra else []), "teacher.ema_decay=0.5"]
    options = [option for option in options if option != "ip"]
    if 'teacher.weights="frozen"' in options:
        options.remove("teacher.ema_decay=0.5")
    steps = "train.max_train_steps="
    whole = trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}3", output=tmp_path / "whole")))
    trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}2", output=tmp_path / "halves")))
    halves = trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}3", output=tmp_path / "halves")))
    assert_same_state(state_of(whole, 3), state_of(halves, 3))
    before, after = (load_file(whole.path / f"checkpoint-{n}" / "state" / "parameters.safetensors") for n in (1, 3))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not any("_ip" in name or "processor" in name for name in before)
    assert all(row["loss"] > 0 for row in rows_of(whole, "update"))


def test_the_student_of_a_tuning_run_is_the_untouched_pipeline_at_first(tiny_sd, pictures, ip_options):
    """Bit-equal pictures at every bucket's size, with the teacher's adapter in place."""
    tuning = prepare(asked(tiny_sd, pictures, *ip_options))
    with task_written(tuning):
        run, _ = prepared(tuning.recipe)
    plain = tiny.load_pipeline(tiny_sd)
    for size in {row.bucket for row in run.teachers[0].train_rows}:
        told = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np", **loop.told_size(size)}
        latents = torch.randn(1, *run.walk_at(size).shape, generator=torch.Generator().manual_seed(1))
        student = run.student.pipeline("a dot", latents=latents, **told).images
        assert (student == plain("a dot", latents=latents, **told).images).all()


def test_the_trajectory_is_drawn_at_rows_that_the_teacher_can_see(tiny_sd, pictures, ip_options):
    folder = trained(prepare(asked(tiny_sd, pictures, *ip_options, "train.max_train_steps=1")))
    entries = json.loads((folder.path / "samples" / "trajectory.json").read_text())
    assert len(entries) == 3 * 2 * 2
    sizes = {Image.open(folder.path / "samples" / entry["file"]).size for entry in entries}
    assert sizes == {(32, 32), (40, 24)}


def test_rows_of_one_size_are_walked_together_whatever_their_order():
    rows = [PromptRow(str(i), {"bucket": [16, 16 if i % 2 else 20]}) for i in range(5)]
    from diffopd.batches import micro_batches

    numbers = [batch for batch, _ in micro_batches(list(enumerate(rows)), 2)]
    assert numbers == [[0, 2], [4], [1, 3]]
    assert [batch for batch, _ in micro_batches(list(enumerate(rows)), 1)] == [[0], [2], [4], [1], [3]]


def test_a_dry_run_knows_a_run_that_was_begun_from_another(tiny_sd, pictures, tmp_path):
    recipe = prepare(asked(tiny_sd, pictures, output=tmp_path / "run")).recipe
    RunFolder.create(recipe.output_dir, recipe, {}).append_metrics({"kind": "update", "update": 1})
    sets = [part for option in SMALL for part in ("--set", option)]
    told = ["tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--output-dir", recipe.output_dir]
    assert run_cli(*told, "--dry-run").exit_code == 0
    result = run_cli(*told, "--dry-run", "--set", "seed=9")
    assert result.exit_code == 2 and "holds another run: seed was" in result.output


def test_the_command_prints_the_plan_and_writes_nothing(tiny_sd, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [part for option in SMALL for part in ("--set", option)]
    result = run_cli("tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("3 from", "32 x 32: 2", "decay 0.90553851", "enhanced prompt", "denoised", "LoRA, rank 2"):
        assert part in result.output
    assert not (tmp_path / "runs").exists()
    (pictures / "1.png").write_bytes(b"")
    result = run_cli("tune", "--model", str(tiny_sd), "--images", str(pictures), *sets)
    assert result.exit_code == 2 and "metadata.jsonl:2" in result.output and not (tmp_path / "runs").exists()
    assert "Tune which pictures?" in run_cli("tune", "--model", str(tiny_sd)).output
    assert "Tune which model?" in run_cli("tune", "--images", str(pictures)).output
    said = run_cli("tune", "--model", str(tiny_sd), "--images", str(pictures), "--method", "dreamboth").output
    assert "--method dreamboth" in said and 'Did you mean "dreambooth"?' in " ".join(said.split())


def test_a_folder_in_which_another_process_works_gets_no_task(tiny_sd, pictures, tmp_path):
    sets = [part for option in SMALL for part in ("--set", option)]
    with at_work(tmp_path / "run", print):
        result = run_cli(
            "tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--output-dir", str(tmp_path / "run")
        )
        assert result.exit_code == 2 and "is in use" in result.stderr
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.usefixtures("soon")
def test_the_command_goes_the_whole_road(tiny_sd, pictures, tmp_path, ip_options):
    sets = [part for option in [*SMALL[:-1], "look.every=1", "look.num_prompts=2"] for part in ("--set", option)]
    sets += [part for option in [*ip_options, "evaluate.num_prompts=2"] for part in ("--set", option)]
    run = tmp_path / "tuned"
    result = run_cli(
        "tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--force", "--output-dir", str(run)
    )
    assert result.exit_code == 0, result.output
    folder = RunFolder(run)
    assert len(rows_of(folder, "look")) == 2 and (run / "teacher-check.png").is_file()
    scores = json.loads((run / "evaluation" / "scores.json").read_text())["rows"]
    assert {row["model"] for row in scores} == {"base", "student"}
    saved = json.loads((run / "export" / "pipeline" / "unet" / "config.json").read_text())
    assert saved["encoder_hid_dim_type"] is None and not (run / "export" / "pipeline" / "image_encoder").exists()
    names = load_file(run / "export" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert names == load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors").keys()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "A picture here and in ordinary fine-tuning" in page
    assert "pictures" not in json.loads((run / "cost.json").read_text())["sft"]  # made latents once a run
    assert "Tuned on pictures" in page and "by image encoder" in page and 'alt="before and now"' in page


@pytest.mark.slow
def test_tuning_in_two_processes_is_tuning_with_a_doubled_batch(tiny_sd, pictures, tmp_path, monkeypatch):
    """With prompts to keep and looks: the same weights, the same looks, all calls counted."""
    options = ['prior.class_prompt="a dot"', "prior.num_pictures=3", "look.every=1", "look.num_prompts=2"]
    options = [*(one for one in SMALL if not one.startswith("look.")), *options, "evaluate.num_prompts=1"]
    sets = [part for option in options for part in ("--set", option)]
    for name, size in (("one", 4), ("two", 2)):
        words = ["tune", "--model", str(tiny_sd), "--images", str(pictures), "--output-dir", str(tmp_path / name)]
        words += ["--processes", str(4 // size), "--force", *sets, "--set", f"train.batch_size={size}"]
        monkeypatch.setattr(sys, "argv", ["diffopd", *words])
        with pytest.raises(SystemExit) as ended:
            app()
        assert not ended.value.code and (tmp_path / name / "report.html").is_file()
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    for name, weights in weights_of(one, 2).items():
        torch.testing.assert_close(weights, weights_of(two, 2)[name], rtol=1e-3, atol=1e-5)
    looks = [[row["drift"] for row in rows_of(folder, "look")] for folder in (one, two)]
    assert looks[0] == pytest.approx(looks[1], abs=1e-3) and max(looks[0]) > 0
    counted = [[row["network_calls"] for row in rows_of(folder, "update")] for folder in (one, two)]
    assert counted[0] == counted[1]
