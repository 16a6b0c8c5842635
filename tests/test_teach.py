"""Making teachers on the tiny world: every estimator learns, runs resume, weights are written only when asked."""

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffopd import teach as loop
from diffopd.cli import app
from diffopd.errors import UserError
from diffopd.load import load_pipeline
from diffopd.lock import at_work
from diffopd.plan import make_plan
from diffopd.query import supervised_states
from diffopd.run_folder import LOCK, RunFolder
from diffopd.teach_check import check_teach, evaluations
from diffopd.teach_log import Fall, fall_of
from diffopd.teach_recipe import SHARED, read_teach_recipe
from diffopd.teach_run import assemble_run
from diffopd.teacher import teacher_card, weights_sha256

ROOT = Path(__file__).parents[1]
TEXT = """
[student]
rank = 4
lora_alpha = 8
num_inference_steps = 2
target_modules = ["to_v", "to_out.0", "conv1", "conv2"]

[estimator]
name = "{estimator}"

[train]
learning_rate = 1e-2
batch_size = 12
max_train_steps = {updates}
checkpointing_steps = 100

[evaluate]
num_prompts = 2
batch_size = 2
"""
SAMPLING = "\n[sampling]\nnum_prompts = 2\ngroup_size = 6\n"
NOISY = "student.solver=ddim", "student.noise_level=1.0", "student.num_inference_steps=3"
FIRST = "objective.query={indices=[0]}"
PICTURES = """
from PIL import Image


def plain(prompts, metadata, seeds):
    return [Image.new("RGB", (16, 16), (seed % 256, 40, 200)) for seed in seeds]
"""


@pytest.fixture
def folder(tmp_path, tiny_sd):
    """A teacher folder without weights, to be taught."""
    made = tiny.write_teacher(tmp_path / "dots", tiny_sd, guidance_scale=1.0)
    (made / "pytorch_lora_weights.safetensors").unlink()
    card = made / "teacher.toml"
    card.write_text("".join(line for line in card.read_text().splitlines(True) if not line.startswith("sha256")))
    return made


def write(folder: Path, estimator: str = "nft", updates: int = 2, sampling: str = SAMPLING) -> Path:
    path = folder / "teach.toml"
    path.write_text(TEXT.format(estimator=estimator, updates=updates) + sampling)
    return path


def run(folder: Path, *overrides: str, name: str = "run") -> RunFolder:
    recipe = read_teach_recipe(str(folder), [f'output_dir="{folder.parent / name}"', *overrides])
    made = RunFolder.create(recipe.output_dir, recipe, check_teach(recipe, hash_weights=True).hashes)
    assert loop.teach(recipe, made)
    return made


def planned(folder: Path, *overrides: str) -> dict[str, float]:
    """The network's rows of an update, by side, as the plan tells them."""
    return evaluations(make_plan(check_teach(read_teach_recipe(str(folder), [*overrides])).parts))


def curve(made: RunFolder, key: str) -> list[float]:
    return [row[key] for row in made.metrics() if row["kind"] == "update"]


def spread(made: RunFolder) -> float:
    return made.metrics()[0]["reward_std"]


@pytest.mark.parametrize(
    ("estimator", "updates", "overrides"),
    [
        ("nft", 14, ()),
        ("grpo", 10, (*NOISY, "estimator.clip_range=0.01", "sampling.optimizer_steps=2")),
        ("grpo_guard", 10, (*NOISY, "estimator.clip_range=0.01", "sampling.optimizer_steps=2")),
    ],
)
def test_the_reward_rises_by_more_than_its_spread(folder, estimator, updates, overrides):
    write(folder, estimator, updates)
    made = run(folder, *overrides)
    rewards = curve(made, "reward")
    assert sum(rewards[-3:]) / 3 - sum(rewards[:2]) / 2 > 2 * spread(made), rewards
    if estimator != "nft":  # the second step is from weights that have moved since the sampling
        assert max(curve(made, "clipped")) > 0 and all(ratio != 1 for ratio in curve(made, "ratio"))


