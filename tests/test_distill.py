"""The loop: batch splits and processes are one class, resume is exact, stops and failures are said."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from limits import largest_file
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffopd import checkpoint, log
from diffopd import distill as loop
from diffopd import loop as common
from diffopd.cli import app
from diffopd.errors import UserError
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import StateLoss, Watch

ROOT = Path(__file__).resolve().parents[1]


def recipe_with(path, *overrides):
    return read_recipe(path, list(overrides))


def prepared(recipe):
    """The loop's run and trained state, before any update."""
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), loop.Processes(), "cpu")
    return run, loop.new_trained(run)


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


def state_of(folder, update):
    """Every tensor and counter of a checkpoint but the seconds, which no two runs share."""
    state = folder.path / f"checkpoint-{update}" / "state"
    tensors = {f"{file.stem}/{k}": v for file in state.glob("*.safetensors") for k, v in load_file(file).items()}
    counters = json.loads((state / "progress.json").read_text())
    return tensors, {k: v for k, v in counters.items() if k != "seconds"}


def assert_same_state(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


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


def test_two_processes_are_one_in_gradients_schedules_and_ends(tiny_recipe, tmp_path):
    """Also where their clocks, their held-out losses and who gets Ctrl-C differ (see two_processes.py)."""
    whole = gradients_of(recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=8"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "two_processes.py"
    target = tmp_path / "gradients.safetensors"
    started, outputs = [], []
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
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    assert_same_gradients(whole, load_file(target))
    ends = [json.loads(target.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    assert (
        ends[0]
        == ends[1]
        == {
            "clock": {"reason": "reached max_train_seconds = 3.5", "updates": 4, "apart": 0.0},
            "held-out loss": {"reason": "the held-out loss has not fallen for 2 checks", "updates": 2, "apart": 0.0},
            "Ctrl-C": {"reason": loop.INTERRUPTED, "updates": 2, "apart": 0.0},
            "copied from main": [1.0, 1.0, 1.0],
        }
    )


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


@pytest.mark.parametrize(
    "extra",
    [
        ["train.tasks_per_update=1", "train.validate_every=1"],
        ["train.ema_decay=0.9", 'train.tasks_per_update="round_robin"'],
        ['student.train="full"', "train.learning_rate=1e-4", "train.ema_decay=0.9"],
    ],
)
def test_resume_is_exact(tiny_sd, tiny_teachers, tmp_path, monkeypatch, extra):
    """3 updates in one go and 2 + 1 give bit-equal parameters, averages, optimizer and counters."""
    me = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema", guidance_scale=3.0)
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [tiny_teachers[0], me])
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    options = [*extra, "teachers.1.ema_decay=0.5", "train.checkpointing_steps=9"]
    whole = run_to_end(recipe_with(path, f'output_dir="{tmp_path}/whole"', "train.max_train_steps=3", *options))
    halves = f'output_dir="{tmp_path}/halves"'
    run_to_end(recipe_with(path, halves, "train.max_train_steps=2", *options))
    folder = run_to_end(recipe_with(path, halves, "train.max_train_steps=3", *options))
    assert_same_state(state_of(whole, 3), state_of(folder, 3))
    kinds = {"parameters", "optimizer", "self_teacher"} | ({"average"} if "train.ema_decay=0.9" in extra else set())
    assert {name.split("/")[0] for name in state_of(folder, 3)[0]} == kinds
    assert [row["update"] for row in rows_of(folder, "update")] == [1, 2, 3]


@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(update, times): Ctrl-C right after the optimizer has stepped for that update (from 0)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    follow = loop._follow

    def press(update, times):
        def interrupted(run, trained, *, moved):
            follow(run, trained, moved=moved)
            for _ in range(times * (moved and trained.progress.update == update)):
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(loop, "_follow", interrupted)

    yield press
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_between_optimizer_and_counter_is_resumed_exactly(tiny_recipe, tmp_path, ctrl_c):
    whole = run_to_end(recipe_with(tiny_recipe, f'output_dir="{tmp_path}/whole"', "train.max_train_steps=3"))
    ctrl_c(1, times=1)
    recipe = recipe_with(tiny_recipe, f'output_dir="{tmp_path}/broken"', "train.max_train_steps=3")
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    assert not loop.distill(recipe, folder)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert folder.latest_checkpoint().name == "checkpoint-2"
    assert rows_of(folder, "stop")[0]["reason"] == loop.INTERRUPTED
    run_to_end(recipe)
    assert_same_state(state_of(whole, 3), state_of(folder, 3))


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tiny_recipe, ctrl_c):
    ctrl_c(1, times=2)
    recipe = recipe_with(tiny_recipe, "train.max_train_steps=3")
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(KeyboardInterrupt):
        loop.distill(recipe, folder)
    assert folder.latest_checkpoint().name == "checkpoint-1"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_the_last_save_still_ends_the_command(tiny_recipe, monkeypatch, ctrl_c):
    save = common.save_checkpoint
    monkeypatch.setattr(common, "save_checkpoint", lambda *args: (save(*args), signal.raise_signal(signal.SIGINT)))
    recipe = recipe_with(tiny_recipe, "train.max_train_steps=1")
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    assert not loop.distill(recipe, folder)
    assert folder.latest_checkpoint().name == "checkpoint-1"


def test_the_same_command_on_a_finished_run_leaves_its_checkpoint_alone(tiny_recipe):
    recipe = recipe_with(tiny_recipe, "train.max_train_steps=1")
    newest = run_to_end(recipe).latest_checkpoint()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (newest, *newest.rglob("*"))}
    run_to_end(recipe)
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (newest, *newest.rglob("*"))}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny_recipe, tmp_path, monkeypatch):
    _, trained = prepared(recipe_with(tiny_recipe))
    folder, flushed = tmp_path / "checkpoint-0", []
    flush = checkpoint.flush
    monkeypatch.setattr(checkpoint, "flush", lambda path: (flushed.append((path, folder.exists())), flush(path)))
    checkpoint.save_checkpoint(folder, trained)
    early = {path.name for path, is_there in flushed if not is_there}
    assert early >= {path.name for path in folder.rglob("*")} | {".checkpoint-0.partial"}
    assert flushed[-1] == (tmp_path, True)


