#!/usr/bin/env python
"""Holds the memory that --dry-run estimates to memory that is measured here, on real denoisers of a few layers.

Each base is a shipped config with fewer layers (and channels, for UNets), run for one state with a LoRA on its
attention: `estimated` are the bytes that the plan would print for the graph, `kept` those that autograd really holds,
`resident` what the process grew by (attention kernels, allocator and all).

    python scripts/check_memory.py [--json] [--base NAME ...] [--batch 1] [--size 256]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffopd.adapters import add_adapter
from diffopd.blueprint import Blueprint, add_lora_on_meta, build_on_meta, read_blueprint
from diffopd.drive import Call, Walk
from diffopd.rehearsal import rehearse, stand_in_texts, stock_pipeline

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--base", nargs="*", default=list(MIDDLE), choices=list(MIDDLE), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    options = parser.parse_args()
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
