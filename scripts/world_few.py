"""Distils the embedded world's picture-reading base to few steps, on the few-step student's own trajectory.

    python scripts/world_few.py train --output DIR --drawings FOLDER --pipeline BASE --seconds 2700 [--resume]
    python scripts/world_few.py train ... --batch 256 --base-rows 128 --fresh 8 --workers 5 --device cuda
    python scripts/world_few.py train ... --pipeline pipelines/emoji-4-steps --steps 2 --guidance 1     fewer still
    python scripts/world_few.py save  --output DIR --pipeline BASE --destination FOLDER

BASE is what `world_image.py save` wrote after a training with base rows, and DIR holds the latents-N.npz of that
training. A batch has rows told by text alone, without the adapter, and rows with a picture in view. The denoiser's own
weights move, the adapter's stay: they serve the base and the student. `save` writes BASE with the student's denoiser
for its own, and the base's beside it as the variant "many-steps"; not where BASE has such a variant itself, as a model
of few steps has.
"""

from __future__ import annotations

import shutil
import time
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
import world_data
from world_image import SCENES, Pool, State
from world_image_models import ImagePath, open_frozen
from world_looks import Group, draw_group, find_objects
from world_models import build_scheduler
from world_training import Device, Output, Workers, cosine, drawn_ahead, log_row, prepare

MANY_STEPS = "many-steps"
Told = tuple[torch.Tensor, torch.Tensor | None]  # tokens, and hidden states of the pictures in view


class Walk:
    """The deterministic steps of the stock scheduler's trailing grid, and the finer ones between two of them."""

    def __init__(self, steps: int, substeps: int, device: torch.device) -> None:
        levels = build_scheduler().alphas_cumprod.to(device)
        self.stride = 1000 // (steps * substeps)
        self.alphas, self.sigmas = levels.sqrt(), (1 - levels).sqrt()
        self.timesteps = [999 - n * substeps * self.stride for n in range(steps)]
        self.substeps = substeps

    def coefficients(self, now: int, then: int) -> tuple[Any, Any]:
        """A step's (f, h): x_then = f x_now + h v. Level -1 is the picture. DDIM (arXiv:2010.02502, eq 12) of v."""
        alpha, sigma = self.alphas[now], self.sigmas[now]
        to_alpha, to_sigma = (self.alphas[then], self.sigmas[then]) if then >= 0 else (1.0, 0.0)
        return to_alpha * alpha + to_sigma * sigma, to_sigma * alpha - to_alpha * sigma

    def next(self, timestep: int) -> int:
        """The level of the state after that at `timestep`."""
        return timestep - self.substeps * self.stride


@torch.no_grad()
def landing(
    teacher: ImagePath, walk: Walk, state: torch.Tensor, timestep: int, told: Told, untold: Told, guidance: float
) -> torch.Tensor:
    """Where the teacher's substeps from a state lead; `untold` is what its unguided half is told (guidance 1: none)."""
    tokens, hidden = told
    if guidance != 1:
        tokens = torch.cat([tokens, untold[0]])
        hidden = None if hidden is None else torch.cat([hidden, untold[1]])
    for n in range(walk.substeps):
        now = timestep - n * walk.stride
        times = torch.full((len(tokens),), now, device=state.device)
        found = teacher(state if guidance == 1 else torch.cat([state, state]), times, tokens, hidden)
        if guidance != 1:
            given, free = found.chunk(2)
            found = free + guidance * (given - free)
        keep, move = walk.coefficients(now, now - walk.stride)
        state = keep * state + move * found
    return state


def few_loss(
    student: ImagePath, teacher: ImagePath, walk: Walk, noise: torch.Tensor, told: Told, untold: Told, guidance: float
) -> torch.Tensor:
    """Mean squared error of the velocity that would land where the teacher does, over the student's own states.

    Progressive distillation's target (arXiv:2202.00512, eq 9) of a guided teacher (arXiv:2210.03142), at states that
    the student reaches by itself, which carry no gradient.
    """
    state, losses = noise, []
    for timestep in walk.timesteps:
        keep, move = walk.coefficients(timestep, walk.next(timestep))
        wanted = (landing(teacher, walk, state, timestep, told, untold, guidance) - keep * state) / move
        times = torch.full((len(state),), timestep, device=state.device)
        found = student(state, times, *told)
        losses.append(F.mse_loss(found, wanted))
        state = (keep * state + move * found).detach()
    return torch.stack(losses).mean()