def test_a_supervised_teacher_lowers_its_loss(folder):
    write(folder, "supervised", 12, "\n[sampling]\nnum_prompts = 6\n")
    (folder / "pictures.py").write_text(PICTURES)
    made = run(folder, "pictures=pictures.py:plain")
    losses = curve(made, "loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    assert "reward" not in made.metrics()[0] and made.metrics()[-2]["images"] == 72


def test_pictures_may_come_from_the_files_of_the_prompt_rows(folder):
    write(folder, "supervised", 1, "\n[sampling]\nnum_prompts = 2\n")
    with pytest.raises(UserError, match=r"train.jsonl:1: .* names no picture"):
        run(folder)
    prompts = folder / "prompts" / "train.jsonl"
    Image.new("RGB", (16, 16), "red").save(folder / "prompts" / "red.png")
    rows = [json.loads(line) | {"file_name": "red.png"} for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve(run(folder), "loss")[0] > 0
    Image.new("RGB", (32, 16), "red").save(folder / "prompts" / "red.png")
    for options in (["--dry-run"], ["--output-dir", folder.parent / "wide"]):
        told = " ".join((refused := command(folder, *options)).stderr.split())
        assert refused.exit_code == 2 and "train.jsonl:1: the picture" in told
        assert "has 32 x 16 pixels, and this pipeline draws 16 x 16. Crop" in told
    assert not (folder.parent / "wide").exists()
    rows[0]["bucket"] = [16, 16]
    prompts.write_text(json.dumps(rows[0]) + "\n")
    assert command(folder, "--dry-run").exit_code == 0, "it is fitted to its bucket"
    (folder / "prompts" / "red.png").write_text("nonsense")
    assert "can be read" in command(folder, "--dry-run").stderr


def test_where_the_drawn_size_is_not_known_pictures_have_one_size(folder, monkeypatch):
    write(folder, "supervised", 1, "\n[sampling]\nnum_prompts = 2\n")
    monkeypatch.setattr("diffopd.teach_check.known_size", lambda call, base: None)
    rows = []
    for name, width in (("one.png", 24), ("two.png", 24), ("three.png", 40)):
        Image.new("RGB", (width, 16), "red").save(folder / "prompts" / name)
        rows.append(json.dumps({"prompt": name, "file_name": name}) + "\n")
    (folder / "prompts" / "train.jsonl").write_text("".join(rows[:2]))
    assert command(folder, "--dry-run").exit_code == 0
    (folder / "prompts" / "train.jsonl").write_text("".join(rows))
    told = " ".join(command(folder, "--dry-run").stderr.split())
    assert "train.jsonl:3: the picture" in told and "has 40 x 16 pixels, the ones before it 24 x 16" in told


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("(32, 16)", r"\(4, 8, 16\), but this pipeline walks on \(4, 8, 8\)"),
        ("(16, 16 + 8 * (n % 2))", "16 x 16 and 16 x 24"),
    ],
)
def test_drawn_pictures_of_another_size_are_refused(folder, size, words):
    write(folder, "supervised", 1, "\n[sampling]\nnum_prompts = 2\n")
    path = folder / "teach.toml"
    path.write_text('pictures = "pictures.py:plain"\n' + path.read_text())
    new = f'[Image.new("RGB", {size}) for n, seed in enumerate(seeds)]'
    (folder / "pictures.py").write_text(PICTURES.split("    return")[0] + f"    return {new}\n")
    with pytest.raises(UserError, match=words):
        run(folder)


@pytest.fixture
def whole(folder, tiny_teachers):
    """Two updates in one go, watched, the average kept."""
    write(folder)
    return run(folder, *watched(tiny_teachers), name="whole")


def watched(teachers: list[Path]) -> list[str]:
    return [f'watch=["{teachers[1]}"]', "train.validate_every=1", "train.ema_decay=0.5", "estimator.old_decay_rate=0.2"]