@pytest.mark.parametrize("part", ["tensors", "counters"])
def test_a_checkpoint_that_the_disk_does_not_take_is_not_there_and_the_one_before_it_is_named(
    tiny_recipe, tmp_path, monkeypatch, part
):
    _, trained = prepared(recipe_with(tiny_recipe))
    checkpoint.save_checkpoint(tmp_path / "checkpoint-0", trained)
    with monkeypatch.context() as fuller, largest_file(4096 if part == "tensors" else 64):
        if part == "counters":
            fuller.setattr(checkpoint, "save_file", lambda *args: None)
        with pytest.raises(UserError) as caught:
            checkpoint.save_checkpoint(tmp_path / "checkpoint-1", trained)
    kept = f"Make room on that disk. {tmp_path}/checkpoint-0 is whole, and the same command goes on from it."
    assert str(caught.value) == f"{tmp_path}/checkpoint-1 could not be written (File too large). {kept}"
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-0"]
    checkpoint.save_checkpoint(tmp_path / "checkpoint-1", trained)
    checkpoint.load_checkpoint(tmp_path / "checkpoint-1", trained)


def test_weights_are_as_readable_as_the_files_beside_them(tiny_recipe, tmp_path):
    """safetensors writes for the owner alone: a server of another user could not load an export."""
    _, trained = prepared(recipe_with(tiny_recipe))
    checkpoint.save_checkpoint(tmp_path / "checkpoint-0", trained)
    modes = {path.suffix: path.stat().st_mode for path in (tmp_path / "checkpoint-0").rglob("*") if path.is_file()}
    assert modes[".safetensors"] == modes[".json"]


def test_the_reports_pictures_are_drawn_by_the_weights_to_deploy(tiny_recipe, monkeypatch):
    drawn = {}

    def draw(run, folder):
        drawn.update({name: p.detach().clone() for name, p in run.student.parameters.items()})

    monkeypatch.setattr(loop, "save_trajectory", draw)
    folder = run_to_end(recipe_with(tiny_recipe, "train.ema_decay=0.9"))
    state = folder.path / "checkpoint-2" / "state"
    average, trained = load_file(state / "average.safetensors"), load_file(state / "parameters.safetensors")
    assert all(torch.equal(drawn[name], average[name]) for name in average)
    assert not all(torch.equal(drawn[name], trained[name]) for name in trained)


