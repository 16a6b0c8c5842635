"""Fine-tuning and DreamBooth in the loop of `tune`: pictures teach, and everything else is shared."""

import json
import weakref

import pytest
import torch
from PIL import Image
from run_helpers import assert_same_state, prepared, rows_of, state_of
from test_cli import command as run_cli
from tuning import SMALL, asked, trained

from diffopd import distill as loop
from diffopd import noise, prior, processes
from diffopd.data_states import encode_pictures
from diffopd.errors import UserError
from diffopd.locate import tune_recipe_names
from diffopd.plan import make_plan
from diffopd.preflight import check
from diffopd.prior import draw_prior
from diffopd.query import supervised_states
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch
from diffopd.tune import prepare, task_written, write_task
from diffopd.tune_facts import facts
from diffopd.tune_recipe import read_tune_recipe

CLASS = ['prior.class_prompt="a dot"', "prior.num_pictures=3"]
LEVELS = 50


def baseline(tiny_sd, pictures, method, *options, output=None):
    return prepare(asked(tiny_sd, pictures, f"method={method}", *options, output=output))


def assembled(tuning):
    write_task(tuning)
    draw_prior(tuning, lambda text: None)
    RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    return prepared(tuning.recipe)


def gradient_by_hand(run, slot, row, number, update=0):
    """Of |v - v(x0)|^2 at one level of a picture, with the scheduler's own alphas and the network called directly."""
    pipeline, seed = run.student.pipeline, run.recipe.seed
    (index,) = supervised_states({"random": 1}, LEVELS, seed=(seed, update, slot, number))
    pipeline.scheduler.set_timesteps(LEVELS)
    t = pipeline.scheduler.timesteps[index]
    picture = encode_pictures(pipeline, [row])
    keys = {"run_seed": seed, "update": update, "solver_step": index}
    eps = noise.draw(picture.shape[1:], **keys, sample_indices=[slot * run.rows_per_task + number])
    a = pipeline.scheduler.alphas_cumprod[t]
    x, v = a.sqrt() * picture + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * picture
    text, _ = pipeline.encode_prompt([row.prompt], "cpu", 1, False)
    said = pipeline.unet(x, t, text).sample
    return torch.autograd.grad((said - v).square().mean(), list(run.student.parameters.values()))


def gradient_of_update(run, state):
    loop.one_update(run, state, Watch())
    return [parameter.grad.clone() for parameter in run.student.parameters.values()]


def moved(run):
    """The adapter's second factors are zero at first, and half of its gradients with them."""
    with torch.no_grad():
        for name, parameter in run.student.parameters.items():
            parameter.add_(0.05 if "lora_B" in name else 0.0)


def assert_close(found, expected):
    scale = max(float(tensor.abs().max()) for tensor in expected)
    assert scale > 1e-4
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * max(scale, 1.0)


def test_an_update_of_sft_is_the_training_loss_of_the_base(tiny_sd, pictures):
    """Rows of an update have noise levels of their own, and their gradients are averaged."""
    tuning = baseline(tiny_sd, pictures, "sft", "train.max_grad_norm=1e9")
    run, state = assembled(tuning)
    moved(run)
    (teacher,) = run.teachers
    assert teacher.is_given and tuning.recipe.objective.name == "velocity" and run.rows_per_task == 2
    rows = [loop.pick_row(run, teacher, 0, 0, number) for number in range(2)]
    by_hand = [gradient_by_hand(run, 0, row, number) for number, row in enumerate(rows)]
    levels = {supervised_states({"random": 1}, LEVELS, seed=(0, 0, 0, number))[0] for number in range(2)}
    assert len(levels) == 2
    assert_close(gradient_of_update(run, state), [(a + b) / 2 for a, b in zip(*by_hand, strict=True)])


