"""Prints the gates of what `tune` is shown on the embedded world; exit code 1 where one fails.

    python scripts/check_unseen.py [--prompts 128] [--no-models] [--json]
    python scripts/check_unseen.py --pipeline pipelines/emoji-2-steps --steps 2

Scorers, of the unseen manner and objects: >= .99 on real pictures of them, also after the autoencoder, <= .01 on real
pictures of the same things in the seen manners, 0 on blanks. Model: before its step distillation the student's own call
(few steps, no guidance) is at most .93 of the base's 20 guided steps on prompts of the world's tasks where those differ
(composition and style), in fewer than 4 steps with guidance, too; after it at least .97; told caption and picture, as
`tune` tells its teacher, it draws at least .70 of the pictures in the new manner, from the caption alone at most .05.
"""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from check_world import Gate, decode_again, gate, say, to_images
from world_data import sample, sample_scores, validation_rows
from world_few import MANY_STEPS
from world_image_sheet import draw_from, open_with_image_path
from world_looks import plain_drawings, render
from world_models import ROOT, world
from world_tune_data import RECIPE, WORDS

GUIDANCE = 2.0  # the base's, which the student learnt to do without
ENOUGH = 4  # steps in which the base with its guidance loses nothing

_spec = importlib.util.spec_from_file_location("unseen", ROOT / "teachers" / "unseen.py")
unseen = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unseen)


def real_pictures(drawings: dict[str, np.ndarray], count: int, seed: int) -> tuple[np.ndarray, list[dict]]:
    """`count` pictures (count, 48, 48, 3) of single drawings in turn, and their rows."""
    rng = np.random.default_rng([41, seed])
    names = list(drawings)
    rows = [{"thing": names[number % len(names)]} for number in range(count)]
    scenes = [world.sample_scene("style", rng) | row for row in rows]
    return np.stack([render(scene, drawings) for scene in scenes]), rows


def check_scorer(vae: Any, count: int = 180) -> list[Gate]:
    """The scorers on real pictures of the unseen manner and objects, of seen manners, and on blanks."""
    new, rows = real_pictures(plain_drawings("atlas_3d.png"), count, 0)
    objects, named = real_pictures(plain_drawings("atlas_objects.png", names=unseen.OBJECTS), count, 1)
    seen = [real_pictures(plain_drawings(row=row), count // 3, 2 + row) for row in range(len(world.MANNERS))]
    blank = np.broadcast_to(np.uint8(world.BACKGROUNDS[0]), new.shape)

    def score(scorer: Any, pictures: np.ndarray, said: list[dict]) -> float:
        return float(scorer(to_images(pictures), [""] * len(said), said).mean())

    others = [score(unseen.new_manner, pictures, said) for pictures, said in seen]
    kept = [score(unseen.any_manner, pictures, said) for pictures, said in seen]
    decoded = score(unseen.new_manner, decode_again(vae, new), rows)
    again = score(unseen.scene, decode_again(vae, objects), named)
    return [
        gate("unseen manner: real pictures", score(unseen.new_manner, new, rows), 0.99),
        gate("unseen manner: the same things in seen manners", max(others), 0.01, at_least=False),
        gate("unseen manner: blank", score(unseen.new_manner, blank, rows), 0.0, at_least=False),
        gate("things in any manner: real pictures of seen manners", min(kept), 0.99),
        gate("unseen objects: real pictures", score(unseen.scene, objects, named), 0.99),
        gate("unseen manner: after the autoencoder", decoded, 0.99),
        gate("unseen objects: after the autoencoder", again, 0.99),
    ]


def check_steps(pipeline: Path, base: Path, steps: int, count: int) -> list[Gate]:
    """The student's call before and after its step distillation, as shares of the base's own."""
    from diffusers import StableDiffusionPipeline

    calls = {"base": (20, GUIDANCE), "naive": (steps, 1.0), "guided": (steps, GUIDANCE), "student": (steps, 1.0)}
    scores: dict[str, float] = {}
    for name, call in calls.items():
        folder, variant = (pipeline, None) if name == "student" else (base, MANY_STEPS)
        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, variant=variant)
        drawn = {t: sample_scores(pipe, t, validation_rows(t, count), *call) for t in ("composition", "style")}
        scores[name] = float(np.mean([values.mean() for values, _ in drawn.values()]))
    guided = f"the base in {steps} steps with that guidance, as a share", scores["guided"] / scores["base"]
    return [
        figure(f"base: 20 steps, guidance {GUIDANCE:g}", scores["base"]),
        figure(*guided) if steps >= ENOUGH else gate(*guided, 0.93, at_least=False),
        gate("the student's call before step distillation", scores["naive"] / scores["base"], 0.93, at_least=False),
        gate("the student's call after it", scores["student"] / scores["base"], 0.97),
    ]


def check_sight(pipeline: Path, steps: int, count: int) -> list[Gate]:
    """What the student draws of pictures in the new manner, with the picture shown and without."""
    pictures, rows = real_pictures(plain_drawings("atlas_3d.png"), count, 5)
    prompts = [f"{world.with_article(row['thing'])} in {WORDS['manner']} style" for row in rows]
    pipe = open_with_image_path(pipeline, pipeline)
    told_by = tomllib.loads(RECIPE.read_text())
    pipe.set_ip_adapter_scale(told_by["context"]["scale"])
    seeing = draw_from(pipe, prompts, pictures, steps, told_by["teacher"]["guidance_scale"])
    drawn, named = real_pictures(plain_drawings("atlas_objects.png", names=unseen.OBJECTS), count, 6)
    objects = draw_from(pipe, [f"a {WORDS['object']}"] * count, drawn, steps, told_by["teacher"]["guidance_scale"])
    pipe.unload_ip_adapter()
    blind = sample(pipe, prompts, steps, 1.0)
    told = float(unseen.new_manner(to_images(seeing), prompts, rows).mean())
    return [
        gate("told caption and picture: in the new manner", told, 0.70),
        figure("and close to it", float(unseen.close_manner(to_images(seeing), prompts, rows).mean())),
        figure(
            "told a new word and the picture: an unseen object",
            float(unseen.scene(to_images(objects), [], named).mean()),
        ),
        gate("told the caption alone", float(unseen.new_manner(blind, prompts, rows).mean()), 0.05, at_least=False),
    ]


def figure(name: str, value: float) -> Gate:
    """A line without a limit."""
    return {"gate": name, "value": round(value, 4), "limit": "", "passed": True}


def main(
    pipeline: Annotated[Path, typer.Option(help="the model")] = ROOT / "pipelines" / "emoji-4-steps",
    steps: Annotated[int, typer.Option(min=1, help="that it draws in")] = 4,
    base: Annotated[Path, typer.Option(help=f"the folder whose variant {MANY_STEPS!r} it was distilled from")] = ROOT
    / "pipelines"
    / "emoji-4-steps",
    prompts: Annotated[int, typer.Option(help="prompts a task, and pictures")] = 128,
    models: Annotated[bool, typer.Option(help="the model's gates as well")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False,
) -> None:
    """Checks the scorers and the model."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    gates = check_scorer(AutoencoderKL.from_pretrained(pipeline / "vae", torch_dtype=torch.float32))
    gates += [*check_steps(pipeline, base, steps, prompts), *check_sight(pipeline, steps, prompts)] if models else []
    say(gates, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