def test_a_run_that_goes_on_is_the_run_in_one_go(folder, whole, tiny_teachers):
    options = watched(tiny_teachers)
    run(folder, *options, "train.max_train_steps=1", name="halves")
    halves = run(folder, *options, name="halves")
    for name in ("parameters", "average", "self_teacher", "optimizer"):
        one, two = (load_file(made.path / f"checkpoint-2/state/{name}.safetensors") for made in (whole, halves))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    trained, old = (
        load_file(whole.path / f"checkpoint-2/state/{n}.safetensors") for n in ("parameters", "self_teacher")
    )
    assert any(not torch.equal(trained[key], old[key]) for key in trained), "the old policy lags behind"
    assert curve(whole, "reward") == curve(halves, "reward")


def test_other_tasks_drift_and_diversity_are_watched_beside_the_reward(whole):
    rows = [row for row in whole.metrics() if row["kind"] == "held_out"]
    assert [row["update"] for row in rows] == [0, 1, 2]
    assert rows[0]["drift"] == 0 < rows[1]["drift"] < rows[2]["drift"]
    for row in rows:
        assert {"reward", "lines", "diversity"} <= row.keys()
    pictures = [row["reward"] for row in rows]
    assert len(set(pictures)) == 3, "held-out pictures change with the weights"


def test_a_reward_of_its_own_does_not_hide_the_score_of_the_card(folder):
    """Of the same pictures: what is trained on is no witness against itself."""
    write(folder, updates=1)
    plain = run(folder, "train.validate_every=1", name="plain")
    other = run(folder, "train.validate_every=1", 'rewards=[{reward="jpeg_compressibility"}]', name="other")
    (first, _), (before, after) = ([r for r in made.metrics() if r["kind"] == "held_out"] for made in (plain, other))
    assert before["dots"] == first["reward"] and before["reward"] < 0 and "dots" not in first
    assert after["dots"] != before["dots"]


def test_held_out_pictures_are_drawn_by_the_bases_scheduler_whatever_samples(folder):
    write(folder, "grpo", updates=1)
    noisy = 'student.scheduler={class="EulerAncestralDiscreteScheduler"}'
    found = assemble_run(read_teach_recipe(str(folder), [noisy]))
    base = type(load_pipeline(found.recipe.card.base).scheduler).__name__
    assert type(found.sides.student.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler" != base
    for call in (found.watch.taught, found.watch.base):
        assert type(call.pipeline.scheduler).__name__ == base
        assert call.arguments["num_inference_steps"] == found.recipe.card.num_inference_steps


def test_the_old_policy_samples_and_the_base_is_asked_only_where_distance_costs(folder):
    write(folder, updates=1)
    calls = run(folder).metrics()[0]["network_calls"]
    assert calls == {"rollout": 24, "student": 24, "old": 24, "base": 24} == planned(folder)
    calls = run(folder, "estimator.kl_weight=0.0", name="free").metrics()[0]["network_calls"]
    assert calls == {"rollout": 24, "student": 24, "old": 24} == planned(folder, "estimator.kl_weight=0.0")
    heun = ('student.scheduler={class="HeunDiscreteScheduler"}', "estimator.kl_weight=0.0")
    assert run(folder, *heun, name="more visits than steps").metrics()[0]["network_calls"] == planned(folder, *heun)
    write(folder, "grpo", 1)
    assert run(folder, *NOISY, FIRST, name="policy").metrics()[0]["network_calls"] == planned(folder, *NOISY, FIRST)


def test_optimizer_steps_share_the_pictures_and_move_the_ratio_from_1(folder):
    write(folder, "grpo", 1)
    once = run(folder, *NOISY, name="once").metrics()[0]
    assert once["ratio"] == pytest.approx(1, abs=1e-5) and once["clipped"] == 0
    assert once["network_calls"]["student"] == 12 * 2, "the last step draws no noise and is left out"
    twice = run(folder, *NOISY, "sampling.optimizer_steps=2", name="twice").metrics()[0]
    assert twice["clipped"] > 0 and twice["network_calls"] == once["network_calls"]


def test_a_random_query_of_a_policy_gradient_draws_among_the_steps_that_have_noise(folder):
    write(folder, "grpo", 4)
    one = run(folder, *NOISY, "objective.query={random=1}", name="one")
    seed = read_teach_recipe(str(folder)).seed
    drawn = [supervised_states({"random": 1}, 3, seed=(seed, update, 0)) for update in range(4)]
    assert [2] in drawn, "among all steps it would draw the last, which has none"
    assert {row["network_calls"]["student"] for row in one.metrics() if row["kind"] == "update"} <= {12, 24}
    three = run(folder, *NOISY, "objective.query={random=3}", "train.max_train_steps=1", name="three")
    assert three.metrics()[0]["network_calls"]["student"] == 24


def test_the_reward_is_computed_while_the_next_batch_is_sampled(folder, monkeypatch):
    (folder / "reward.py").write_text(
        "import threading\n"
        "second_began = threading.Event()\n"
        "waited = []\n"
        "def brightness(images, prompts, metadata):\n"
        "    waited.append(second_began.wait(60))\n"
        "    return [i / 8 for i in range(len(images))]\n"
    )
    write(folder, updates=1)
    recipe = read_teach_recipe(str(folder), [f'output_dir="{folder.parent / "run"}"', "train.batch_size=6"])
    made = RunFolder.create(recipe.output_dir, recipe, check_teach(recipe).hashes)
    module = next(m for m in sys.modules.values() if str(folder) in str(getattr(m, "__file__", "")))
    began, original = [], loop.sample

    def sample(*arguments, **options):
        began.append(None)
        if len(began) == 2:
            module.second_began.set()
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "sample", sample)
    loop.teach(recipe, made)
    assert module.waited == [True, True] and len(began) == 2


