"""Tunes a step-distilled model on the embedded world in several ways and scores what came of it.

    python scripts/world_tune_data.py --output DATA --pipeline MODEL
    python scripts/world_tune.py run   --data DATA/word --output DIR --method d-opsd --method sft --rate 1e-3 --seed 0
    python scripts/world_tune.py score --data DATA/word --output DIR [--steps 4 --steps 50] [--prompts 100]
    python scripts/world_tune.py table --output DIR [--pool] [--json]
    python scripts/world_tune.py teacher --data DATA/manner

`run` starts one `diffopd tune` after the other, each in DIR/<name> (a finished one is kept, an unfinished one goes on);
the options are combined, further settings come by --set and name the run by --label. `score` draws the untouched model
and every run's student, at each number of steps: the set's held-out prompts, scored for what the pictures teach, and
held-out prompts of the world's three tasks, for what is forgotten and how sharp it is. It also scores the untouched
model told what the teacher is told. `table` prints the figures with 95 % bootstrap intervals over what the prompts ask
for, with all wordings and noises of it; of files of scores that do not say it, over prompts of the set, with a warning.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from world_data import sample, save_sheet
from world_image_sheet import draw_from, open_with_image_path
from world_models import ROOT, world
from world_tune_data import KNOWN, OBJECT, WORDS

from diffopd.data import PromptRow, asked_of, read_prompts
from diffopd.drawing import sharpness
from diffopd.images import read_pictures
from diffopd.load import load_pipeline, student_pipeline
from diffopd.locate import find_pipeline
from diffopd.metrics import bootstrap_interval, diversity, ratio_interval
from diffopd.run_folder import atomic_write
from diffopd.tune_recipe import read_tune_recipe

app = typer.Typer(help=__doc__, no_args_is_help=True)
Output = Annotated[Path, typer.Option(help="folder of the runs")]
Data = Annotated[Path, typer.Option(help="one set of world_tune_data.py")]
NOISES = 3  # drawings of each held-out prompt of the set
Start = Annotated[int, typer.Option(help="first of the held-out prompts; it also seeds the noise")]
UNTOUCHED, TOLD = "untouched", "untouched, told what the teacher is told"

_spec = importlib.util.spec_from_file_location("unseen", ROOT / "teachers" / "unseen.py")
unseen = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unseen)


@app.command()
def run(
    data: Data,
    output: Output,
    method: Annotated[list[str], typer.Option(help="d-opsd, sft or dreambooth")] = ["d-opsd", "sft"],  # noqa: B006
    rate: Annotated[list[float], typer.Option(help="learning rates")] = [1e-3],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="seeds of the training")] = [0],  # noqa: B006
    updates: int = 300,
    processes: int = 1,
    label: Annotated[str, typer.Option(help="of the further settings, in the runs' names")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="further settings of every run")] = None,
    without: Annotated[str, typer.Option(help="a table of the set's recipe that is left out, such as prior")] = "",
) -> None:
    """Run every combination that is not finished yet."""
    output.mkdir(parents=True, exist_ok=True)
    recipe = recipe_without(data, without) if without else data / "tune.toml"
    for kind, length, number in [(k, r, n) for n in seed for r in rate for k in method]:
        name = f"{kind}{label and '-' + label}-lr{length:g}-{updates}updates-seed{number}"
        if (output / name / "report.html").is_file():
            print(f"{name}: finished already")
            continue
        options = [f"seed={number}", f"train.learning_rate={length}", f"train.max_train_steps={updates}"]
        command = [sys.executable, "-m", "diffopd.cli", "tune", str(recipe), "--method", kind]
        command += ["--output-dir", str(output / name), "--processes", str(processes), "--force"]
        print(f"{name} ...", flush=True)
        more = [part for option in [*options, *(settings or [])] for part in ("--set", option)]
        subprocess.run([*command, *more], check=True)


def recipe_without(data: Path, table: str) -> Path:
    """The set's recipe without one of its tables, beside it. Raises BadParameter where it has none of that name."""
    parts = re.split(r"^(?=\[)", (data / "tune.toml").read_text(), flags=re.MULTILINE)
    kept = [part for part in parts if not part.startswith(f"[{table}]")]
    if len(kept) == len(parts):
        raise typer.BadParameter(f"--without {table}: {data / 'tune.toml'} has no such table")
    target = data / f"tune-without-{table}.toml"
    target.write_text("".join(kept))
    return target