def train(
    output: Output,
    drawings: Annotated[Path, typer.Option(help="folder of the unpacked packages, as for world_image.py")],
    pipeline: Annotated[Path, typer.Option(help="the picture-reading base")],
    seconds: Annotated[
        float, typer.Option(help="processor time of the whole training, resumed parts included")
    ] = 2700.0,
    resume: Annotated[bool, typer.Option(help="go on from <output>/few.pt")] = False,
    batch: int = 16,
    base_rows: Annotated[int, typer.Option(help="rows of a batch that are told by text alone")] = 8,
    learning_rate: float = 5e-4,
    guidance: Annotated[float, typer.Option(help="the base's, which the student learns to do without")] = 2.0,
    steps: Annotated[int, typer.Option(help="the student's")] = 4,
    substeps: Annotated[int, typer.Option(help="the base's to one of the student's")] = 2,
    capacity: Annotated[int, typer.Option(help="groups of scenes kept")] = 3000,
    fresh: Annotated[int, typer.Option(help="groups drawn an update; before the first, 50 times as many")] = 1,
    device: Device = "cpu",
    workers: Workers = 0,
) -> None:
    """Trains the student's denoiser."""
    place = prepare(device)
    pipe = open_frozen(pipeline)
    student = ImagePath(pipe, begin_from=pipeline, denoiser=True)
    pipe.to(place)
    for part in ("encoder", "projection", "attention"):
        student.trained[part].requires_grad_(False)
    teacher = deepcopy(student).requires_grad_(False)
    state, walk = State(student), Walk(steps, substeps, place)
    if resume:
        state.load(output / "few.pt")
    pool, objects, captions = Pool(pipe, capacity), find_objects(drawings), world_data.Pool(output, pipe.tokenizer)

    def draw(number: int) -> Group:
        return draw_group(SCENES, np.random.default_rng([26, number]), objects)

    def unguided(count: int, is_shown: bool) -> Told:
        tokens = torch.tensor([pool.tokenize("")] * count, device=place)
        size = pipe.image_encoder.config.image_size
        return tokens, student.encode(torch.zeros(count, 3, size, size, device=place))[0] if is_shown else None

    def one(told: Told, generator: torch.Generator) -> torch.Tensor:
        shape = (len(told[0]), *pool.latents.shape[2:])
        noise = torch.randn(shape, generator=generator).to(place)
        untold = unguided(len(noise), told[1] is not None)
        return few_loss(student, teacher, walk, noise, told, untold, guidance)

    with drawn_ahead(draw, fresh * state.update, workers) as groups:
        for _ in range(50):
            pool.add(list(islice(groups, fresh)))
        last, total = time.process_time(), torch.zeros(2, device=place)
        while (progress := state.seconds / seconds) < 1:
            rng = np.random.default_rng([27, state.update])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pool.add(list(islice(groups, fresh)))
            _, tokens, references, _ = pool.draw(batch - base_rows, rng)
            _, own = captions.draw(base_rows, rng, world_data.TASK_SHARES, empty=0.0)
            student.trained.zero_grad()
            with torch.no_grad():
                hidden = student.encode(references)[0]
            parts = [one((own.to(place), None), generator), one((tokens, hidden), generator)]
            torch.stack(parts).mean().backward()
            torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
            state.step(learning_rate * min(1, (state.update + 1) / 50) * cosine(progress))
            total += torch.stack(parts).detach()
            state.seconds, last = state.seconds + time.process_time() - last, time.process_time()
            if state.update % 25 == 0:
                mean, total = (total / 25).tolist(), torch.zeros_like(total)
                figures = {"loss_text": mean[0], "loss_picture": mean[1]}
                log_row(output, "few", update=state.update, seconds=state.seconds, **figures)
            if state.update % 250 == 0:
                state.save(output / "few.pt")
    state.save(output / "few.pt")


def save(
    output: Output,
    pipeline: Annotated[Path, typer.Option(help="the picture-reading base")],
    destination: Annotated[Path, typer.Option(help="folder to write; must not exist")],
) -> None:
    """Writes the pipeline with the averaged student's denoiser and, of a many-step base, its own as a variant; fp16."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    state = torch.load(output / "few.pt", weights_only=True, map_location="cpu")
    model = ImagePath(pipe, begin_from=pipeline, denoiser=True)
    shutil.copytree(pipeline, destination, ignore=shutil.ignore_patterns(f"*.{MANY_STEPS}.*"))
    model.unet.half()  # as it came
    pipe.unload_ip_adapter()
    if not list((pipeline / "unet").glob(f"*.{MANY_STEPS}.*")):
        pipe.unet.save_pretrained(destination / "unet", variant=MANY_STEPS)
    own = {k.removeprefix("denoiser."): v for k, v in state["average"].items() if k.startswith("denoiser.")}
    own = {key: value for key, value in own.items() if key in pipe.unet.state_dict()}
    pipe.unet.load_state_dict(own)
    pipe.unet.half().save_pretrained(destination / "unet")
    typer.echo(f"{destination}: update {state['update']}")


app = typer.Typer(help=__doc__, no_args_is_help=True)
for command in (train, save):
    app.command()(command)

if __name__ == "__main__":
    app()