def test_an_update_is_made_at_the_schedules_rate_with_clipped_gradients(tiny_recipe):
    run, trained = prepared(
        recipe_with(tiny_recipe, "train.lr_warmup_steps=4", "train.learning_rate=1e-3", "train.max_grad_norm=1e-6")
    )
    loop.one_update(run, trained, Watch())
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    norm = sum(p.grad.square().sum() for p in run.student.parameters.values()) ** 0.5
    assert float(norm) == pytest.approx(1e-6, rel=1e-2)


def test_tasks_of_one_update_begin_from_noise_of_their_own(tiny_recipe, monkeypatch):
    run, trained = prepared(recipe_with(tiny_recipe))
    begun, draw = [], loop.noise.draw

    def noted(shape, **keys):
        if keys["solver_step"] == loop.INITIAL:
            begun.extend(keys["sample_indices"])
        return draw(shape, **keys)

    monkeypatch.setattr(loop.noise, "draw", noted)
    loop.one_update(run, trained, Watch())
    assert len(run.teachers) == 2 and len(begun) == len(set(begun)) >= 2


def test_a_checkpoint_of_another_rank_is_refused(tiny_recipe, tmp_path):
    run_to_end(recipe_with(tiny_recipe))
    run, trained = prepared(recipe_with(tiny_recipe, "student.rank=3"))
    with pytest.raises(UserError, match="rank"):
        loop.load_checkpoint(tmp_path / "run" / "checkpoint-2", trained)


def test_a_damaged_file_of_a_checkpoint_is_named_with_what_to_do(tiny_recipe, tmp_path):
    run_to_end(recipe_with(tiny_recipe))
    _, trained = prepared(recipe_with(tiny_recipe))
    state = tmp_path / "run" / "checkpoint-2" / "state"
    for name in ("progress.json", "optimizer.safetensors", "parameters.safetensors"):  # read from the last to the first
        (state / name).write_bytes((state / name).read_bytes()[:20])
        with pytest.raises(UserError, match=rf"{name}: is damaged .*remove .*checkpoint-2 to go on from the"):
            loop.load_checkpoint(state.parent, trained)


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
    real = loop.manner_of

    def broken(recipe, num_visits, update, slot):
        manner = real(recipe, num_visits, update, slot)
        if (update, slot) != (2, 1):
            return manner
        return replace(manner, objective=lambda *sides: manner.objective(*sides) * [1.0, math.nan][sides[-1].index])

    monkeypatch.setattr(loop, "manner_of", broken)
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(UserError, match=r"'lines'.*update 2, step 1 \(sigma 0\.\d+\)"):
        loop.distill(recipe, folder)
    assert folder.latest_checkpoint().name == "checkpoint-2"
    assert all(torch.isfinite(v).all() for v in weights_of(folder, 2).values())


