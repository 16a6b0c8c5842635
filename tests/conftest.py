"""Shared fixtures. One thread and no network, set before torch is imported by anyone."""

import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
os.environ.setdefault("COLUMNS", "120")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A tiny random stock StableDiffusionPipeline folder: v prediction, trailing zero-SNR DDIM, safetensors."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd")


@pytest.fixture
def tiny_pipeline(tiny_sd):
    """A fresh pipeline object over `tiny_sd`."""
    return tiny.load_pipeline(tiny_sd)


@pytest.fixture(scope="session")
def tiny_teachers(tiny_sd, tmp_path_factory) -> list[Path]:
    """Two LoRA teacher folders, "dots" (guidance 2) and "lines" (guidance 1). Read only: copy before changing."""
    shelf = tmp_path_factory.mktemp("shelf")
    dots = tiny.write_teacher(shelf / "dots", tiny_sd, seed=1)
    lines = tiny.write_teacher(shelf / "lines", tiny_sd, seed=2, guidance_scale=1.0)
    return [dots, lines]


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teachers) -> Path:
    """The LoRA teacher folder "dots" on `tiny_sd`. Read only: copy it before changing anything."""
    return tiny_teachers[0]


@pytest.fixture
def tiny_recipe(tmp_path, tiny_sd, tiny_teachers) -> Path:
    """A recipe file with both tiny teachers; its output_dir is tmp_path / "run"."""
    return tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, tiny_teachers)
