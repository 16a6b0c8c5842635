#!/usr/bin/env python
"""Holds the memory that --dry-run estimates to memory that is measured here, on real denoisers of a few layers.

Each base is a shipped config with fewer layers (and channels, for UNets), run for one state with a LoRA on its
attention: `estimated` are the bytes that the plan would print for the graph, `kept` those that autograd really holds,
`resident` what the process grew by (attention kernels, allocator and all).

    python scripts/check_memory.py [--json] [--base NAME ...] [--batch 1] [--size 256]

With --recipe a real recipe is trained for three updates instead: the sum of its plan beside what the process grew by,
when all was loaded and at its peak. That is memory of the host, so a GPU, which a training takes, must be hidden.
Libraries are imported before and not counted; what else is the same for any batch (allocator, compiled kernels, mapped
files) falls out of the difference of two batch sizes.

    python scripts/check_memory.py [--json] --recipe together [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffopd.adapters import add_adapter
from diffopd.blueprint import Blueprint, add_lora_on_meta, build_on_meta, read_blueprint
from diffopd.distill import distill
from diffopd.drive import Call, Walk
from diffopd.load import load_pipeline
from diffopd.plan import make_plan
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.rehearsal import rehearse, stand_in_texts, stock_pipeline
from diffopd.run_folder import RunFolder

SMALL_UNET = {"block_out_channels": [64, 128, 128, 128]}
# base -> what its denoiser's config becomes, further arguments of its call
MIDDLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (SMALL_UNET, {"guidance_scale": 7.5}),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        {"block_out_channels": [64, 128, 128]} | {"attention_head_dim": [1, 2, 2]},
        {},
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        {"num_layers": 2, "dual_attention_layers": [0]},
        {"guidance_scale": 4.5},
    ),
    "black-forest-labs/FLUX.1-dev": ({"num_layers": 1, "num_single_layers": 1}, {}),
    "black-forest-labs/FLUX.2-klein-base-4B": ({"num_layers": 1, "num_single_layers": 1}, {"guidance_scale": 4.0}),
    "Tongyi-MAI/Z-Image": ({"n_layers": 1, "n_refiner_layers": 1}, {"guidance_scale": 4.0}),
    "Qwen/Qwen-Image": ({"num_layers": 1}, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
}
TARGETS = ["to_q", "to_k", "to_v"]


def middle_sized(name: str) -> Blueprint:
    """A shipped base with a denoiser of few layers."""
    base = read_blueprint(name, shipped=True)
    config = {**base.denoiser_config, **MIDDLE[name][0]}
    return dataclasses.replace(base, configs={**base.configs, base.denoiser: config})


def scheduler_of(base: Blueprint) -> Any:
    """The base's own scheduler."""
    import diffusers

    config = base.configs["scheduler"]
    return getattr(diffusers, config["_class_name"]).from_config(config)


def real_denoiser(base: Blueprint) -> nn.Module:
    """Random weights in the shape of the base's config, with a LoRA on attention."""
    import diffusers

    torch.manual_seed(0)
    denoiser = getattr(diffusers, base.denoiser_config["_class_name"]).from_config(base.denoiser_config)
    for name, parameter in denoiser.named_parameters():
        if name.endswith("pad_token"):  # left uninitialised by the library
            nn.init.zeros_(parameter)
    denoiser.requires_grad_(False)
    add_adapter(denoiser, "student", rank=16, lora_alpha=16, target_modules=TARGETS)
    return denoiser


