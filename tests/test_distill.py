"""The loop: batch splits are one class, stops and failures are said."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from run_helpers import (
    BEGIN,
    NO_CLIP,
    assert_same_gradients,
    gradients_of,
    prepared,
    recipe_with,
    rows_of,
    run_to_end,
    weights_of,
)
from safetensors.torch import load_file

from diffopd import distill as loop
from diffopd import log
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder
from diffopd.supervise import StateLoss, Watch


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
