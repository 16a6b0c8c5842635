"""The embedded world's target on many prompts: students of several trainings against their teachers, paired by prompt.

    python scripts/world_target.py measure RUN RUN RUN --output DIR --prompts 1000 [--task text] [--what student ...]
    python scripts/world_target.py table --output DIR [--json]
    python scripts/world_target.py difference DIR/a.json DIR/b.json

`measure` scores, on each task's own held-out prompts: the task's teacher at its own steps and at the student's, the
teachers' weight average and the base at the student's steps, and the student of every RUN. Each (model, task) is one
file in DIR, so what is there is not measured again and tasks may be measured by different processes at the same time;
scores of other weights are refused, not reused. The RUNs must be of one recipe that differs in its seed only. `table`
gives score and ratio to the teacher with 95 % bootstrap intervals. Drawn is what the prompts ask for (a scene, a word,
a thing in a manner), with all its wordings and noises; over several students trainings are drawn, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from world_models import world

from diffopd import data
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.evaluate import (
    Contender,
    Task,
    base_sha256,
    measure,
    reference_contenders,
    student_contender,
    tasks_of,
)
from diffopd.load import student_pipeline
from diffopd.metrics import bootstrap_interval, ratio_interval
from diffopd.processes import default_device
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder, atomic_write
from diffopd.teacher import TeacherCard, teacher_card, weights_sha256

app = typer.Typer(help=__doc__, no_args_is_help=True)
KINDS = ("student", "teacher", "average", "base")
DRAWS = 4000  # of the bootstrap
Output = Annotated[Path, typer.Option(help="folder of the scores")]


def references(recipe: Recipe, task: str) -> list[tuple[str, Contender]]:
    """kind -> teacher, average and base, as far as this task needs them; base and average as the student walks."""
    student, cards = recipe.student, [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    found = []
    for contender in reference_contenders(recipe, cards):
        kind = contender.model.split(":")[0]
        if contender.model == f"teacher:{task}":
            found.append((kind, contender))
        if kind == "average" and contender.num_inference_steps == student.num_inference_steps:
            found.append((kind, contender))
            plain = Contender("average", contender.call, contender.num_inference_steps, student.guidance_scale)
            found.append((kind, plain))
        if kind == "base" and contender.guidance_scale == student.guidance_scale:
            found.append((kind, Contender("base", contender.call, student.num_inference_steps, student.guidance_scale)))
    return found


@app.command("measure")
def measure_all(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one recipe, different seeds")],
    output: Output,
    prompts: int = 1000,
    task: Annotated[list[str], typer.Option(help="may be given several times")] = list(world.TASKS),  # noqa: B006
    what: Annotated[list[str], typer.Option(help=f"of {', '.join(KINDS)}; all by default")] = list(KINDS),  # noqa: B006
    batch: int = 50,
    unseen: Annotated[bool, typer.Option(help="style's pairs of thing and manner that no training saw")] = False,
) -> None:
    """Score what is not scored yet."""
    unknown = [*({*task} - {*world.TASKS}), *({*what} - {*KINDS})]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}; tasks are {', '.join(world.TASKS)}, kinds are {', '.join(KINDS)}")
    torch.set_num_threads(1)
    try:
        opened = [RunFolder.open(run) for run in runs]
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    output.mkdir(parents=True, exist_ok=True)
    check_runs(opened)
    recipe = opened[0].recipe()
    settings = recipe.evaluate.model_copy(update={"batch_size": batch, "seeds": [0]})
    recipe = recipe.model_copy(update={"evaluate": settings})
    cards = [teacher_card(s.name, recipe.path) for s in recipe.teachers]
    tasks = {t.name: t for t in tasks_of(cards, prompts)}
    if unseen:
        task, tasks = ["style"], {"style": unseen_pairs(tasks["style"], cards, prompts)}
    for name in task:
        weights = reference_weights(recipe)
        for kind, contender in references(recipe, name):
            if kind in what:
                score(contender, contender.model.replace(":", "-"), weights, tasks[name], recipe, output)
        for folder in opened if "student" in what else []:
            student = student_contender(folder.recipe(), student_pipeline(folder.path).to(default_device()))
            weights = weights_sha256(folder.latest_checkpoint())
            score(student, f"student-{folder.path.name}", weights, tasks[name], recipe, output)


def unseen_pairs(style: Task, cards: list[TeacherCard], prompts: int) -> Task:
    """The style task on prompts/unseen.jsonl; they are few, so each comes again with other noise."""
    (card,) = [card for card in cards if card.name == "style"]
    rows = read_prompts(card.folder / "prompts" / "unseen.jsonl")
    return Task("style", (rows * -(-prompts // len(rows)))[:prompts], style.reward)


def check_runs(runs: list[RunFolder]) -> None:
    """Raises typer.BadParameter for two runs of one name (one file of scores) or of different recipes."""
    kept = [run.recipe().model_dump(mode="json", exclude={"seed", "output_dir", "path"}) for run in runs]
    for number, (run, recipe) in enumerate(zip(runs, kept, strict=True)):
        if run.path.name in [other.path.name for other in runs[:number]]:
            raise typer.BadParameter(f"two runs are named {run.path.name!r}; scores are kept by that name, rename one")
        different = [key for key in recipe if recipe[key] != kept[0][key]]
        if different:
            raise typer.BadParameter(
                f"{run.path} and {runs[0].path} differ in [{different[0]}], not only in their seed"
            )


def reference_weights(recipe: Recipe) -> str:
    """One hash of the base and all teachers."""
    cards = [teacher_card(settings.name, recipe.path).digest() for settings in recipe.teachers]
    return hashlib.sha256(" ".join([base_sha256(recipe), *map(str, cards)]).encode()).hexdigest()


def score(contender: Contender, label: str, weights: str, task: Task, recipe: Recipe, output: Path) -> None:
    """One file of scores, prompt by prompt. Raises typer.BadParameter where it holds those of other weights."""
    steps, scale = contender.num_inference_steps, contender.guidance_scale
    target = output / f"{task.name}--{label}--{steps}-steps--guidance-{scale:g}.json"
    if target.is_file():
        kept = json.loads(target.read_text())
        if kept["weights"] != weights:
            raise typer.BadParameter(f"{target} holds scores of other weights; give another --output, or remove it")
        if len(kept["scores"]) == len(task.rows):
            return
    (result,) = measure([(contender, task)], recipe)
    row = {"task": task.name, "model": contender.model, "label": label, "steps": steps, "guidance_scale": scale}
    row |= {"diversity": result.diversity, "seconds": round(result.seconds, 1), "weights": weights}
    row |= {"scores": [round(s, 4) for s in result.scores], "asked": asked_of(task)}
    atomic_write(target, json.dumps(row) + "\n")


def asked_of(task: Task) -> list[int]:
    """What each prompt asks for, as a number: equal for other wordings, and for other pictures, of the same."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(asked, len(numbers)) for asked in data.asked_of(task.rows)]


