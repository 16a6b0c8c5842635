"""scripts/check_client.py: ComfyUI reads the exported files as diffusers does. Slow; only where there is a ComfyUI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
COMFYUI = os.environ.get("DIFFOPD_COMFYUI")
PYTHON = os.environ.get("DIFFOPD_COMFYUI_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="set DIFFOPD_COMFYUI to a clone of ComfyUI whose packages are installed"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The shipped base with a shipped teacher's adapter, as a pipeline, as one file and as kohya's LoRA."""
    from diffopd.forms import adapter_layers, kohya_tensors
    from diffopd.load import fuse_adapter, load_lora, load_pipeline
    from diffopd.locate import shelf
    from diffopd.single_file import write_single_file

    folder = tmp_path_factory.mktemp("files")
    pipeline = load_pipeline("emoji")
    load_lora(pipeline, str(shelf("teachers") / "text"), "default")
    save_file(kohya_tensors(adapter_layers(pipeline.unet)), folder / "kohya.safetensors")
    fuse_adapter(pipeline)
    pipeline.unet.save_pretrained(folder / "pipeline" / "unet")
    write_single_file(pipeline, folder / "one.safetensors")
    return folder


def check(folder, *names):
    command = [PYTHON, str(ROOT / "scripts" / "check_client.py"), *(str(folder / name) for name in names), "--json"]
    command += ["--comfyui", COMFYUI, "--pipeline", str(folder / "pipeline"), "--base", "emoji"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, json.loads(done.stdout) if done.returncode < 2 else done.stderr


def test_comfyui_predicts_what_diffusers_does_from_the_one_file_and_from_the_lora(files):
    code, said = check(files, "one.safetensors", "kohya.safetensors")
    assert code == 0, said
    assert [(row["kind"], row["unused"]) for row in said["files"]] == [("checkpoint", 0), ("lora", 0)]
    assert all(row["difference"] < 1e-4 for row in said["files"])


def test_a_lora_under_names_that_comfyui_does_not_know_is_told_apart(files):
    """It ignores diffusers' keys without a word: the reason why there is a form of its own for it."""
    renamed = {f"unet.{key}": value for key, value in load_file(files / "kohya.safetensors").items()}
    save_file(renamed, files / "unknown.safetensors")
    code, said = check(files, "unknown.safetensors")
    assert code == 1 and said["files"][0]["unused"] == len(renamed) and said["files"][0]["difference"] > 1e-2
