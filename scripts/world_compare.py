"""Ways of distilling the embedded world's teachers, side by side: substeps, seconds, on policy and off policy.

    python scripts/world_compare.py run --output DIR --substeps 1 --substeps 5 --states student --states data
    python scripts/world_compare.py table --output DIR [--json]

`run` starts one `diffopd distill` after the other, each in DIR/<name> (a finished one is kept, an unfinished one goes
on). Off policy (`--states data`) the same teachers see noised pictures of the world, drawn for every training prompt,
instead of the student's states. `table` collects scores, ratios to the teachers, seconds and network calls; with --json
also 95 % bootstrap intervals over what the prompts ask for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from world_models import ROOT, world

from diffopd.data import asked_of, read_prompts
from diffopd.metrics import bootstrap_interval, ratio_interval

app = typer.Typer(help=__doc__, no_args_is_help=True)
Output = Annotated[Path, typer.Option(help="folder of the runs")]


def draw_row(task: str, row: dict[str, Any], rng: np.random.Generator) -> Image.Image:
    """A picture of exactly what a prompt row says."""
    scene = world.sample_scene(task, rng) | {key: value for key, value in row.items() if key != "prompt"}
    if task == "composition":
        scene["places"] = world._sample_places(scene["relation"], rng)
    return Image.fromarray(world.render(scene))


def with_pictures(folder: Path) -> list[Path]:
    """Copies of the teachers whose prompt rows each name a picture of what they say."""
    copies = []
    for task in world.TASKS:
        copies.append(folder / task)
        if copies[-1].is_dir():
            continue
        copied = folder / f"{task}.unfinished"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(ROOT / "teachers" / task, copied)
        card = (copied / "teacher.toml").read_text()
        (copied / "teacher.toml").write_text(card.replace("../world.py", str(ROOT / "teachers" / "world.py")))
        for split in ("train", "test"):
            rng = np.random.default_rng([len(task), len(split)])
            file = copied / "prompts" / f"{split}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            (copied / "prompts" / split).mkdir(exist_ok=True)
            for number, row in enumerate(rows):
                draw_row(task, row, rng).save(copied / "prompts" / split / f"{number}.png")
                row["file_name"] = f"{split}/{number}.png"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        copied.rename(copies[-1])
    return copies


def recipe_for(output: Path, states: str, recipe: Path) -> Path:
    """The recipe itself, or its copy with teachers that have pictures."""
    if states == "student":
        return recipe
    text = recipe.read_text()
    for copied in with_pictures(output / "teachers-with-pictures"):
        text = text.replace(f'name = "{copied.name}"', f'name = "{copied.resolve()}"')
    target = output / "off-policy.toml"
    target.write_text(text)
    return target


@app.command()
def run(
    output: Output,
    minutes: Annotated[list[float], typer.Option(help="training time, may be given several times")] = [10.0],  # noqa: B006
    substeps: Annotated[list[int], typer.Option(help="m, may be given several times")] = [1, 5],  # noqa: B006
    states: Annotated[list[str], typer.Option(help="student and/or data")] = ["student"],  # noqa: B006
    seeds: Annotated[list[int], typer.Option(help="seeds of the training")] = [0],  # noqa: B006
    learning_rates: Annotated[list[float], typer.Option(help="default: the recipe's")] = [0.0],  # noqa: B006
    processes: int = 1,
    recipe: Annotated[Path, typer.Option(help="a recipe of the three tasks")] = ROOT / "teachers" / "together.toml",
    settings: Annotated[list[str] | None, typer.Option("--set", help="further settings of every run")] = None,
) -> None:
    """Run every combination that is not finished yet."""
    output.mkdir(parents=True, exist_ok=True)
    for kind in states:
        if kind not in ("student", "data"):
            raise typer.BadParameter(f"--states {kind!r}; allowed are student and data")
    grid = [(k, m, n, s, r) for n in minutes for s in seeds for m in substeps for k in states for r in learning_rates]
    for kind, m, length, seed, rate in grid:
        name = f"{kind}-m{m}-{length:g}min-seed{seed}" + (f"-lr{rate:g}" if rate else "")
        if (output / name / "report.html").is_file():
            print(f"{name}: finished already")
            continue
        options = [f"seed={seed}", f"objective.substeps={m}", f'objective.states="{kind}"', *(settings or [])]
        options += [f"train.max_train_seconds={length * 60}"] + ([f"train.learning_rate={rate}"] if rate else [])
        options += ["evaluate.teachers=false"] if kind == "data" else []  # cards do not know the copies with pictures
        command = [sys.executable, "-m", "diffopd.cli", "distill", str(recipe_for(output, kind, recipe))]
        command += ["--output-dir", str(output / name), "--processes", str(processes)]
        print(f"{name} ...", flush=True)
        subprocess.run([*command, *(part for option in options for part in ("--set", option))], check=True)


@app.command()
def table(
    output: Output, as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False
) -> None:
    """Collect what the finished runs say."""
    rows = [summary(path.parent.parent) for path in sorted(output.glob("*/evaluation/scores.json"))]
    if not rows:
        print(f"{output}: no finished run", file=sys.stderr)
        raise typer.Exit(1)
    if as_json:
        print(json.dumps(rows))
        return
    print("| run | updates | seconds | teacher calls | " + " | ".join(f"{t} (of teacher)" for t in world.TASKS) + " |")
    print("|---|---|---|---|" + "---|" * len(world.TASKS))
    for row in rows:
        cells = [f"{row[t]['score']:.3f} ({row[t]['ratio']:.2f})" for t in world.TASKS]
        print(
            f"| {row['run']} | {row['updates']} | {row['seconds']:.0f} | {row['teacher_calls']} | {' | '.join(cells)} |"
        )


def summary(path: Path) -> dict[str, Any]:
    """One run in a row: what it cost and the student's scores with their ratio to each teacher's own."""
    updates = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in updates if row["kind"] == "update"]
    drawn = [json.loads(line) for line in (path / "evaluation" / "prompts.jsonl").read_text().splitlines()]
    row: dict[str, Any] = {
        "run": path.name,
        "updates": updates[-1]["update"],
        "seconds": updates[-1]["seconds"],
        "teacher_calls": sum(update["network_calls"]["teacher"] for update in updates),
    }
    for task in world.TASKS:
        student = [row["score"] for row in drawn if row["model"] == "student" and row["task"] == task]
        teacher = teacher_scores(task)[: len(student)]
        asked = asked_of(read_prompts(ROOT / "teachers" / task / "prompts" / "test.jsonl")[: len(student)])
        ratio, *spread = ratio_interval(student[: len(teacher)], teacher, groups=asked[: len(teacher)])
        row[task] = {"score": float(np.mean(student)), "interval": bootstrap_interval(student, groups=asked)}
        row[task] |= {"ratio": ratio, "ratio_interval": spread}
    return row


def teacher_scores(task: str) -> list[float]:
    """A shelf teacher's own score at its own steps, prompt by prompt, from its card."""
    rows = json.loads((ROOT / "teachers" / task / "scores.json").read_text())["rows"]
    own = [row for row in rows if row["model"] == f"teacher:{task}" and row["task"] == task]
    return max(own, key=lambda row: row["num_inference_steps"])["scores"]


if __name__ == "__main__":
    app()