@contextmanager
def storages_kept(modules: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Storage -> a tensor on it, of all that autograd saves while open; weights are left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in modules.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, batch_size: int, size: int, *, checkpointing: bool) -> dict[str, Any]:
    """Estimate and measurement of one state's graph."""
    base = middle_sized(name)
    told = {"num_inference_steps": 2, "height": size, "width": size, **MIDDLE[name][1]}
    denoiser, meta = real_denoiser(base), build_on_meta(base.denoiser_config)
    add_lora_on_meta(meta, 16, TARGETS)
    for module in (denoiser, meta) if checkpointing else ():
        module.train().enable_gradient_checkpointing()
    estimate = rehearse(base, scheduler_of(base), told, batch_size=batch_size, trained=meta).graph_bytes
    call = {**told, **stand_in_texts(base, told, batch_size), "output_type": "latent"}
    pipeline = stock_pipeline(base, scheduler_of(base), denoiser)
    known = type(pipeline).__call__.__wrapped__.__code__.co_varnames
    gc.collect()
    before = resident()
    with storages_kept(denoiser) as kept, Walk(Call(pipeline, {k: v for k, v in call.items() if k in known})) as walk:
        visit = walk.advance(grad=True)
        grown = resident() - before
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del visit
    row = {"base": name, "checkpointing": checkpointing, "parameters": sum(p.numel() for p in denoiser.parameters())}
    return row | {"estimated": estimate, "kept": real, "resident": grown, "ratio": round(estimate / real, 3)}


def peak() -> int:
    """The most bytes of memory that the process held since `settle`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def settle() -> int:
    """What is free goes back to the system, and `peak` counts anew; returns the bytes that the process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident()


def measure_run(name: str, overrides: list[str]) -> dict[str, Any]:
    """The plan of a recipe, and what three updates of it really take."""
    with tempfile.TemporaryDirectory() as place:
        short = ["train.max_train_steps=3", "train.max_train_seconds=0", "train.validate_every=0"]
        recipe = read_recipe(name, [*short, f"output_dir={json.dumps(place + '/run')}", *overrides])
        parts = check(recipe, hash_weights=True)
        planned = make_plan(parts).memory
        folder = RunFolder.create(recipe.output_dir, recipe, parts.hashes)
        load_pipeline(recipe.student.pretrained_model_name_or_path)
        before, loaded = settle(), []
        distill(recipe, folder, lambda run, is_new: loaded.append(resident()))
        grown = peak() - before
    row = {"recipe": name, "planned": planned, "sum": sum(planned.values()), "loaded": loaded[0] - before}
    return row | {"peak": grown, "ratio": round(sum(planned.values()) / grown, 3)}


def show_run(row: dict[str, Any]) -> str:
    """The items of the plan, then sum and measurement."""
    items = {**row["planned"], "sum": row["sum"], "loaded": row["loaded"], "peak": row["peak"]}
    lines = [f"{name:22} {size / 2**20:8.1f} MiB" for name, size in items.items()]
    return "\n".join([row["recipe"], *lines, f"sum/peak {row['ratio']:.3f}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--base", nargs="*", default=list(MIDDLE), choices=list(MIDDLE), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--recipe", help="train three updates of this recipe on the CPU instead; no GPU may be seen")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    options = parser.parse_args()
    if options.recipe:
        if torch.cuda.is_available():
            parser.error(
                "--recipe measures memory of the host, and a training would take the GPU that is here. Hide it: "
                "CUDA_VISIBLE_DEVICES= python scripts/check_memory.py --recipe ..."
            )
        row = measure_run(options.recipe, options.set)
        print(json.dumps(row) if options.json else show_run(row))
        return 0
    worst = 0.0
    for name in options.base:
        for checkpointing in (False, True):
            row = measure(name, options.batch, options.size, checkpointing=checkpointing)
            worst = max(worst, abs(row["ratio"] - 1))
            print(json.dumps(row) if options.json else shown(row), flush=True)
    return 0 if worst <= 0.1 else 1


def shown(row: dict[str, Any]) -> str:
    """One line for a person."""
    mebibytes = (f"{key} {row[key] / 2**20:8.1f} MiB" for key in ("estimated", "kept", "resident"))
    kind = "checkpointed" if row["checkpointing"] else "plain"
    return f"{row['base']:46} {kind:12} {'  '.join(mebibytes)}  estimated/kept {row['ratio']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