def test_rewards_are_computed_on_the_gpu_of_their_process(folder, monkeypatch):
    """torch keeps the GPU by thread, and rewards have one of their own."""
    write(folder, updates=1)
    recipe = read_teach_recipe(str(folder), [f'output_dir="{folder.parent / "run"}"'])
    made = RunFolder.create(recipe.output_dir, recipe, check_teach(recipe).hashes)
    here, score = threading.local(), loop.score
    here.gpu, seen = 1, []
    monkeypatch.setattr(loop, "sampled_pictures", with_gpus(monkeypatch, here, loop.sampled_pictures))
    monkeypatch.setattr(loop, "score", lambda *told: seen.append(getattr(here, "gpu", 0)) or score(*told))
    loop.teach(recipe, made)
    assert set(seen) == {1}


def with_gpus(monkeypatch, here, function):
    """The function on a machine that seems to have GPUs; `here.gpu` is the present one's number."""

    def called(*told):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "current_device", lambda: here.gpu)
            patch.setattr(torch.cuda, "set_device", partial(setattr, here, "gpu"))
            return function(*told)

    return called


def test_a_reward_that_is_not_a_finite_number_a_picture_stops_the_run_with_the_prompt(folder):
    write(folder)
    (folder / "reward.py").write_text(
        "def brightness(images, prompts, metadata):\n    return [float('nan')] * len(images)\n"
    )
    with pytest.raises(UserError, match="reward of a picture of '.*' is nan"):
        run(folder)
    assert not list((folder.parent / "run").glob("checkpoint-*"))


def command(*arguments: object):
    return CliRunner().invoke(app, ["teach", *map(str, arguments)])


