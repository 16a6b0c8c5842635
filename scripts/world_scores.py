"""Measures the shipped references and writes them to their cards, teachers/<task>/scores.json.

    python scripts/world_scores.py composition text style --prompts 1000 --seeds 0 --guidance 1 --guidance 2

For each task: the base at every guidance scale on it, and its teacher on all tasks, at the teacher's own steps and at
the student's. A card holds the hashes of weights, prompts and rewards and the settings of the calls, so that
evaluations of runs can take these scores under exactly these conditions and measure only the student. Different tasks
may run in different processes at the same time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffopd.evaluate import (
    CARD_SCORES,
    base_sha256,
    card_conditions,
    measure,
    reference_contenders,
    result_row,
    task_conditions,
    tasks_of,
)
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.run_folder import atomic_write

ROOT = Path(__file__).resolve().parents[1]


def main(
    tasks: Annotated[list[str], typer.Argument(help="whose cards to write")],
    recipe: Annotated[Path, typer.Option(help="a recipe with these teachers")] = ROOT / "teachers" / "together.toml",
    prompts: int = 1000,
    seeds: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
    guidance: Annotated[list[float], typer.Option(help="of the base")] = [1.0, 2.0, 4.0],  # noqa: B006
    batch: int = 50,
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    options = [f"evaluate.num_prompts={prompts}", f"evaluate.seeds={seeds}", f"evaluate.guidance_scales={guidance}"]
    read = read_recipe(recipe, [*options, f"evaluate.batch_size={batch}"])
    cards = list(check(read).cards)
    contenders, asked = reference_contenders(read, cards), tasks_of(cards, prompts)
    base_hash = base_sha256(read)
    for settings, card in zip(read.teachers, cards, strict=True):
        if card.name not in tasks:
            continue
        base = [(c, t) for c in contenders for t in asked if c.model == "base" and t.name == card.name]
        own = [(c, t) for c in contenders for t in asked if c.model == f"teacher:{card.name}"]
        rows = [
            result_row(result, len(result.scores), seeds) | {"scores": [round(s, 4) for s in result.scores]}
            for result in measure([*base, *own], read)
        ]
        conditions = card_conditions(read, settings, card, base_hash)
        stored = {"conditions": conditions, "tasks": task_conditions(cards), "rows": rows}
        atomic_write(card.folder / CARD_SCORES, json.dumps(stored) + "\n")
        for row in rows:
            setting = f"{row['num_inference_steps']} steps, guidance {row['guidance_scale']:g}"
            print(f"{row['model']:24} on {row['task']:12} {setting:26} {row['score']:.3f} {row['interval']}")


if __name__ == "__main__":
    typer.run(main)