def test_dreambooth_adds_the_class_by_its_weight(tiny_sd, pictures):
    options = ("train.max_grad_norm=1e9", "train.batch_size=1", *CLASS, "prior.weight=0.5")
    run, state = assembled(baseline(tiny_sd, pictures, "dreambooth", *options))
    moved(run)
    assert [teacher.name for teacher in run.teachers] == ["pictures", "prior"]
    own, prior = (
        gradient_by_hand(run, slot, loop.pick_row(run, teacher, 0, slot, 0), 0)
        for slot, teacher in enumerate(run.teachers)
    )
    expected = [(a + 0.5 * b) / 1.5 for a, b in zip(own, prior, strict=True)]
    assert_close(gradient_of_update(run, state), expected)
    assert not torch.allclose(torch.cat([g.flatten() for g in own]), torch.cat([g.flatten() for g in expected]))


@pytest.fixture
def kept(pictures):
    file = pictures.parent / "kept.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a cat", "a dog")))
    return [f"prior.prompts={json.dumps(str(file))}", "prior.num_pictures=3"]


def test_under_d_opsd_the_untouched_model_teaches_what_is_kept_on_the_students_walk(tiny_sd, pictures, kept):
    tuning = prepare(asked(tiny_sd, pictures, *kept, "train.batch_size=1"))
    told = " ".join(dict(facts(tuning))["kept"].split())
    assert "3 pictures of prompts in" in told and "untouched model teaches" in told
    run, state = assembled(tuning)
    own, prior_teacher = run.teachers
    assert [own.name, prior_teacher.name] == ["itself", "prior"] and not prior_teacher.is_given
    assert [row.prompt for row in prior_teacher.train_rows] == ["a cat", "a dog", "a cat"]
    assert [row.prompt for row in prior_teacher.test_rows] == ["a cat", "a dog"]
    losses = loop.one_update(run, state, Watch()).per_teacher()
    assert losses["prior"] == pytest.approx(0, abs=1e-9) and losses["itself"] > 1e-5
    moved(run)
    assert loop.one_update(run, state, Watch()).per_teacher()["prior"] > 1e-6


def test_dreambooth_keeps_prompts_as_well_as_a_class(tiny_sd, pictures, kept):
    run, _ = assembled(baseline(tiny_sd, pictures, "dreambooth", *kept))
    assert [row.prompt for row in run.teachers[1].train_rows] == ["a cat", "a dog", "a cat"]
    drawn = [Image.open(row.metadata["file_name"]) for row in run.teachers[1].train_rows]
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_pictures_of_the_class_are_the_untouched_models_and_drawn_once(tiny_sd, pictures):
    tuning = baseline(tiny_sd, pictures, "dreambooth", *CLASS)
    write_task(tuning)
    draw_prior(tuning, lambda text: None)
    files = sorted((tuning.folder / "prior" / "pictures").iterdir())
    drawn = [file.read_bytes() for file in files]
    assert len(set(drawn)) == 3 and Image.open(files[0]).size == (32, 32)
    draw_prior(tuning, lambda text: pytest.fail("they are drawn again"))
    assert not write_task(tuning)
    files[1].unlink()
    draw_prior(tuning, lambda text: None)
    assert [file.read_bytes() for file in files] == drawn