@pytest.mark.parametrize(
    "given",
    [
        '# \u2028\nsha256 = "{}"   # of run 7\nweights = "pytorch_lora_weights.safetensors"',
        "sha256 = '{}'\nweights = 'pytorch_lora_weights.safetensors' # here",
        'weights="pytorch_lora_weights.safetensors"',
        '  "weights" = "pytorch_lora_weights.safetensors"\n\'sha256\' = "{}"',
    ],
)
def test_however_a_card_is_written_its_sha256_is_that_of_the_written_weights(folder, given):
    write(folder, updates=1)
    card = folder / "teacher.toml"
    kept = [line for line in card.read_text().splitlines() if not line.startswith("weights")]
    card.write_text("\n".join([given.format("0" * 64), *kept]))
    before = card.read_text()
    made = command(folder, "--output-dir", folder.parent / "run", "--write")
    assert made.exit_code == 0, made.output
    digest = weights_sha256(folder / "pytorch_lora_weights.safetensors")
    assert teacher_card(str(folder), folder).sha256 == digest
    old = "0" * 64
    assert card.read_text().replace(f'"{digest}"', "X") in (
        before.replace(f'"{old}"', "X").replace(f"'{old}'", "X"),
        before.replace('safetensors"\n', 'safetensors"\nsha256 = X\n', 1),
    ), "nothing else changed"


def test_a_card_that_cannot_take_a_sha256_is_told_before_training(folder):
    write(folder, updates=1)
    card = folder / "teacher.toml"
    kept = [line for line in card.read_text().splitlines() if not line.startswith("weights")]
    card.write_text("\n".join(['weights = """', 'pytorch_lora_weights.safetensors"""', *kept]))
    refused = command(folder, "--output-dir", folder.parent / "run", "--write")
    assert refused.exit_code == 2 and "teacher.toml:1: --write puts a sha256 on a line of its own" in refused.stderr
    assert not (folder.parent / "run").exists()


def test_a_mistake_in_the_card_is_told_with_the_cards_line(folder):
    write(folder)
    card = folder / "teacher.toml"
    line = next(n for n, text in enumerate(card.read_text().splitlines(), 1) if text.startswith("base"))
    card.write_text(
        "".join('base = "emojii"\n' if t.startswith("base") else t for t in card.read_text().splitlines(True))
    )
    told = command(folder, "--dry-run")
    assert told.exit_code == 2 and f"teacher.toml:{line}: emojii: there is no pipeline" in told.stderr
    (folder / "teach.toml").write_text(
        'student = {train = "full"}\n[estimator]\nname = "nft"\n[train]\nmax_train_steps = 1\n'
    )
    told = command(folder, "--dry-run")
    assert told.exit_code == 2 and "teach.toml:1: student.train = 'full', but" in told.stderr


def test_a_run_that_ends_between_two_looks_looks_at_what_it_made(folder):
    write(folder, updates=3)
    made = run(folder, "train.validate_every=2")
    looks = [row for row in made.metrics() if row["kind"] == "held_out"]
    assert [row["update"] for row in looks] == [0, 2, 3]
    kept = [json.dumps(row) + "\n" for row in made.metrics() if row != looks[-1]]
    (made.path / "metrics.jsonl").write_text("".join(kept))
    again = read_teach_recipe(str(folder), [f'output_dir="{made.path}"', "train.validate_every=2"])
    assert loop.teach(again, made), "a look that was broken off"
    assert loop.teach(again, made)
    assert [row["update"] for row in made.metrics() if row["kind"] == "held_out"] == [0, 2, 3]


def test_weights_go_into_the_teachers_folder_only_when_asked_and_never_over_others(folder):
    write(folder, updates=1)
    place = ("--output-dir", folder.parent / "run")
    target = folder / "pytorch_lora_weights.safetensors"
    plain = command(folder, *place)
    assert plain.exit_code == 0 and "checkpoint-1" in plain.output and not target.exists()
    assert command(folder, *place, "--write").exit_code == 0
    card = teacher_card(str(folder), folder)
    assert card.sha256 == weights_sha256(target) == card.digest()
    again = command(folder, *place, "--write")
    assert again.exit_code == 2 and "--overwrite" in again.output
    before = target.read_bytes()
    options = ("--output-dir", folder.parent / "other", "--write", "--overwrite", "--set", "seed=5")
    assert command(folder, *options).exit_code == 0
    assert target.read_bytes() != before and teacher_card(str(folder), folder).digest()
    assert command(folder, *place, "--overwrite").exit_code == 2


