"""Checkpoints: resume is exact, Ctrl-C keeps one, a full disk and damaged files are named."""

import signal

import pytest
import tiny
import torch
from limits import largest_file
from run_helpers import assert_same_state, prepared, recipe_with, rows_of, run_to_end, state_of, weights_of
from safetensors.torch import load_file

from diffopd import checkpoint
from diffopd import distill as loop
from diffopd import loop as common
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder


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
