"""Measures the shipped references and writes them to their cards, teachers/<task>/scores.json and README.md.

    python scripts/world_scores.py composition text style --prompts 1000 --seeds 0 --guidance 1 --guidance 2

For each task: the base at every guidance scale on it, and its teacher on all tasks, at the teacher's own steps and at
the student's. A card holds the hashes of weights, prompts and rewards and the settings of the calls, so that
evaluations of runs can take these scores under exactly these conditions and measure only the student. Different tasks
may run in different processes at the same time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from diffopd.data import asked_of
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
from diffopd.teacher import TeacherCard

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
    base_hash, kinds = base_sha256(read), {task.name: asked_of(task.rows) for task in asked}
    for settings, card in zip(read.teachers, cards, strict=True):
        if card.name not in tasks:
            continue
        base = [(c, t) for c in contenders for t in asked if c.model == "base" and t.name == card.name]
        own = [(c, t) for c in contenders for t in asked if c.model == f"teacher:{card.name}"]
        rows = [
            result_row(result, kinds[result.task], seeds, shares=True)
            | {"scores": [round(s, 4) for s in result.scores]}
            for result in measure([*base, *own], read)
        ]
        conditions = card_conditions(read, settings, card, base_hash)
        stored = {"conditions": conditions, "tasks": task_conditions(cards), "rows": rows}
        atomic_write(card.folder / CARD_SCORES, json.dumps(stored) + "\n")
        atomic_write(card.folder / "README.md", card_text(card, rows, seeds))
        for row in rows:
            setting = f"{row['num_inference_steps']} steps, guidance {row['guidance_scale']:g}"
            print(f"{row['model']:24} on {row['task']:12} {setting:26} {row['score']:.3f} {row['interval']}")


def card_text(card: TeacherCard, rows: list[dict[str, Any]], seeds: list[int]) -> str:
    """README.md of a teacher's folder: what it is and what it scores."""
    count = rows[0]["num_prompts"]
    lines = [
        f"# {card.name}",
        "",
        f"A teacher of the embedded world: an adapter on `pipelines/{card.base}`, made by",
        f"`scripts/world_train.py teacher {card.name}` from pictures of this task with clean captions. Licence: "
        f"{card.license}; the drawings'",
        "licences are in `teachers/sprites/CREDITS.md`.",
        "",
        f"Measured by `scripts/world_scores.py {card.name} --prompts {count}` on held-out prompts (seeds {seeds}; 95 % "
        "bootstrap interval",
        "over what the prompts ask for; diversity is the mean distance of pictures at 16 x 16 pixels).",
        "`scores.json` holds the same by prompt.",
        "",
        "| model | task | steps | guidance | score | interval | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['model']} | {row['task']} | {row['num_inference_steps']} | {row['guidance_scale']:g} "
            f"| {row['score']:.3f} | {low:.3f} to {high:.3f} | {row['diversity']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
