"""Draws the README's picture from a finished run: base, teacher and student over the same prompts and noise.

python scripts/world_figure.py runs/together docs/together.png
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

ZOOM, GAP, LABEL, LEFT = 3, 8, 44, 150
INK, PAPER, FAINT = (30, 30, 30), (255, 255, 255), (120, 120, 120)
ROWS = {"base": "base", "teacher": "its teacher", "student": "student"}


def main(
    run: Annotated[Path, typer.Argument(help="a run folder with an evaluation")],
    target: Annotated[Path, typer.Argument(help="the PNG to write")],
    columns: Annotated[int, typer.Option(help="prompts a task")] = 5,
) -> None:
    """One block a task: prompts across, models down; each row says its steps and guidance."""
    entries = json.loads((run / "evaluation" / "grid" / "index.json").read_text())
    scores = json.loads((run / "evaluation" / "scores.json").read_text())["rows"]
    tasks = dict.fromkeys(entry["task"] for entry in entries)
    blocks = [block(run / "evaluation", entries, scores, task, columns) for task in tasks]
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), PAPER)
    top = 0
    for part in blocks:
        sheet.paste(part, (0, top))
        top += part.height
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, optimize=True)
    typer.echo(f"{target}: {sheet.width} x {sheet.height}")


def block(folder: Path, entries: list[dict], scores: list[dict], task: str, columns: int) -> Image.Image:
    """The pictures of one task with its prompts above them."""
    shown = [entry for entry in entries if entry["task"] == task][:columns]
    first = Image.open(folder / next(iter(shown[0]["models"].values()))["file"])
    side = first.width * ZOOM
    cell = side + 40
    font, small = ImageFont.load_default(18), ImageFont.load_default(15)  # smaller ones lose their spaces
    sheet = Image.new("RGB", (LEFT + columns * cell, LABEL + len(ROWS) * (side + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, entry in enumerate(shown):
        left = LEFT + column * cell
        lines = "\n".join(textwrap.wrap(entry["prompt"], 24))
        draw.multiline_text((left + side // 2, LABEL - 4), lines, INK, small, anchor="md", align="center")
        for row, (kind, label) in enumerate(ROWS.items()):
            top = LABEL + row * (side + GAP)
            said = entry["models"].get(kind if kind != "teacher" else f"teacher-{task}")
            if said is None:
                continue
            picture = Image.open(folder / said["file"]).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            if column == 0:
                draw.text((4, top + side // 2 - 22), label, INK, font)
                draw.text((4, top + side // 2 + 3), setting(scores, kind, task), FAINT, small)
    return sheet


def setting(scores: list[dict], kind: str, task: str) -> str:
    """'20 steps, guidance 2' of the pictures in the grid."""
    model = f"teacher:{task}" if kind == "teacher" else kind
    rows = [row for row in scores if row["model"] == model and row["task"] == task]
    if not rows:
        return ""
    row = next((row for row in rows if "is_reference" in row), rows[0])
    guidance = "unguided" if row["guidance_scale"] == 1 else f"guidance {row['guidance_scale']:g}"
    return f"{row['num_inference_steps']} steps, {guidance}"


if __name__ == "__main__":
    typer.run(main)
