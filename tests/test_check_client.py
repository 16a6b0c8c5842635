"""scripts/check_client.py: ComfyUI reads the exported files as diffusers does. Slow; only where there is a ComfyUI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    """A random UNet of ComfyUI's proportions in the shipped base, with a random adapter: folder, one file, kohya's."""
    return write_files(tmp_path_factory.mktemp("files"))


def write_files(folder):
    from diffusers import UNet2DConditionModel

    from diffopd.adapters import add_adapter
    from diffopd.forms import adapter_layers, kohya_tensors
    from diffopd.load import fuse_adapter, load_pipeline
    from diffopd.single_file import write_single_file

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=12, block_out_channels=(64, 128), cross_attention_dim=128, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipeline = load_pipeline("emoji")
    pipeline.register_modules(unet=unet.eval())
    pipeline.save_pretrained(folder / "base")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv2", "time_emb_proj"]
    for parameter in add_adapter(unet, "student", rank=4, lora_alpha=6, target_modules=targets).values():
        parameter.data = 0.05 * torch.randn(parameter.shape)
    save_file(kohya_tensors(adapter_layers(unet)), folder / "kohya.safetensors")
    fuse_adapter(pipeline)
    pipeline.unet.save_pretrained(folder / "pipeline" / "unet")
    write_single_file(pipeline, folder / "one.safetensors")
    return folder


def check(folder, *names):
    command = [PYTHON, str(ROOT / "scripts" / "check_client.py"), *(str(folder / name) for name in names), "--json"]
    command += ["--comfyui", COMFYUI, "--pipeline", str(folder / "pipeline"), "--base", str(folder / "base")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


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
