"""The loop: batch splits and processes are one class, resume is exact, stops and failures are said."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffopd import distill as loop
from diffopd.errors import UserError
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch

ROOT = Path(__file__).resolve().parents[1]


def recipe_with(path, *overrides):
    return read_recipe(path, list(overrides))


def prepared(recipe):
    """The loop's run and trained state, before any update."""
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), loop.Processes(), "cpu")
    return run, loop._trained(run)


def gradients_of(recipe):
    run, trained = prepared(recipe)
    loop.one_update(run, trained, Watch())
    return {name: p.grad.clone() for name, p in run.student.parameters.items()}


def run_to_end(recipe):
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    loop.distill(recipe, folder)
    return folder


def rows_of(folder, kind):
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def weights_of(folder, update):
    return load_file(folder.path / f"checkpoint-{update}" / "pytorch_lora_weights.safetensors")


def assert_same_gradients(a, b):
    scale = max(float(g.abs().max()) for g in a.values())
    assert scale > 0
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-5 * scale, name


NO_CLIP = "train.max_grad_norm=1e9"


def test_gradients_of_one_update_do_not_depend_on_the_batch_split(tiny_recipe):
    whole = gradients_of(recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=8"))
    split = gradients_of(recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=2", "train.gradient_accumulation_steps=4"))
    assert_same_gradients(whole, split)


def test_uneven_micro_batches_weigh_rows_by_count(tiny_recipe, monkeypatch):
    """7 rows as 7 or as 3 + 3 + 1."""
    whole = recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=7")
    uneven = recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=3")
    expected = gradients_of(whole)
    monkeypatch.setattr(loop.Run, "rows_per_task", property(lambda run: 7))
    assert_same_gradients(expected, gradients_of(uneven))


def test_gradients_of_one_update_are_equal_with_two_processes(tiny_recipe, tmp_path):
    whole = gradients_of(recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=8"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "two_processes.py"
    target = tmp_path / "gradients.safetensors"
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(script), str(tiny_recipe), str(target), NO_CLIP, "train.batch_size=4"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    assert_same_gradients(whole, load_file(target))


def test_streaming_and_two_pass_updates_are_equal(tiny_recipe):
    one = gradients_of(recipe_with(tiny_recipe, NO_CLIP))
    other = gradients_of(recipe_with(tiny_recipe, NO_CLIP, 'train.mode="two_pass"'))
    assert_same_gradients(one, other)


def test_a_run_writes_rows_checkpoints_and_pictures(tiny_recipe):
    folder = run_to_end(recipe_with(tiny_recipe, "train.validate_every=1"))
    updates = rows_of(folder, "update")
    assert [row["update"] for row in updates] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in updates)
    assert set(updates[0]["loss_per_teacher"]) == {"dots", "lines"}
    assert all(len(states) == 2 for states in updates[0]["loss_per_step"].values())
    assert len(rows_of(folder, "validation")) == 2
    assert "max_train_steps" in rows_of(folder, "stop")[0]["reason"]
    assert (folder.path / "checkpoint-1").is_dir() and (folder.path / "checkpoint-2").is_dir()
    entries = json.loads((folder.path / "samples" / "trajectory.json").read_text())
    assert {entry["side"] for entry in entries} == {"student", "teacher"}
    assert all((folder.path / "samples" / entry["file"]).is_file() for entry in entries)


def test_distilling_towards_a_teacher_lowers_the_held_out_loss(tiny_recipe):
    recipe = recipe_with(
        tiny_recipe, "train.max_train_steps=20", "train.validate_every=10", "train.learning_rate=1e-2",
        "train.checkpointing_steps=100",
    )  # fmt: skip
    folder = run_to_end(recipe)
    losses = [row["loss"] for row in rows_of(folder, "validation")]
    assert losses[1] < losses[0] < rows_of(folder, "update")[0]["loss"] * 1.5


@pytest.mark.parametrize("extra", [[], ["train.ema_decay=0.9"], ['student.train="full"', "train.learning_rate=1e-4"]])
def test_resume_is_exact(tiny_recipe, tmp_path, extra):
    """4 updates in one go and 2 + 2 give bit-equal weights."""
    whole = recipe_with(tiny_recipe, f'output_dir="{tmp_path}/whole"', "train.max_train_steps=4", *extra)
    run_to_end(whole)
    halves = f'output_dir="{tmp_path}/halves"'
    run_to_end(recipe_with(tiny_recipe, halves, "train.max_train_steps=2", *extra))
    folder = run_to_end(recipe_with(tiny_recipe, halves, "train.max_train_steps=4", *extra))
    one = load_file(tmp_path / "whole" / "checkpoint-4" / "state" / "parameters.safetensors")
    two = load_file(tmp_path / "halves" / "checkpoint-4" / "state" / "parameters.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["update"] for row in rows_of(folder, "update")] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_rank_is_refused(tiny_recipe, tmp_path):
    run_to_end(recipe_with(tiny_recipe))
    run, trained = prepared(recipe_with(tiny_recipe, "student.rank=3"))
    with pytest.raises(UserError, match="rank"):
        loop.load_checkpoint(tmp_path / "run" / "checkpoint-2", trained)


def test_the_checkpoint_holds_the_average_where_one_is_kept(tiny_recipe):
    folder = run_to_end(recipe_with(tiny_recipe, "train.ema_decay=0.999"))
    state = folder.path / "checkpoint-2" / "state"
    average, trained = load_file(state / "average.safetensors"), load_file(state / "parameters.safetensors")
    deployed = weights_of(folder, 2)
    down = next(name for name in average if name.endswith("lora_A.student.weight"))
    match = [v for v in deployed.values() if v.shape == average[down].shape and torch.equal(v, average[down])]
    assert match and not torch.equal(average[down], trained[down])


def test_a_loss_that_is_not_finite_stops_the_run_names_the_place_and_keeps_the_checkpoint(tiny_recipe, monkeypatch):
    recipe = recipe_with(tiny_recipe, "train.max_train_steps=3")
    real = loop.walk_rows
    broken = {"on": False}

    def walk(run, teacher, rows, numbers, *, update, **options):
        losses = real(run, teacher, rows, numbers, update=update, **options)
        if update == 2 and teacher.name == "lines":
            losses[1].loss[0] = float("nan")
            broken["on"] = True
        return losses

    monkeypatch.setattr(loop, "walk_rows", walk)
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(UserError, match=r"'lines'.*update 2, step 1 \(sigma 0\.\d+\)"):
        loop.distill(recipe, folder)
    assert broken["on"]
    assert folder.latest_checkpoint().name == "checkpoint-2"
    assert all(torch.isfinite(v).all() for v in weights_of(folder, 2).values())


def test_a_broken_teacher_is_named_before_training(tiny_recipe, tiny_teachers, tmp_path):
    import shutil

    import tiny

    shelf = tmp_path / "shelf"
    shutil.copytree(tiny_teachers[0], shelf / "dots")
    file = shelf / "dots" / "pytorch_lora_weights.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    broken = {name: torch.full_like(value, float("nan")) for name, value in load_file(file).items()}
    save_file(broken, file, metadata=metadata)
    toml = (shelf / "dots" / "teacher.toml").read_text().splitlines()
    (shelf / "dots" / "teacher.toml").write_text("\n".join(x for x in toml if not x.startswith("sha256")) + "\n")
    base = recipe_with(tiny_recipe).student.pretrained_model_name_or_path
    recipe = recipe_with(tiny.write_recipe(tmp_path / "broken" / "r.toml", base, [shelf / "dots"]))
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(UserError, match="'dots' is not finite"):
        loop.distill(recipe, folder)
    assert folder.latest_checkpoint() is None


def test_tasks_of_a_round_are_a_function_of_seed_and_update(tiny_recipe):
    recipe = recipe_with(tiny_recipe, "train.tasks_per_update=1", "teachers.0.weight=3.0")
    run, _ = prepared(recipe)
    first = [loop.route(recipe, run.teachers, update)[0][0].name for update in range(400)]
    again = [loop.route(recipe, run.teachers, update)[0][0].name for update in reversed(range(400))][::-1]
    assert first == again
    assert 0.68 < first.count("dots") / 400 < 0.82


def test_each_pass_over_the_prompts_visits_every_row_once_in_another_order(tiny_recipe):
    run, _ = prepared(recipe_with(tiny_recipe))
    teacher = run.teachers[0]
    passes = []
    for epoch in range(4):
        seen = [loop.pick_row(run, teacher, 2 * epoch + u, 0, n) for u in (0, 1) for n in (0, 1)]
        passes.append([row.prompt for row in seen])
        assert sorted(passes[-1]) == sorted(row.prompt for row in teacher.train_rows)
    assert len({tuple(p) for p in passes}) > 1


def test_the_run_stops_when_the_held_out_loss_no_longer_falls(tiny_recipe):
    settings = ["train.max_train_steps=50", "train.validate_every=1", "train.patience=2", "train.learning_rate=1e-12"]
    folder = run_to_end(recipe_with(tiny_recipe, *settings))
    assert "has not fallen" in rows_of(folder, "stop")[0]["reason"]
    assert rows_of(folder, "update")[-1]["update"] < 50


def test_the_run_stops_by_time(tiny_recipe):
    folder = run_to_end(recipe_with(tiny_recipe, "train.max_train_steps=0", "train.max_train_seconds=0.5"))
    assert "max_train_seconds" in rows_of(folder, "stop")[0]["reason"]


@pytest.mark.parametrize("form", ["full", "base", "ema"])
def test_every_teacher_form_teaches(form, tiny_sd, tiny_teachers, tmp_path):
    import tiny

    other = tiny.write_teacher(tmp_path / "shelf" / f"by_{form}", tiny_sd, form=form)
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [tiny_teachers[0], other])
    folder = run_to_end(recipe_with(path, "train.learning_rate=1e-2"))
    last = rows_of(folder, "update")[-1]
    assert last["loss_per_teacher"][f"by_{form}"] > 0


def test_fused_teachers_teach_what_their_adapters_do(tiny_recipe):
    shared = gradients_of(recipe_with(tiny_recipe))
    fused = recipe_with(tiny_recipe, "train.fuse_teachers=true")
    run, _ = prepared(fused)
    layers = [type(module).__name__ for t in run.teachers for module in t.call.pipeline.unet.modules()]
    assert not any(name.startswith("lora") or "Lora" in name for name in layers)
    own = gradients_of(fused)
    scale = max(float(g.abs().max()) for g in shared.values())
    assert max(float((own[name] - shared[name]).abs().max()) for name in shared) <= 1e-4 * scale
    base = gradients_of(recipe_with(tiny_recipe, "teachers.0.guidance_scale=9.0"))
    assert max(float((base[name] - shared[name]).abs().max()) for name in shared) > 1e-2 * scale


def test_an_ema_teacher_follows_the_student(tiny_sd, tmp_path):
    import tiny

    other = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema", guidance_scale=3.0)
    recipe = recipe_with(tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [other]), "teachers.0.ema_decay=0.5")
    run, trained = prepared(recipe)
    average, written = run.teachers[0].follow
    start = {name: p.detach().clone() for name, p in run.student.parameters.items()}
    assert all(torch.equal(written[name], start[name]) for name in start)
    loop.one_update(run, trained, Watch())
    moved = [name for name, p in run.student.parameters.items() if not torch.equal(p, start[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(written[name], 0.5 * start[name] + 0.5 * run.student.parameters[name].detach())
        assert not written[name].requires_grad


def test_learning_rate_warms_up_and_falls_as_a_cosine(tiny_recipe):
    recipe = recipe_with(
        tiny_recipe, "train.lr_warmup_steps=10", 'train.lr_scheduler="cosine"', "train.max_train_steps=100"
    )
    factors = [loop.learning_rate_factor(recipe, loop.Progress(update=u)) for u in (0, 9, 50, 99)]
    assert factors[0] == pytest.approx(0.1, rel=1e-2)
    assert factors[1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.09)))
    assert factors[2] == pytest.approx(0.5)
    assert factors[3] < 0.01


def test_trackers_get_the_numbers_of_every_row(tiny_recipe):
    pytest.importorskip("tensorboard")
    folder = run_to_end(recipe_with(tiny_recipe, 'train.report_to=["tensorboard"]'))
    assert list((folder.path / "tensorboard").rglob("events.*"))


def test_a_tracker_or_backend_that_is_not_there_is_named_before_training(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=r"diffopd\[xformers\]"):
        run_to_end(recipe_with(tiny_recipe, 'train.attention_backend="xformers"', f'output_dir="{tmp_path}/a"'))
    pytest.importorskip("accelerate")
    if not __import__("importlib.util").util.find_spec("trackio"):
        with pytest.raises(UserError, match=r"diffopd\[trackio\]"):
            run_to_end(recipe_with(tiny_recipe, 'train.report_to=["trackio"]', f'output_dir="{tmp_path}/b"'))


def test_the_command_in_two_processes_is_the_command_with_a_doubled_batch(tiny_recipe, tmp_path):
    """`--processes 2` at batch 2 and one process at batch 4 train the same weights."""
    paths = {}
    for name, extra in {"one": ["--set", "train.batch_size=4"], "two": ["--processes", "2"]}.items():
        paths[name] = tmp_path / name
        command = [sys.executable, "-m", "diffopd.cli", "distill", str(tiny_recipe), "--output-dir", str(paths[name])]
        done = subprocess.run([*command, *extra], capture_output=True, text=True, cwd=ROOT, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (paths[name] / "report.html").is_file()
    one, two = (load_file(path / "checkpoint-2" / "pytorch_lora_weights.safetensors") for path in paths.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_a_failing_process_ends_the_others_with_its_exit_code(tiny_recipe, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    command = [sys.executable, "-m", "diffopd.cli", "distill", str(tiny_recipe), "--processes", "2"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "full")], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_bf16_autocast_gives_the_float32_gradients_to_bf16_precision(tiny_recipe):
    plain = gradients_of(recipe_with(tiny_recipe, NO_CLIP))
    recipe = recipe_with(tiny_recipe, NO_CLIP, 'train.mixed_precision="bf16"')
    run, trained = prepared(recipe)
    with loop.autocast_forward(loop.denoiser_of(run.student.pipeline), torch.bfloat16):
        loop.one_update(run, trained, Watch())
    a = torch.cat([g.flatten() for g in plain.values()])
    b = torch.cat([p.grad.flatten() for p in run.student.parameters.values()])
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99


def test_a_task_drawn_twice_in_one_update_is_asked_other_prompts(tiny_recipe):
    run, _ = prepared(recipe_with(tiny_recipe, "train.tasks_per_update=2"))
    teacher = run.teachers[0]
    first, second = ([loop.pick_row(run, teacher, 0, slot, n).prompt for n in (0, 1)] for slot in (0, 1))
    assert set(first).isdisjoint(second)