@app.command("score")
def score_all(
    data: Data,
    output: Output,
    steps: Annotated[list[int], typer.Option(help="numbers of steps, the first is the deployed one")] = [4, 50],  # noqa: B006
    prompts: Annotated[int, typer.Option(help="held-out prompts of each of the three tasks")] = 100,
    only: Annotated[str, typer.Option(help="of the runs, those whose name has this in it")] = "",
    start: Start = 0,
) -> None:
    """Score what is not scored yet, into DIR/scores/, and draw a grid.png of them.

    With another --start than 0, on prompts and noise that no setting was chosen by: into DIR/scores-START/.
    """
    torch.set_num_threads(1)
    model = read_tune_recipe(str(data / "tune.toml"), None, None).student.pretrained_model_name_or_path
    target = scores_in(output, start)
    target.mkdir(parents=True, exist_ok=True)
    runs = [path.parent for path in sorted(output.glob("*/report.html")) if only in path.parent.name]
    for count in steps:
        score_one(lambda: load_pipeline(model), UNTOUCHED, data, target, count, prompts, start)
        for folder in runs:
            score_one(lambda folder=folder: student_pipeline(folder), folder.name, data, target, count, prompts, start)
    if data.name == "word":
        score_one(lambda: load_pipeline(model), TOLD, data, target, steps[0], prompts, start)
    draw_grid(target, steps)


def scores_in(output: Path, start: int) -> Path:
    """The folder of scores on the held-out prompts from `start` on."""
    return output / (f"scores-{start}" if start else "scores")


