"""Prints the gates of the scorers of what `tune` is shown on the embedded world; exit code 1 where one fails.

    python scripts/check_unseen.py [--json]

Unseen manner and objects: >= .99 on real pictures of them, <= .01 on real pictures of the same things in the seen
manners, 0 on blanks; the score after the autoencoder's round trip is a figure: no model of this base can be above it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from check_world import Gate, decode_again, gate, say, to_images
from world_looks import plain_drawings, render
from world_models import ROOT, world

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
    again = score(unseen.any_manner, decode_again(vae, objects), named)
    return [
        gate("unseen manner: real pictures", score(unseen.new_manner, new, rows), 0.99),
        gate("unseen manner: the same things in seen manners", max(others), 0.01, at_least=False),
        gate("unseen manner: blank", score(unseen.new_manner, blank, rows), 0.0, at_least=False),
        gate("things in any manner: real pictures of seen manners", min(kept), 0.99),
        gate("unseen objects: real pictures", score(unseen.any_manner, objects, named), 0.99),
        figure("unseen manner: after the autoencoder", decoded),
        figure("unseen objects: after the autoencoder", again),
    ]


def figure(name: str, value: float) -> Gate:
    """A line without a limit."""
    return {"gate": name, "value": round(value, 4), "limit": "", "passed": True}


def main(
    pipeline: Annotated[Path, typer.Option(help="the base, for its autoencoder")] = ROOT / "pipelines" / "emoji",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False,
) -> None:
    """Checks the scorers."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    gates = check_scorer(AutoencoderKL.from_pretrained(pipeline / "vae", torch_dtype=torch.float32))
    say(gates, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