def test_a_gradient_that_is_not_finite_moves_nothing_and_names_update_and_teachers(tiny_recipe, monkeypatch):
    """In the last update, after which no loss would ever tell."""
    recipe = recipe_with(tiny_recipe, "train.max_train_steps=2")
    walk, start, kept = loop.walk_rows, loop.new_trained, []

    def broken(run, teacher, rows, numbers, *, update, **options):
        losses = walk(run, teacher, rows, numbers, update=update, **options)
        if update == 1:
            next(iter(run.student.parameters.values())).grad[0, 0] = float("inf")
        return losses

    monkeypatch.setattr(loop, "walk_rows", broken)
    monkeypatch.setattr(loop, "new_trained", lambda run: kept.append(start(run)) or kept[0])
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(UserError, match=r"gradient is not finite at update 1 \(teachers 'dots', 'lines'\)"):
        loop.distill(recipe, folder)
    assert folder.latest_checkpoint().name == "checkpoint-1"
    saved = load_file(folder.latest_checkpoint() / "state" / "parameters.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in kept[0].parameters.items())


def test_a_student_keeps_its_guidance_and_its_negative_prompt(tiny_recipe):
    def told(*overrides):
        run, trained = prepared(recipe_with(tiny_recipe, NO_CLIP, *overrides))
        watch = Watch()
        loop.one_update(run, trained, watch)
        return watch.evaluations["student"], {name: p.grad.clone() for name, p in run.student.parameters.items()}

    alone, _ = told()
    guided, plain = told("student.guidance_scale=3.0")
    assert guided == 2 * alone
    _, negative = told("student.guidance_scale=3.0", 'student.negative_prompt="ugly"')
    _, taught = told("student.guidance_scale=3.0", 'teachers.0.call.negative_prompt="ugly"')
    for other in (negative, taught):
        assert any(not torch.allclose(other[name], plain[name], rtol=1e-3) for name in plain)


def test_a_broken_teacher_is_named_before_training(tiny_recipe, tiny_teachers, tmp_path):
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


def test_round_robin_gives_each_teacher_one_turn_a_cycle_in_changing_order(tiny_recipe):
    recipe = recipe_with(tiny_recipe, 'train.tasks_per_update="round_robin"')
    run, trained = prepared(recipe)
    tasks = [loop.route(recipe, run.teachers, update) for update in range(40)]
    assert all(len(round_) == 1 and round_[0][1] == 1.0 for round_ in tasks)
    cycles = [tuple(tasks[start + turn][0][0].name for turn in (0, 1)) for start in range(0, 40, 2)]
    assert set(cycles) == {("dots", "lines"), ("lines", "dots")}
    assert [loop.route(recipe, run.teachers, 7)[0][0].name] == [tasks[7][0][0].name]
    losses = loop.one_update(run, trained, Watch())
    assert list(losses.per_teacher()) == [tasks[0][0][0].name]
    for teacher in run.teachers:  # 4 prompts, 2 rows a turn: 2 turns are one pass
        turns = [update for update in range(4) if tasks[update][0][0] is teacher]
        seen = [loop.pick_row(run, teacher, update, 0, n).prompt for update in turns for n in (0, 1)]
        assert sorted(seen) == sorted(row.prompt for row in teacher.train_rows)


def test_round_robin_refuses_weights(tiny_recipe):
    with pytest.raises(UserError, match="same number of turns. Remove weight"):
        recipe_with(tiny_recipe, 'train.tasks_per_update="round_robin"', "teachers.0.weight=2.0")


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


def test_the_held_out_loss_is_of_the_last_rows_which_evaluation_does_not_score_first(tiny_recipe, monkeypatch):
    run, trained = prepared(recipe_with(tiny_recipe, "train.batch_size=1"))
    asked = []

    def loss(run, teacher, rows, **keys):
        asked.append((teacher.name, [row.prompt for row in rows]))
        return 1.0

    monkeypatch.setattr(loop, "loss_without_training", loss)
    loop._validate(run, trained)
    assert asked == [(teacher.name, [teacher.test_rows[-1].prompt]) for teacher in run.teachers]
    assert all(teacher.test_rows[0].prompt != teacher.test_rows[-1].prompt for teacher in run.teachers)
    assert run.teachers[0].validation_rows(3) == run.teachers[0].test_rows  # there are two


def test_a_best_loss_of_other_prompts_is_none(tiny_recipe, monkeypatch):
    run, trained = prepared(recipe_with(tiny_recipe))
    monkeypatch.setattr(loop, "loss_without_training", lambda run, teacher, rows, **keys: 1.0)
    progress = trained.progress = loop.Progress(best_validation=0.5, checks_since_best=3)  # of an earlier version
    loop._validate(run, trained)
    assert (progress.best_validation, progress.checks_since_best) == (1.0, 0)
    loop._validate(run, trained)
    assert (progress.best_validation, progress.checks_since_best) == (1.0, 1)
    for teacher in run.teachers:
        teacher.test_rows.reverse()
    loop._validate(run, trained)
    assert progress.checks_since_best == 0


def test_the_run_stops_by_time(tiny_recipe):
    folder = run_to_end(recipe_with(tiny_recipe, "train.max_train_steps=0", "train.max_train_seconds=0.5"))
    assert "max_train_seconds" in rows_of(folder, "stop")[0]["reason"]


@pytest.mark.parametrize("form", ["full", "base", "ema"])
def test_every_teacher_form_teaches(form, tiny_sd, tiny_teachers, tmp_path):
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


def test_a_fused_student_is_trained_as_its_adapter_is(tiny_recipe, tmp_path):
    ends = []
    for name, fuse in (("branch", "false"), ("fused", "true")):
        recipe = recipe_with(tiny_recipe, f"train.fuse_student={fuse}", f'output_dir="{tmp_path / name}"')
        folder = run_to_end(recipe)
        ends.append(rows_of(folder, "update"))
    for branch, fused in zip(*ends, strict=True):
        assert fused["loss"] == pytest.approx(branch["loss"], rel=1e-4)
        assert fused["grad_norm"] == pytest.approx(branch["grad_norm"], rel=1e-3)


BEGIN = 'student.begin_from="teacher_average"'


def predictions(unet):
    told = torch.Generator().manual_seed(7)
    latents, states = torch.randn(2, 4, 8, 8, generator=told), torch.randn(2, 5, 16, generator=told)
    with torch.no_grad():
        return unet(latents, torch.tensor([500, 20]), states).sample


def averaged_unet(tiny_sd, folders):
    """Base plus the mean of what diffusers' own loader and fusing make of each teacher."""
    base, total = tiny.load_pipeline(tiny_sd).unet, {}
    for folder in folders:
        pipeline = tiny.load_pipeline(tiny_sd)
        pipeline.load_lora_weights(str(folder))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        for name, value in pipeline.unet.state_dict().items():
            total[name] = total.get(name, 0) + value / len(folders)
    base.load_state_dict(total)
    return base


@pytest.mark.parametrize("options", [["student.rank=4"], ['student.train="full"']])
@pytest.mark.parametrize("fuse", ["true", "false"])
def test_a_student_can_begin_as_its_teachers_average(tiny_recipe, tiny_sd, tiny_teachers, options, fuse):
    untouched, _ = prepared(recipe_with(tiny_recipe, *options))
    run, _ = prepared(recipe_with(tiny_recipe, BEGIN, f"train.fuse_teachers={fuse}", *options))
    begun, expected = predictions(run.student.pipeline.unet), predictions(averaged_unet(tiny_sd, tiny_teachers))
    assert torch.allclose(begun, expected, atol=1e-5)
    assert not torch.allclose(predictions(untouched.student.pipeline.unet), expected, atol=1e-3)
    assert run.student.left_out == pytest.approx(0.0, abs=1e-5)


def test_teachers_teach_the_same_whatever_the_student_begins_from(tiny_recipe):
    told = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 5, 16)
    answers = []
    for options in ([], [BEGIN]):
        run, _ = prepared(recipe_with(tiny_recipe, *options))
        teacher = run.teachers[0].call
        with teacher.binding(), torch.no_grad():
            answers.append(teacher.pipeline.unet(*told).sample)
    assert torch.equal(*answers)


