"""Prints the gates that the embedded world must pass before it is used; exit code 1 where one fails.

    python scripts/check_world.py [--prompts 128] [--seeds 1] [--no-models] [--json]

Scorers: >= .99 on real pictures of the task, also after the autoencoder; <= .05 on pictures of other
captions (any other scene, and scenes that differ in one element), 0 on blanks and noise. Held out: no
test row's combination in training. Teachers at 20 steps on held-out prompts: >= .90 on their own task,
below that on the others, >= .1 above the base with its best guidance. R, a teacher's score at 4 steps
over its score at 20, and the diversity are figures, not gates.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from world_data import sample_scores, spoil
from world_models import ROOT, world

from diffopd.metrics import diversity

Gate = dict[str, Any]
# Style has few: 32 pairs of thing and manner in wordings that no training saw; they come again with other noise.
LEAST_PROMPTS = {"composition": 1000.0, "text": 1000.0, "style": 100.0}


def gate(name: str, value: float, limit: float, *, at_least: bool = True) -> Gate:
    """One line of the report."""
    is_passed = value >= limit if at_least else value <= limit
    return {
        "gate": name,
        "value": round(value, 4),
        "limit": ("" if at_least else "<= ") + str(limit),
        "passed": is_passed,
    }


def to_images(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pixels]


def decode_again(vae: Any, pixels: np.ndarray) -> np.ndarray:
    """Pictures (B, 48, 48, 3) after the autoencoder's round trip."""
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(50)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def check_scorer(task: str, vae: Any, count: int) -> list[Gate]:
    """The scorer on real, re-decoded, swapped, spoilt, blank and random pictures."""
    rng = np.random.default_rng(17)
    scenes = [world.sample_scene(task, rng, held_out=bool(n % 2)) for n in range(count)]
    others = [world.sample_scene(other, rng) for other in world.TASKS if other != task for _ in range(count // 4)]
    rows = [world.describe(task, scene) for scene in scenes]
    pixels = np.stack([world.render(scene) for scene in scenes])
    foreign = np.stack([world.render(scene) for scene in others])

    def score(pictures: np.ndarray, said: list[dict[str, Any]]) -> float:
        return float(world.SCORERS[task](to_images(pictures), [""] * len(said), said).mean())

    swapped = [row for n, row in enumerate(rows) if row != rows[n - 1]]
    kept = [n - 1 for n, row in enumerate(rows) if row != rows[n - 1]]
    spoilt = [world.describe(task, spoil(task, scene, rng)) for scene in scenes]
    noise = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
    blank = np.broadcast_to(np.uint8(world.BACKGROUNDS[0]), pixels.shape)
    return [
        gate(f"{task}: real pictures", score(pixels, rows), 0.99),
        gate(f"{task}: after the autoencoder", score(decode_again(vae, pixels), rows), 0.99),
        gate(f"{task}: pictures of other captions", score(pixels[kept], swapped), 0.05, at_least=False),
        gate(f"{task}: captions wrong in one element", score(pixels, spoilt), 0.05, at_least=False),
        gate(f"{task}: pictures of other tasks", score(foreign, rows[: len(foreign)]), 0.05, at_least=False),
        gate(f"{task}: blank", score(blank, rows), 0.0, at_least=False),
        gate(f"{task}: noise", score(noise, rows), 0.0, at_least=False),
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_held_out(task: str, teachers: Path) -> list[Gate]:
    """Test rows are held out, and share no combination (style: no wording) with the training rows."""
    train, test = (read_rows(teachers / task / "prompts" / f"{name}.jsonl") for name in ("train", "test"))
    if task == "style":
        shared = {row["prompt"] for row in train} & {row["prompt"] for row in test}
    else:
        keys = [{_combination(task, row) for row in rows} for rows in (train, test)]
        shared = keys[0] & keys[1]
        shared |= {_combination(task, row) for row in test if not world.is_scene_held_out(task, row)}
    different = len({row["prompt"] for row in test})
    gates = [gate(f"{task}: combinations shared by train and test", float(len(shared)), 0.0, at_least=False),
             gate(f"{task}: different test prompts", float(different), LEAST_PROMPTS[task])]  # fmt: skip
    if task == "text":
        gates.append(gate("text: letters in use", float(len(set("".join(row["word"] for row in test)))), 26.0))
    return gates


def _combination(task: str, row: dict[str, Any]) -> tuple[str, ...]:
    if task == "text":
        return (row["word"],)
    return world.canonical(row["first"], row["relation"], row["second"])


def load_teacher(pipe: Any, folder: Path) -> dict[str, Any]:
    """Loads a teacher's weights into the pipeline, after comparing their hash with the card's."""
    card = tomllib.loads((folder / "teacher.toml").read_text())
    weights = folder / card["weights"]
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != card["sha256"]:
        raise ValueError(f"{weights} has sha256 {found}, its teacher.toml says {card['sha256']}; restore the file")
    pipe.load_lora_weights(folder, weight_name=card["weights"], adapter_name=card["name"])
    return card


def measure(
    pipe: Any,
    model: str,
    tasks: tuple[str, ...],
    settings: dict[str, Any],
    teachers: Path,
    size: dict[str, int],
) -> list[dict[str, Any]]:
    """One row a task: score, its standard error and diversity on held-out prompts."""
    rows = []
    for task in tasks:
        prompts = read_rows(teachers / task / "prompts" / "test.jsonl")[: size["num_prompts"]]
        runs = [sample_scores(pipe, task, prompts, seed=seed, **settings) for seed in range(size["seeds"])]
        scores = np.concatenate([scores for scores, _ in runs])
        figures = {
            "score": float(scores.mean()),
            "error": float(scores.std() / len(scores) ** 0.5),
            "diversity": float(np.mean([diversity(pictures) for _, pictures in runs])),
        }
        figures = {key: round(value, 4) for key, value in figures.items()}
        rows.append({"model": model, "task": task, **settings, **figures, **size})
        typer.echo(" ".join(f"{key}={value}" for key, value in rows[-1].items()), err=True)
    return rows


def check_models(
    pipe: Any, teachers: Path, size: dict[str, int], scales: list[float]
) -> tuple[list[Gate], list[dict[str, Any]]]:
    """Base at every guidance; teachers at 20 steps on all tasks, at 4 on their own; the gates on them."""
    rows = []
    for scale in scales:
        rows += measure(pipe, "base", world.TASKS, {"steps": 20, "guidance": scale}, teachers, size)
    best = {task: max(row["score"] for row in rows if row["task"] == task) for task in world.TASKS}
    gates: list[Gate] = []
    for task in world.TASKS:
        model, scale = f"teacher:{task}", load_teacher(pipe, teachers / task)["guidance_scale"]
        full = measure(pipe, model, world.TASKS, {"steps": 20, "guidance": scale}, teachers, size)
        short = measure(pipe, model, (task,), {"steps": 4, "guidance": scale}, teachers, size)
        pipe.unload_lora_weights()
        rows += full + short
        scores = {row["task"]: row["score"] for row in full}
        own = scores.pop(task)
        ratio = round(short[0]["score"] / max(own, 1e-9), 4)
        limit = round(own - 0.1, 4)
        gates += [
            gate(f"{task} teacher: own task, 20 steps", own, 0.9),
            gate(f"{task} teacher: best of the other tasks", max(scores.values()), limit, at_least=False),
            gate(f"{task} teacher: above the base's best ({best[task]:.3f}) by", own - best[task], 0.1),
            {"gate": f"{task} teacher: R (4 steps / 20 steps)", "value": ratio, "limit": "", "passed": True},
        ]
    return gates, rows


def say(gates: list[Gate], *, as_json: bool, **further: Any) -> None:
    """Print the gates, a line each or as JSON beside `further`, and exit: code 1 where one fails."""
    if as_json:
        typer.echo(json.dumps({"gates": gates, **further}))
    else:
        for line in gates:
            typer.echo(f"{'pass' if line['passed'] else 'FAIL'}  {line['gate']}: {line['value']} {line['limit']}")
    raise typer.Exit(0 if all(line["passed"] for line in gates) else 1)


def main(
    prompts: Annotated[int, typer.Option(help="held-out prompts a task")] = 128,
    seeds: Annotated[int, typer.Option(help="noises a prompt")] = 1,
    models: Annotated[bool, typer.Option(help="also sample base and teachers (slow)")] = True,
    guidance: Annotated[list[float] | None, typer.Option(help="the base's guidance scales")] = None,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    teachers: Annotated[Path, typer.Option(help="the shelf")] = ROOT / "teachers",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False,
) -> None:
    """Checks the embedded world."""
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    gates = [
        line for task in world.TASKS for line in check_scorer(task, pipe.vae, 400) + check_held_out(task, teachers)
    ]
    rows: list[dict[str, Any]] = []
    if models:
        size = {"num_prompts": prompts, "seeds": seeds}
        found, rows = check_models(pipe, teachers, size, guidance or [1.0, 2.0, 4.0])
        gates += found
    say(gates, as_json=as_json, rows=rows)


if __name__ == "__main__":
    typer.run(main)
