#!/usr/bin/env python
"""A full teacher as a LoRA of its base: truncated SVD of each changed layer, convolutions too, and the error left.

    scripts/lowrank_teacher.py BASE TEACHER --rank 64 --output FOLDER [--json] [--device cuda]

BASE: a pipeline (shelf name, folder, hub id). TEACHER: a pipeline folder, or the folder or .safetensors file of a
denoiser. FOLDER gets pytorch_lora_weights.safetensors; it is loaded again by diffusers and compared before it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffopd.drive import denoiser_name, denoiser_of
from diffopd.errors import UserError
from diffopd.load import load_denoiser, load_lora, load_pipeline
from diffopd.lowrank import LowRank, low_rank, reloaded_error, save_lora

SHOWN = 10  # layers with the largest error
AGREES = 1e-4  # between the error as computed and as found in the reloaded file


def convert(base_name: str, teacher: Path, rank: int, output: Path, device: str) -> tuple[LowRank, float]:
    """Write the LoRA; returns what it is made of and the error found in the reloaded file.

    Raises UserError where weights do not fit, or where the file is not what was computed.
    """
    base = load_pipeline(base_name)
    inside = teacher / denoiser_name(base)
    full = load_denoiser(base, inside if (teacher / "model_index.json").is_file() else teacher)
    found = low_rank(denoiser_of(base).to(device), full, rank)
    file = save_lora(found, base, output)
    load_lora(base, str(file), adapter_name="lowrank")
    error = reloaded_error(found, denoiser_of(base), full, "lowrank")
    if abs(error - found.error) > AGREES:
        raise UserError(f"{file}: its error is {error:.4g}, {found.error:.4g} was expected. Please report this.")
    return found, error


def summary(found: LowRank, error: float) -> dict[str, Any]:
    """All numbers, as --json prints them."""
    layers = {k: {"rank": d.rank, "norm": d.norm, "error": d.error} for k, d in found.layers.items()}
    return {"error": error, "layers": layers, "kept_out": found.kept_out}


def show(found: LowRank, error: float, output: Path) -> None:
    """The layers with the largest error and the total, as a person reads them."""
    worst = sorted(found.layers.items(), key=lambda item: -item[1].left)
    for name, layer in worst[:SHOWN]:
        print(f"{layer.error:8.4f}  rank {layer.rank:4d}  {name}")
    print(f"{len(found.layers)} layers; those above leave the most of the teacher out.")
    if found.kept_out:
        print(f"{len(found.kept_out)} other parameters differ and stay as the base has them (norms, biases).")
    print(f"{output}: relative error of the whole delta {error:.4f} (0: the teacher, 1: the base).")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="where the decompositions run")
    parser.add_argument("--json", action="store_true", help="print every layer's numbers")
    asked = parser.parse_args()
    if asked.rank < 1:
        parser.error("--rank must be at least 1")
    try:
        found, error = convert(asked.base, asked.teacher, asked.rank, asked.output, asked.device)
    except UserError as failure:
        print(f"Error: {failure}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(summary(found, error), indent=1))
    else:
        show(found, error, asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