def test_a_run_that_fell_is_told_and_written_only_by_the_number_of_a_checkpoint(folder):
    path = write(folder, updates=2)
    path.write_text(path.read_text().replace("checkpointing_steps = 100", "checkpointing_steps = 1"))
    place = ("--output-dir", folder.parent / "run")
    assert "Warning" not in command(folder, *place).stderr
    with (folder.parent / "run" / "metrics.jsonl").open("a") as file:
        for number in range(30):
            value = 0.5 + number / 100 if number < 20 else 0.01
            fallen = {"kind": "update", "update": 1, "reward": value, "reward_std": 0.4}
            file.write(json.dumps(fallen) + "\n")
    told = command(folder, *place)
    assert told.exit_code == 0 and "Warning: It ended worse than it began" in told.stderr
    refused = command(folder, *place, "--write")
    target = folder / "pytorch_lora_weights.safetensors"
    assert refused.exit_code == 2 and "was not written" in refused.stderr and not target.exists()
    assert "--write --checkpoint 1" in refused.stderr and "--write --checkpoint 2" in refused.stderr
    assert command(folder, *place, "--write", "--checkpoint", "1").exit_code == 0
    assert target.read_bytes() == (folder.parent / "run" / "checkpoint-1" / target.name).read_bytes()
    missing = command(folder, *place, "--write", "--overwrite", "--checkpoint", "7")
    assert missing.exit_code == 2 and "has no checkpoint-7; there are 1, 2." in missing.stderr
    assert command(folder, *place, "--checkpoint", "1").exit_code == 2


def test_only_a_clear_fall_below_the_beginning_is_one():
    def told(*rewards, spread=0.4):
        rows = [{"kind": "update", "update": n, "reward": r, "reward_std": spread} for n, r in enumerate(rewards, 1)]
        return fall_of([*rows, {"kind": "stop", "update": len(rewards)}])

    begun, best = [0.3, 0.34] * 5, [0.6] * 10
    assert told(*begun, *best, *[0.1] * 10) == Fall(pytest.approx(0.32), pytest.approx(0.1), pytest.approx(0.6), 20)
    assert "is 0.1, of its first 0.32 (best in updates 11 to 20, 0.6)" in str(told(*begun, *best, *[0.1] * 10))
    assert told(*begun, *best, *[0.33] * 10) is None, "less than the best, not than the first"
    assert told(*begun, *best, *[0.29] * 10, spread=0.01) and not told(*begun, *best, *[0.3] * 10, spread=0.01), "noise"
    assert told(*begun, *best, *[0.27] * 10) and not told(*begun, *best, *[0.29] * 10), "a tenth of the spread"
    assert told(*[-5.0] * 10, *[-2.0] * 10, *[-9.0] * 10).until == 20
    assert told(*begun, *[0.1] * 9) is None, "too few"
    assert told(*[0.5] * 40, spread=0.0) is None
    assert fall_of([{"kind": "update", "update": 1, "loss": 1.0}] * 40) is None, "from pictures"


def test_a_folder_in_which_another_process_works_is_refused(folder):
    write(folder)
    with at_work(folder.parent / "run", print):
        shown = command(folder, "--output-dir", folder.parent / "run")
        assert shown.exit_code == 2 and "is in use" in shown.stderr
        assert [path.name for path in (folder.parent / "run").iterdir()] == [LOCK]


def test_a_full_teacher_is_taught_and_written_with_its_config(folder):
    card = folder / "teacher.toml"
    card.write_text(card.read_text().replace('"lora"', '"full"').replace("pytorch_lora_weights.safetensors", "unet"))
    write(folder, updates=1)
    path = folder / "teach.toml"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(("rank", "lora", "target"))]
    path.write_text("\n".join(kept))
    made = command(folder, "--output-dir", folder.parent / "run", "--write", "--set", "train.learning_rate=1e-4")
    assert made.exit_code == 0, made.output
    assert (folder / "unet" / "config.json").is_file() and teacher_card(str(folder), folder).digest()