def test_what_the_rank_leaves_out_of_the_average_is_logged_and_the_run_resumes(tiny_recipe, tmp_path):
    folder = run_to_end(recipe_with(tiny_recipe, BEGIN, "student.rank=1"))
    (begin,) = rows_of(folder, "begin")
    assert 0.01 < begin["left_out"] < 1
    recipe = recipe_with(tiny_recipe, BEGIN, "student.rank=1", "train.max_train_steps=3")
    trained = dict(load_file(folder.latest_checkpoint() / "pytorch_lora_weights.safetensors"))
    loop.distill(recipe, folder)
    assert len(rows_of(folder, "begin")) == 1 and len(rows_of(folder, "update")) == 3
    assert any(
        not torch.equal(value, trained[name])
        for name, value in load_file(folder.latest_checkpoint() / "pytorch_lora_weights.safetensors").items()
    )


def test_an_average_on_layers_without_a_student_lora_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"begin_from.*no LoRA.*student\.target_modules"):
        prepared(recipe_with(tiny_recipe, BEGIN, 'student.target_modules=["to_q"]'))


def test_an_ema_teacher_follows_the_student(tiny_sd, tmp_path):
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


def test_an_ema_teacher_of_a_warm_start_with_ranks_and_alphas_by_layer_is_the_student(tiny_sd, tiny_recipe, tmp_path):
    pipeline, other = tiny.load_pipeline(tiny_sd), tiny.load_pipeline(tiny_sd)
    config = LoraConfig(
        r=4, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}, alpha_pattern={"to_q": 16}, lora_alpha=4
    )
    other.unet.add_adapter(config)
    for name, parameter in other.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = get_peft_model_state_dict(other.unet)
    pipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=config.to_dict())
    me = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema")
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [me])
    run, _ = prepared(recipe_with(recipe, f'student.init_weights="{tmp_path}"'))
    with run.teachers[0].call.binding():
        follower = predictions(run.teachers[0].call.pipeline.unet)
    assert torch.equal(follower, predictions(run.student.pipeline.unet))
    assert torch.allclose(follower, predictions(other.unet), atol=1e-6), "the file's alphas and ranks are honoured"


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