def test_the_class_is_drawn_on_the_gpu_of_its_process_and_nothing_is_held_afterwards(tiny_sd, pictures, monkeypatch):
    tuning = baseline(tiny_sd, pictures, "dreambooth", *CLASS)
    write_task(tuning)
    untouched, held, done = prior._untouched, [], []

    def noted(recipe):
        pipeline = untouched(recipe)
        held.append(weakref.ref(pipeline.unet))
        done.append("loaded")
        return pipeline

    monkeypatch.setattr(prior, "_untouched", noted)
    monkeypatch.setattr(processes, "default_device", lambda: "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append(held[0]() is None))
    draw_prior(tuning, lambda text: None)
    assert done == [1, "loaded", True]


def test_a_picture_is_made_latents_once_a_run(tiny_sd, pictures, monkeypatch):
    run, state = assembled(baseline(tiny_sd, pictures, "sft"))
    made, encode = [], loop.encode_pictures
    monkeypatch.setattr(loop, "encode_pictures", lambda pipeline, rows: made.extend(rows) or encode(pipeline, rows))
    for _ in range(3):
        loop.one_update(run, state, Watch())
        state.progress.update += 1
    assert sorted(row.prompt for row in made) == sorted(row.prompt for row in run.teachers[0].train_rows)


@pytest.mark.parametrize("options", [["method=sft"], ["method=dreambooth", *CLASS, 'student.train="full"']])
def test_a_baseline_trains_over_buckets_and_resumes_exactly(tiny_sd, pictures, tmp_path, options):
    def run(updates, output):
        tuning = prepare(asked(tiny_sd, pictures, *options, f"train.max_train_steps={updates}", output=output))
        with task_written(tuning):
            draw_prior(tuning, lambda text: None)
        return trained(tuning)

    whole = run(3, tmp_path / "whole")
    run(2, tmp_path / "halves")
    assert_same_state(state_of(whole, 3), state_of(run(3, tmp_path / "halves"), 3))
    rows = rows_of(whole, "update")
    assert all(row["loss"] > 0 and row["network_calls"]["teacher"] == 0 for row in rows)
    assert rows[0]["network_calls"]["student"] == 2 * (1 + ("method=sft" not in options))
    assert all(len(states) == 1 for states in rows[0]["loss_per_step"].values())


@pytest.mark.parametrize("name", tune_recipe_names())
@pytest.mark.parametrize("method", ["sft", "dreambooth"])
def test_another_method_leaves_out_what_a_shipped_recipe_says_for_its_own(pictures, name, method):
    """Its levels are drawn evenly: a query that was written for the walk would name two of fifty."""
    own = read_tune_recipe(name, None, str(pictures))
    options = [f'method="{method}"', *(['prior.class_prompt="a dot"'] if not own.prior.is_given else [])]
    other = read_tune_recipe(name, None, str(pictures), options if method == "dreambooth" else options[:1])
    kept = {"prior"} if method == "dreambooth" or not own.prior.is_given else set()
    assert set(other.left_out) == {"teacher", "context", "objective", "prior"} - kept
    assert other.objective.query == {"random": 1} and other.objective.states == "data"
    assert (other.student, other.train, other.look) == (own.student, own.train, own.look)
    with pytest.raises(UserError, match=r"\[teacher\], \[context\](, \[prior\])? have no effect on method"):
        read_tune_recipe(name, None, str(pictures), [*options, "teacher.weights=frozen", "context.scale=1.0"])


def test_what_is_left_out_is_told_and_a_file_of_that_method_may_not_have_it(tiny_sd, pictures, tmp_path):
    file = tmp_path / "mine.toml"
    text = f'name = "mine"\n[student]\npretrained_model_name_or_path = "{tiny_sd}"\n[images]\nfolder = "pictures"\n'
    file.write_text(text + '[context]\nkind = "enhanced_prompt"\n[objective]\nquery = {indices = [0]}\n')
    told = " ".join(
        run_cli("tune", str(file), "--images", str(pictures), "--method", "sft", "--dry-run").output.split()
    )
    assert "left out [context], [objective] of mine.toml, which are of another method" in told
    assert "a picture's drawn evenly among them" in told
    file.write_text('method = "sft"\n' + text + "[objective]\nquery = {indices = [0]}\n")
    told = " ".join(run_cli("tune", str(file), "--images", str(pictures), "--dry-run").output.split())
    assert "levels of 50, those of {'indices': [0]}" in told and "left out" not in told
    file.write_text(file.read_text() + '[context]\nkind = "enhanced_prompt"\n')
    with pytest.raises(UserError, match=r"\[context\] has no effect"):
        read_tune_recipe(str(file), None, str(pictures))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["method=dreambooth"], "prior.class_prompt"),
        (["method=sft", "prior.weight=2.0"], r"\[prior\] has no effect on method = \"sft\""),
        (["method=sft", "teacher.weights=frozen"], r"\[teacher\] has no effect"),
        (["method=sft", "context.kind=enhanced_prompt"], r"\[context\] has no effect"),
        (["noising.num_levels=20"], r"\[noising\] has no effect on method = \"d-opsd\""),
        (["method=lora"], "is not allowed"),
        (["method=[1]"], "method"),
        (["prior.weight=2.0"], r"\[prior\] keeps nothing without prior.prompts"),
        (['prior.class_prompt="a"', 'prior.prompts="b.jsonl"'], "both say what is kept"),
        (['prior.prompts="b.jsonl"', 'student.init_weights="owner/lora"'], "taught by the base alone"),
        (["teacher.weights=frozen", 'student.init_weights="owner/lora"'], "is the base alone"),
        (["train.text_encoders=released"], 'Take "cached"'),
        (["student.rank=8", 'student.init_weights="owner/lora"'], "student.rank has no effect beside"),
    ],
)
def test_settings_without_effect_are_refused(tiny_sd, pictures, options, reason):
    with pytest.raises(UserError, match=reason):
        asked(tiny_sd, pictures, *options)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("objective.name=mean", "one of velocity, denoised, noise"),
        ("objective.states=student", 'states = "data"'),
        ("objective.substeps=2", "substeps = 1"),
    ],
)
def test_pictures_are_compared_at_noised_states_only(tiny_sd, pictures, option, reason):
    tuning = baseline(tiny_sd, pictures, "sft", option)
    write_task(tuning)
    with pytest.raises(UserError, match=reason):
        check(tuning.recipe)