def test_the_plan_names_estimator_reward_and_what_is_watched_without_making_anything(folder, tiny_teachers):
    write(folder, "grpo")
    shown = command(
        folder, "--dry-run", "--set", "student.solver=ddim", "--set", "student.noise_level=0.7",
        "--set", f'watch=["{tiny_teachers[1]}"]', "--set", "train.validate_every=5",
        "--output-dir", folder.parent / "run",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    for words in ("grpo, 0.04 x distance", "ddim, noise 0.7", "1 x reward.py:brightness", "2 prompts x 6 pictures"):
        assert words in shown.output
    assert "steps without noise are left out" in shown.output and "old policy" not in shown.output
    assert not (folder.parent / "run").exists()
    write(folder)
    shown = command(folder, "--dry-run", "--output-dir", folder.parent / "run").output
    assert "rollout 24, student 24, old 24, base 24 an update" in " ".join(shown.split()) and "old policy" in shown


def test_each_way_of_teaching_has_a_run_folder_of_its_own(folder):
    again = write(folder).rename(folder / "again.toml")
    write(folder)
    assert read_teach_recipe(str(folder)).output_dir == "runs/teach-dots"
    assert read_teach_recipe(str(again)).output_dir == "runs/teach-dots-again"


def test_a_wrong_key_is_offered_only_those_that_teaching_reads(folder):
    write(folder)
    with pytest.raises(UserError, match=r"unknown key train\.fuse_teacher\.") as caught:
        read_teach_recipe(str(folder), ["train.fuse_teacher=true"])
    known = set(str(caught.value).split("Known: ")[1].rstrip(".").split(", "))
    assert known == SHARED["train"]
    with pytest.raises(UserError, match=r"unknown key estimator\.clip_rage\. Known") as caught:
        read_teach_recipe(str(folder), ["estimator.clip_rage=0.1"])  # the guess would be refused of nft
    assert "clip_range" not in str(caught.value) and "beta" in str(caught.value)
    with pytest.raises(UserError, match="unknown key teacher") as caught:
        read_teach_recipe(str(folder), ["teacher=[]"])
    assert "teachers" not in str(caught.value)


REFUSED = [
    (["estimator.name=grpoo"], r"teach.toml:\d+|--set"),
    (["estimator.name=grpo"], "is deterministic. Set student.solver"),
    (["estimator.clip_range=0.1"], "estimator.clip_range has no effect on estimator 'nft'"),
    (["train.fuse_teachers=true"], "train.fuse_teachers has no effect on teaching"),
    (["objective.name=kl"], "objective.name has no effect on teaching"),
    (["sampling.group_size=1"], "Set it to at least 2"),
    (["sampling.optimizer_steps=99"], "99 parts of 12 pictures"),
    (["student.train=full"], "teacher.toml says 'lora'"),
    (["student.solver=ddim"], "would only sample"),
    (["pictures=reward.py:brightness"], "pictures has no effect"),
    (["evaluate.num_prompts=9"], "has 2 test prompts"),
    (["watch=[\"dots\"]"], "no shipped teacher"),
    (["rewards=[{reward=\"sharpnes\"}]"], 'no shipped reward "sharpnes"'),
    (["rewards=[{reward=\"sharpness\", options={a=1}}]"], "takes no option 'a'"),
    (["rewards=[{reward=\"reward.py:darkness\"}]"], "has no function 'darkness'"),
    (["estimator.name=supervised"], "sampling.group_size has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[case[0][0] for case in REFUSED])
def test_what_would_have_no_effect_or_no_meaning_is_refused_before_training(folder, overrides, words):
    write(folder)
    with pytest.raises(UserError, match=words):
        check_teach(read_teach_recipe(str(folder), overrides))


def test_a_folder_without_teach_toml_names_the_files_it_has(folder):
    write(folder).rename(folder / "nft.toml")
    with pytest.raises(UserError, match="has no teach.toml.*It has nft.toml"):
        read_teach_recipe(str(folder))
    assert read_teach_recipe(str(folder / "nft.toml")).estimator.name == "nft"


def test_a_run_of_teach_is_told_from_one_of_distill(folder):
    write(folder)
    recipe = read_teach_recipe(str(folder), [f'output_dir="{folder.parent / "run"}"'])
    made = RunFolder.create(recipe.output_dir, recipe, check_teach(recipe).hashes)
    shown = CliRunner().invoke(app, ["evaluate", str(made.path)])
    assert shown.exit_code == 2 and "is a run of `diffopd teach`" in " ".join(shown.output.split())


@pytest.mark.parametrize("name", ["itself", "watched"])
def test_a_reward_that_fails_is_told_before_a_weight_is_loaded(folder, tiny_sd, name, monkeypatch):
    monkeypatch.setattr("diffopd.assemble.load_pipeline", None)  # whoever loads weights would fail otherwise
    write(folder)
    watched = tiny.write_teacher(folder.parent / "watched", tiny_sd)
    broken = watched if name == "watched" else folder
    (broken / "reward.py").write_text("def brightness(images, prompts, metadata):\n    return 1 / 0\n")
    command_line = folder, "--output-dir", folder.parent / "run", "--set", f'watch=["{watched}"]'
    assert command(*command_line, "--dry-run").exit_code == 0
    refused = command(*command_line)
    assert refused.exit_code == 2 and f"ZeroDivisionError: division by zero ({broken}/reward.py:2)." in refused.stderr
    assert not (folder.parent / "run").exists()


IN_PROPORTION = ["train.adam_epsilon=1.0", "train.learning_rate=10.0"]  # updates in proportion to the gradient


def trained(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "checkpoint-1/state/parameters.safetensors")


def assert_same_update(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    moved = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
    assert moved > 1e-3
    assert all(torch.allclose(one[key], two[key], atol=1e-4 * moved) for key in one)


def test_an_update_does_not_depend_on_its_micro_batches(folder):
    write(folder, updates=1)
    whole = run(folder, *IN_PROPORTION, name="whole").path
    uneven = run(folder, *IN_PROPORTION, "train.batch_size=5", name="uneven").path
    assert_same_update(trained(whole), trained(uneven))


@pytest.mark.parametrize(("estimator", "overrides"), [("nft", ()), ("grpo_guard", NOISY)])
def test_a_fused_student_makes_the_same_update_over_the_old_policy_and_the_base(folder, estimator, overrides):
    """The second step is learnt under weights that the first one moved: a fold that outlived it would show."""
    write(folder, estimator, updates=1)
    options = [*IN_PROPORTION, *overrides, "sampling.optimizer_steps=2"]
    options += ["train.validate_every=1", "train.ema_decay=0.5"]
    beside = run(folder, *options, name="beside")
    folded = run(folder, *options, "train.fuse_student=true", name="folded")
    assert_same_update(trained(beside.path), trained(folded.path))
    for one, two in zip(beside.metrics()[:3], folded.metrics()[:3], strict=True):  # before, the update, after
        assert one.get("network_calls") == two.get("network_calls")
        for key in {"from_base", "drift", "reward", "diversity"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=2e-3, abs=1e-6), key


def test_two_processes_make_the_update_of_one(folder):
    write(folder, updates=1)
    alone, together = run(folder, *IN_PROPORTION, name="alone").path, folder.parent / "together"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "diffopd.cli", "teach", str(folder), "--output-dir", str(together)]
    command += [word for option in IN_PROPORTION for word in ("--set", option)]
    ranks = [{**os.environ, **group, "PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    started = [subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in ranks]
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    assert_same_update(trained(alone), trained(together))
