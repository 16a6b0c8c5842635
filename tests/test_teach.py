"""Making teachers on the tiny world: every estimator learns, runs resume, weights are written only when asked."""

import json
import subprocess
import sys
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
from diffopd.run_folder import RunFolder
from diffopd.teach_check import check_teach
from diffopd.teach_recipe import read_teach_recipe
from diffopd.teacher import teacher_card, weights_sha256

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


def curve(made: RunFolder, key: str) -> list[float]:
    return [row[key] for row in made.metrics() if row["kind"] == "update"]


def spread(made: RunFolder) -> float:
    return made.metrics()[0]["reward_std"]


@pytest.mark.parametrize(
    ("estimator", "updates", "overrides"),
    [
        ("nft", 14, ()),
        ("grpo", 14, (*NOISY, "estimator.clip_range=0.2")),
        ("grpo_guard", 14, (*NOISY, "estimator.clip_range=0.2")),
    ],
)
def test_the_reward_rises_by_more_than_its_spread(folder, estimator, updates, overrides):
    write(folder, estimator, updates)
    made = run(folder, *overrides)
    rewards = curve(made, "reward")
    assert sum(rewards[-3:]) / 3 - sum(rewards[:2]) / 2 > 2 * spread(made), rewards