def score_one(opened: Any, name: str, data: Path, target: Path, steps: int, count: int, start: int = 0) -> None:
    """One model at one number of steps, where it is not scored yet."""
    file = target / f"{name}--{steps}-steps.json"
    if file.is_file():
        return
    pipe = opened()
    rows = read_prompts(data / "held-out.jsonl") * NOISES
    told = [row.prompt.replace(WORDS["word"], KNOWN) if name == TOLD else row.prompt for row in rows]
    found = sample(pipe, told, steps, 1.0, seed=start)
    result: dict[str, Any] = {
        "model": name,
        "steps": steps,
        "start": start,
        "subject": subject_scores(data.name, found, rows),
    }
    if data.name == "manner":
        result["subject_close"] = unseen.close_manner(found, told, [row.metadata for row in rows]).tolist()
    result |= {"asked": asked_of(rows), "shown": [bool(row.metadata.get("shown", True)) for row in rows]}
    result["subject_sharpness"] = [sharpness(picture) for picture in found]
    shown = found[:: max(1, len(found) // 12)][:12]
    result |= {"sharpness": [], "diversity": {}}
    for task in world.TASKS:
        held = held_out(task, count, start)
        drawn = sample(pipe, [row.prompt for row in held], steps, 1.0, seed=start)
        scores = world.SCORERS[task](drawn, [row.prompt for row in held], [row.metadata for row in held])
        result[task] = [float(score) for score in scores]
        result["sharpness"] += [sharpness(picture) for picture in drawn]
        result["diversity"][task] = diversity(drawn)
        shown += drawn[:4]
    save_sheet(np.concatenate([np.asarray(picture) for picture in shown], 1), file.with_suffix(".png"), zoom=2)
    atomic_write(file, json.dumps(result))
    print(f"{name}, {steps} steps: subject {np.mean(result['subject']):.3f}", flush=True)


def held_out(task: str, count: int, start: int = 0) -> list[PromptRow]:
    """`count` held-out prompts of one of the world's tasks."""
    return read_prompts(ROOT / "teachers" / task / "prompts" / "test.jsonl")[start : start + count]


def subject_scores(kind: str, pictures: list[Image.Image], rows: list[PromptRow]) -> list[float]:
    """1.0 where a picture has what the set teaches: the manner, the object, or what the word stands for."""
    scorer = {"manner": unseen.new_manner, "object": unseen.scene, "word": world.SCORERS["style"]}[kind]
    return [float(score) for score in scorer(pictures, [row.prompt for row in rows], [row.metadata for row in rows])]


def draw_grid(folder: Path, steps: list[int]) -> None:
    """One row of drawings for each score: twelve of the set's held-out prompts, four of each task."""
    files = [path for count in steps for path in sorted(folder.glob(f"*--{count}-steps.png"))]
    rows = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    Image.fromarray(np.concatenate(rows)).save(folder / "grid.png")
    print(f"{folder / 'grid.png'}, from above: " + "; ".join(path.stem for path in files))


@app.command()
def teacher(
    data: Data,
    noises: Annotated[int, typer.Option(help="drawings of each picture")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a line")] = False,
) -> None:
    """Share of the set's own pictures that the untouched model draws rightly, told as the teacher is told."""
    if data.name == "word":
        raise typer.BadParameter(f"{data}: its teacher sees no picture; `score` scores the untouched model so told")
    torch.set_num_threads(1)
    asked = read_tune_recipe(str(data / "tune.toml"), None, None)
    folder, shown = find_pipeline(asked.student.pretrained_model_name_or_path), read_pictures(data)
    pipe = open_with_image_path(folder, folder)
    pipe.set_ip_adapter_scale(asked.context.scale)
    captions = [one.caption for one in shown]
    pixels = np.stack([np.asarray(Image.open(one.path).convert("RGB")) for one in shown])
    rows = [PromptRow(caption, told_of(caption)) for caption in captions]
    call = asked.student.num_inference_steps, asked.teacher.guidance_scale
    drawn = [draw_from(pipe, captions, pixels, *call, seed=seed) for seed in range(noises)]
    scores = [np.mean(subject_scores(data.name, [Image.fromarray(p) for p in one], rows)) for one in drawn]
    found = {"pictures": len(shown), "noises": [float(score) for score in scores], "mean": float(np.mean(scores))}
    each = ", ".join(f"{score:.2f}" for score in scores)
    print(json.dumps(found) if as_json else f"{found['mean']:.3f} of {len(shown)} pictures; by noise {each}")


def told_of(caption: str) -> dict[str, str]:
    """What the scorer needs to know of one of the set's own pictures."""
    relation = next((relation for relation in world.RELATIONS if relation in caption), None)
    thing = next((thing for thing in world.THINGS if thing in caption), OBJECT)
    return {"first": OBJECT, "relation": relation, "second": thing} if relation else {"thing": thing}


@app.command()
def picture(
    output: Output,
    to: Annotated[Path, typer.Option(help="file to write")],
    model: Annotated[list[str], typer.Option(help="a scored run, or untouched; once for each row, from above")],
    heading: Annotated[list[str], typer.Option(help="what stands before each row")],
    steps: Annotated[int, typer.Option(help="of the drawings")] = 4,
    start: Start = 0,
) -> None:
    """Draw chosen rows of what is scored under each other."""
    files = [scores_in(output, start) / f"{name}--{steps}-steps.png" for name in model]
    missing = next((file for file in files if not file.is_file()), None)
    if missing or len(heading) != len(files):
        raise typer.BadParameter(f"{missing} is not there" if missing else "give one --heading for each --model")
    rows = [Image.open(file).convert("RGB") for file in files]
    margin = 12 + max(len(text) for text in heading) * 6
    page = Image.new("RGB", (margin + rows[0].width, sum(row.height for row in rows)), "white")
    for number, (row, text) in enumerate(zip(rows, heading, strict=True)):
        page.paste(row, (margin, number * row.height))
        ImageDraw.Draw(page).text((4, int((number + 0.45) * row.height)), text, fill="black")
    page.save(to)


@app.command()
def table(
    output: Output,
    pool: Annotated[bool, typer.Option(help="one row for all seeds of a run, its interval over them as well")] = False,
    start: Start = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Collect what is scored."""
    rows = collected(output, pool=pool, start=start)
    if not rows:
        print(f"{output}: nothing is scored yet", file=sys.stderr)
        raise typer.Exit(1)
    if as_json:
        print(json.dumps(rows))
        return
    columns = [name for name in rows[0] if name not in ("model", "steps", "trainings")]
    print(f"| model | trainings | steps | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for row in sorted(rows, key=lambda row: (row["steps"], row["model"])):
        cells = [f"{row[c][0]:.3f} ({row[c][1]:.3f}-{row[c][2]:.3f})" if row[c] else "" for c in columns]
        print(f"| {row['model']} | {row['trainings']} | {row['steps']} | {' | '.join(cells)} |")


def collected(output: Path, *, pool: bool, start: int = 0) -> list[dict[str, Any]]:
    """A row for each model (pool: for all seeds of a run) and number of steps that is scored, as `summary` has it."""
    found = [json.loads(path.read_text()) for path in sorted(scores_in(output, start).glob("*.json"))]
    before = {scored["steps"]: scored for scored in found if scored["model"] == UNTOUCHED}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for scored in found:
        name = re.sub(r"-seed\d+$", "", scored["model"]) if pool else scored["model"]
        groups[name, scored["steps"]].append(scored)
    return [
        {"model": name, "steps": steps, "trainings": len(group)} | summary(group, before[steps])
        for (name, steps), group in groups.items()
    ]


def summary(group: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals, over what is asked and trainings; kept and the sharpnesses are shares of `before`'s.

    subject_shown and subject_new are of things that the pictures show and of things that they do not, subject_close
    of drawings that are also close to the real one; kept and
    sharpness are of the three tasks, subject_sharpness of the set's held-out prompts.
    """
    row: dict[str, Any] = {}
    subject, shown = np.array([scored["subject"] for scored in group]), np.array(before["shown"])
    asked = asked_in(group[0])
    for name, kept in (("subject", shown | True), ("subject_shown", shown), ("subject_new", ~shown)):
        of_kept = [one for one, is_kept in zip(asked, kept, strict=True) if is_kept]
        row[name] = with_interval(subject[:, kept], of_kept) if kept.any() else None
    is_known = all("subject_close" in scored for scored in group)
    row["subject_close"] = with_interval([scored["subject_close"] for scored in group], asked) if is_known else None
    start = before.get("start", 0)
    kinds = {task: asked_of(held_out(task, len(before[task]), start)) for task in world.TASKS}
    for task in world.TASKS:
        row[task] = with_interval(np.array([scored[task] for scored in group]), kinds[task])
    together = [(task, one) for task in world.TASKS for one in kinds[task]]
    kept = [[value for task in world.TASKS for value in scored[task]] for scored in [*group, before]]
    row["kept"] = ratio_interval(kept[:-1], kept[-1], groups=together)
    for name, asked_for in (("sharpness", together), ("subject_sharpness", asked)):
        row[name] = ratio_interval([scored[name] for scored in group], before[name], groups=asked_for)
    return row


def with_interval(scores: Sequence[float] | np.ndarray, asked: Sequence[Hashable]) -> tuple[float, float, float]:
    """Mean and its interval."""
    return float(np.mean(scores)), *bootstrap_interval(scores, groups=asked)


def asked_in(scored: dict[str, Any]) -> list[Any]:
    """What each of the set's prompts asks for; where the file does not say it, which prompt it is."""
    if "asked" in scored:
        return scored["asked"]
    print(f"{scored['model']}: scores that do not say what was asked; intervals are over prompts", file=sys.stderr)
    count = len(scored["subject"])
    return [number % (count // NOISES) for number in range(count)]


if __name__ == "__main__":
    app()