@app.command()
def table(
    output: Output, as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False
) -> None:
    """What the scores say; the students of all runs are one row, and a row each."""
    files = [json.loads(path.read_text()) for path in sorted(output.glob("*--*.json"))]
    if not files:
        typer.echo(f"{output}: no scores. Run the measure command first.", err=True)
        raise typer.Exit(1)
    rows = []
    for name in dict.fromkeys(file["task"] for file in files):
        rows += rows_of([file for file in files if file["task"] == name])
    if as_json:
        typer.echo(json.dumps(rows))
        return
    head = ("task", "model", "steps", "guidance", "score", "of the teacher", "diversity", "prompts (asking for)")
    typer.echo(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        (low, high), (below, above) = row["interval"], row["ratio_interval"]
        cells = [row["task"], row["model"], row["steps"], f"{row['guidance_scale']:g}"]
        cells += [f"{row['score']:.3f} ({low:.3f} to {high:.3f})", f"{row['ratio']:.3f} ({below:.3f} to {above:.3f})"]
        cells += [f"{row['diversity']:.3f}", f"{row['num_prompts']} ({row['num_asked']})"]
        typer.echo(f"| {' | '.join(map(str, cells))} |")


@app.command()
def difference(
    first: Annotated[Path, typer.Argument(help="a file of scores of the measure command")],
    second: Annotated[Path, typer.Argument(help="another one of the same task")],
) -> None:
    """Mean of `first` less `second`, paired by row, with its 95 % bootstrap interval over what is asked."""
    one, other = (json.loads(path.read_text()) for path in (first, second))
    if one["task"] != other["task"] or len(one["scores"]) != len(other["scores"]):
        raise typer.BadParameter(f"{first} and {second} are not of the same prompts")
    if one["asked"] != other["asked"]:
        raise typer.BadParameter(f"{first} and {second} do not say the same of what is asked; measure one again")
    apart = np.array(one["scores"]) - np.array(other["scores"])
    low, high = bootstrap_interval(apart, groups=one["asked"], resamples=DRAWS)
    typer.echo(f"{one['task']}: {apart.mean():+.3f} ({low:+.3f} to {high:+.3f}), {len(apart)} rows")


def rows_of(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one task. Raises typer.Exit where its teacher's own score is missing."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    asked = files[0]["asked"]
    for file in files:
        setting = file["steps"], file["guidance_scale"]
        groups[file["label"], *setting].append(file)
        if file["model"] == "student":
            groups["student, all runs", *setting].append(file)
    own = [key for key in groups if key[0].startswith("teacher")]
    if not own:
        typer.echo(f"{files[0]['task']}: the teacher is not measured yet.", err=True)
        raise typer.Exit(1)
    teacher = np.array(groups[max(own, key=lambda key: key[1])][0]["scores"])
    rows = []
    for (label, steps, scale), of_setting in groups.items():
        held = np.array([file["scores"][: len(teacher)] for file in of_setting])
        count = held.shape[1]
        how = {"groups": asked[:count], "resamples": DRAWS}
        interval, (ratio, *spread) = bootstrap_interval(held, **how), ratio_interval(held, teacher[:count], **how)
        row = {"task": files[0]["task"], "model": label, "steps": steps, "guidance_scale": scale}
        row |= {"score": float(held.mean()), "interval": interval, "ratio": ratio, "ratio_interval": spread}
        row |= {"num_prompts": count, "num_asked": len(set(asked[:count])), "trainings": len(held)}
        row["diversity"] = float(np.mean([file["diversity"] for file in of_setting]))
        rows.append(row)
    return rows


if __name__ == "__main__":
    app()