def test_every_row_of_a_run_reaches_a_tracker(tiny_recipe, monkeypatch):
    seen = []
    tracker = SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end"))
    monkeypatch.setattr(log, "start_trackers", lambda *told: [tracker])
    folder = run_to_end(recipe_with(tiny_recipe, BEGIN))
    assert [step for step, _ in seen[:-1]] == [row["update"] for row in folder.metrics()]
    assert any("left_out" in name for name in seen[0][1]) and seen[-1] == "end"


def test_a_tracker_or_backend_that_is_not_there_is_named_before_training(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=r"diffopd\[xformers\]"):
        run_to_end(recipe_with(tiny_recipe, 'train.attention_backend="xformers"', f'output_dir="{tmp_path}/a"'))
    pytest.importorskip("accelerate")
    if not __import__("importlib.util").util.find_spec("trackio"):
        with pytest.raises(UserError, match=r"diffopd\[trackio\]"):
            run_to_end(recipe_with(tiny_recipe, 'train.report_to=["trackio"]', f'output_dir="{tmp_path}/b"'))


def test_the_command_in_two_processes_is_the_command_with_a_doubled_batch(tiny_recipe, tmp_path, monkeypatch):
    """`--processes 2` at batch 2 and the loop alone at batch 4 train the same weights."""
    alone = run_to_end(recipe_with(tiny_recipe, "train.batch_size=4"))
    one, folder = weights_of(alone, 2), RunFolder(tmp_path / "two")
    arguments = ["distill", str(tiny_recipe), "--output-dir", str(folder.path), "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["diffopd", *arguments, "--set", "evaluate.teachers=false"])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 0
    assert (folder.path / "report.html").is_file()
    two = weights_of(folder, 2)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    counted = [[row["network_calls"] for row in rows_of(path, "update")] for path in (alone, folder)]
    assert counted[0] == counted[1] and counted[0][0]["student"] > 0, "calls are those of all processes"


def test_a_group_on_gpus_also_sums_tensors_of_the_cpu(monkeypatch):
    """Clocks, counts and flags are CPU tensors, which NCCL alone would refuse."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert loop.join_processes() == loop.Processes(1, 2)
    assert asked == [1, "cpu:gloo,cuda:nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="has no GPU: there are 1"):
        loop.join_processes()


def test_a_folder_of_other_files_is_refused_before_processes_start(tiny_recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    monkeypatch.setattr(subprocess, "Popen", None)
    arguments = ["distill", str(tiny_recipe), "--processes", "2", "--output-dir", str(tmp_path / "full")]
    monkeypatch.setattr(sys, "argv", ["diffopd", *arguments])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 2
    assert "is not empty" in capsys.readouterr().err
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


def test_losses_of_a_task_drawn_twice_with_other_states_are_means_over_the_rows_of_each_state():
    record = loop.UpdateLosses()
    for index, loss in ((0, 1.0), (1, 3.0), (1, 1.0)):
        record.add("dots", [StateLoss(index, 0.5, torch.full((2,), loss))], 2)
    assert record.per_step() == {"dots": {0: 1.0, 1: 2.0}}
    assert record.mean() == 1.5