def test_a_guided_student_is_tuned_without_guidance(tiny_sd, pictures):
    tuning = baseline(tiny_sd, pictures, "sft", "student.guidance_scale=3.0")
    assert tuning.recipe.teachers[0].guidance_scale == 1.0 and tuning.recipe.student.guidance_scale == 3.0
    write_task(tuning)
    assert make_plan(check(tuning.recipe)).evaluations_per_update == (2, 0)
    given = baseline(tiny_sd, pictures, "sft", "noising.guidance_scale=2.0", "student.guidance_scale=3.0")
    assert given.recipe.teachers[0].guidance_scale == 2.0


def test_few_steps_are_warned_of_and_many_are_not(tiny_sd, pictures):
    told = dict(facts(baseline(tiny_sd, pictures, "sft")))
    assert "draws mush in 2 steps" in told["warning"] and "SFT" in told["method"]
    assert "warning" not in dict(facts(baseline(tiny_sd, pictures, "sft", "student.num_inference_steps=20")))
    assert "warning" not in dict(facts(prepare(asked(tiny_sd, pictures))))


def test_the_plan_names_the_method_and_its_calls(tiny_sd, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(tiny_sd), "--images", str(pictures), "--method", "dreambooth", "--dry-run"]
    sets = [part for option in [*SMALL, *CLASS] for part in ("--set", option)]
    result = run_cli("tune", *options, *sets)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    for part in ("DreamBooth", "3 pictures of 'a dot', drawn first (6 network calls)", "draws mush", "50, a picture"):
        assert part in told
    assert "student 4, teachers 0 an update" in told and not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("soon")
def test_dreambooth_goes_the_whole_road(tiny_sd, pictures, tmp_path):
    run = tmp_path / "tuned"
    options = [*SMALL[:-1], "look.every=1", "look.num_prompts=2", "evaluate.num_prompts=1", *CLASS]
    sets = [part for option in options for part in ("--set", option)]
    told = ["tune", "--model", str(tiny_sd), "--images", str(pictures), "--method", "dreambooth", *sets]
    result = run_cli(*told, "--output-dir", str(run))
    assert result.exit_code == 0, result.output
    assert len(rows_of(RunFolder(run), "look")) == 2 and not (run / "teacher-check.png").exists()
    scores = json.loads((run / "evaluation" / "scores.json").read_text())["rows"]
    assert {(row["model"], row["task"]) for row in scores} >= {("student", "pictures"), ("student", "prior")}
    assert {row["num_inference_steps"] for row in scores} == {2}  # noise levels are no steps to draw in
    assert (run / "export" / "pipeline" / "unet").is_dir() and (run / "report.html").is_file()
    again = run_cli(*told, "--output-dir", str(run))
    assert again.exit_code == 0 and "is finished and nothing has changed" in " ".join(again.output.split())


def test_the_default_folder_says_the_method(tiny_sd, pictures):
    assert read_tune_recipe(None, str(tiny_sd), str(pictures), ["method=sft"]).output_dir == "runs/dots-sft"
