"""Trains the embedded world's image path: a stock IP-Adapter with its own small CLIP image encoder, on the frozen base.

    python scripts/world_image.py train --output DIR --drawings FOLDER --seconds 2700 [--resume]
    python scripts/world_image.py train ... --batch 256 --fresh 8 --capacity 20000 --workers 5 --device cuda
    python scripts/world_image.py save  --output DIR
    python scripts/world_image.py sheet --output DIR

FOLDER holds the unpacked npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0 as for
`world_sprites.py`; their drawings beyond the twelve things appear as objects without a word. DIR keeps weights,
averages, optimizers and the log; to go on, the same command with --resume and more seconds (of processor time, so that
a busy machine changes no schedule). `save` writes pipelines/emoji-ip-adapter, `sheet` draws pictures with it.
"""

from __future__ import annotations

import shutil
import time
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
import world_data
from world_image_models import ImagePath, normalized, open_frozen, save_image_path
from world_image_sheet import IMAGE_PATH, sheet
from world_looks import Group, draw_group, find_objects
from world_models import ROOT, build_scheduler, world
from world_optimizer import Muon
from world_training import (
    Device,
    Output,
    Workers,
    cosine,
    drawn_ahead,
    log_row,
    prepare,
    save_state,
    set_rate,
    update_average,
    velocity_loss,
)

SCENES = 6  # of one look
DROPPED = {"both": 0.04, "picture": 0.06, "text": 0.16}  # shares of a batch, for guidance


class Pool:
    """The latest groups of scenes with their latents, on the denoiser's device; each is encoded once."""

    def __init__(self, pipe: Any, capacity: int) -> None:
        self.pipe, self.device, self.count = pipe, pipe.vae.device, 0
        size, side = world.SIZE, world.SIZE // pipe.vae_scale_factor
        channels = pipe.vae.config.latent_channels
        self.pictures = torch.zeros((capacity, SCENES, size, size, 3), dtype=torch.uint8, device=self.device)
        self.latents = torch.zeros((capacity, SCENES, channels, side, side), device=self.device)
        self.captions: list[list[list[str]]] = [[]] * capacity
        self.tokens: dict[str, list[int]] = {}

    @torch.no_grad()
    def add(self, groups: list[Group]) -> None:
        """Takes groups in, for the oldest where the pool is full."""
        pictures = torch.from_numpy(np.stack([group.pictures for group in groups])).to(self.device)
        pixels = pictures.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.pipe.vae.encode(pixels).latent_dist.mean * self.pipe.vae.config.scaling_factor
        places = [(self.count + n) % len(self.captions) for n in range(len(groups))]
        self.pictures[places], self.latents[places] = pictures, latents.unflatten(0, (len(groups), SCENES))
        for place, group in zip(places, groups, strict=True):
            self.captions[place] = group.captions
        self.count += len(groups)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Latents, tokens, references and the pictures themselves, the last two normalised (count, 3, 48, 48).

        A reference is the picture itself or, half of the time, another of its look. A left-out one is zeros, as in
        the stock pipeline's unguided half.
        """
        group = rng.integers(min(self.count, len(self.captions)), size=count)
        target = rng.integers(SCENES, size=count)
        other = (target + rng.integers(1, SCENES, count)) % SCENES
        seen = np.where(rng.random(count) < 0.5, target, other)
        left_out = rng.choice(len(DROPPED) + 1, count, p=[*DROPPED.values(), 1 - sum(DROPPED.values())])
        left_out = np.array([*DROPPED, ""])[left_out]
        tokens = []
        for index in range(count):
            said = self.captions[group[index]][target[index]]
            caption = said[0] if rng.random() < 0.4 else said[int(rng.integers(len(said)))]
            tokens.append(self.tokenize("" if left_out[index] in ("both", "text") else caption))
        is_seen = torch.from_numpy(~np.isin(left_out, ("both", "picture"))).to(self.device)
        references = normalized(self.pictures[group, seen]) * is_seen[:, None, None, None]
        targets = normalized(self.pictures[group, target])
        return self.latents[group, target], torch.tensor(tokens, device=self.device), references, targets

    def tokenize(self, caption: str) -> list[int]:
        if caption not in self.tokens:
            self.tokens[caption] = self.pipe.tokenizer(caption, padding="max_length", truncation=True).input_ids
        return self.tokens[caption]


def likeness_loss(features: torch.Tensor, others: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE (arXiv:1807.03748): a reference's pooled feature picks its own target among the batch's.

    It trains the encoder's last layer, which an adapter of hidden states does not use but its `image_embeds` do.
    """
    logits = F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class State:
    """Weights, their average, optimizers, update count and processor seconds, with load and save."""

    def __init__(self, model: ImagePath) -> None:
        self.model, self.average = model, deepcopy(model.trained).requires_grad_(False)
        self.update, self.seconds = 0, 0.0
        self.parameters = list(model.trained.parameters())
        named = list(model.trained.named_parameters())
        matrices = [p for name, p in named if p.ndim > 1 and "position" not in name]
        others = [p for name, p in named if p.ndim == 1 or "position" in name]
        self.muon = Muon(matrices, lr=0.0)
        self.adamw = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)

    def step(self, learning_rate: float) -> None:
        """One update of both optimizers and of the average."""
        set_rate(self.muon, 2 * learning_rate)
        set_rate(self.adamw, learning_rate)
        self.muon.step()
        self.adamw.step()
        self.update += 1
        update_average(list(self.average.parameters()), self.parameters, min(0.995, self.update / (self.update + 10)))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.trained.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.update, self.seconds = state["update"], state["seconds"]

    def save(self, path: Path) -> None:
        weights = {"model": self.model.trained.state_dict(), "average": self.average.state_dict()}
        optimizers = {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
        save_state(path, weights | optimizers | {"update": self.update, "seconds": self.seconds})


Rows = tuple[torch.Tensor, ...]


def losses(
    model: ImagePath, scheduler: Any, rows: Rows, base_rows: Rows | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's own loss with the reference in view, and the likeness of reference and target.

    base_rows: latents and tokens of the base's own pictures, on which it is trained as it is without an adapter.
    """
    latents, tokens, references, targets = rows
    hidden, features = model.encode(references)

    def told(noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return model(noisy, timesteps, tokens, hidden)

    is_seen = references.flatten(1).any(1)
    alike = likeness_loss(features[is_seen], model.encode(targets[is_seen])[1])
    loss = velocity_loss(told, scheduler, latents, tokens, generator)
    if base_rows is not None:
        untold = velocity_loss(partial(model, hidden=None), scheduler, *base_rows, generator)
        loss = torch.lerp(loss, untold, len(base_rows[0]) / (len(base_rows[0]) + len(latents)))
    return loss, alike


def train(
    output: Output,
    drawings: Annotated[Path, typer.Option(help="folder of the unpacked packages")],
    seconds: Annotated[
        float, typer.Option(help="processor time of the whole training, resumed parts included")
    ] = 2700.0,
    resume: Annotated[bool, typer.Option(help="go on from <output>/image.pt")] = False,
    batch: int = 32,
    learning_rate: float = 1e-3,
    begin_from: Annotated[Path | None, typer.Option(help="begin from this saved image path")] = None,
    base_rows: Annotated[
        int,
        typer.Option(help="rows of a batch from <output>/latents-N.npz, without the adapter; the base is trained too"),
    ] = 0,
    capacity: Annotated[int, typer.Option(help="groups of scenes kept")] = 3000,
    fresh: Annotated[int, typer.Option(help="groups drawn an update; before the first, 150 times as many")] = 1,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    device: Device = "cpu",
    workers: Workers = 0,
) -> None:
    """Trains encoder and adapter on the frozen base, or, with base rows, its denoiser as well."""
    place = prepare(device)
    output.mkdir(parents=True, exist_ok=True)
    pipe = open_frozen(pipeline)
    model = ImagePath(pipe, begin_from=begin_from, denoiser=base_rows > 0)
    pipe.to(place)
    state = State(model)
    if resume:
        state.load(output / "image.pt")
    pool, scheduler, objects = Pool(pipe, capacity), build_scheduler(), find_objects(drawings)
    world_pool = world_data.Pool(output, pipe.tokenizer) if base_rows else None

    def draw(number: int) -> Group:
        return draw_group(SCENES, np.random.default_rng([21, number]), objects)

    with drawn_ahead(draw, fresh * state.update, workers) as groups:
        for _ in range(150):
            pool.add(list(islice(groups, fresh)))
        last, totals = time.process_time(), torch.zeros(2, device=place)
        while (progress := state.seconds / seconds) < 1:
            rng = np.random.default_rng([22, state.update])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pool.add(list(islice(groups, fresh)))
            rows = pool.draw(batch - base_rows, rng)
            own = None
            if world_pool is not None:
                own = tuple(part.to(place) for part in world_pool.draw(base_rows, rng, world_data.TASK_SHARES))
            loss, alike = losses(state.model, scheduler, rows, own, generator)
            state.model.trained.zero_grad()
            (loss + 0.02 * alike).backward()
            torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
            state.step(learning_rate * min(1, (state.update + 1) / 100) * cosine(progress))
            totals += torch.stack([loss.detach(), alike.detach()])
            state.seconds, last = state.seconds + time.process_time() - last, time.process_time()
            if state.update % 50 == 0:
                mean, totals = totals.cpu() / 50, torch.zeros_like(totals)
                figures = {"loss": float(mean[0]), "likeness": float(mean[1])}
                seen = state.update * batch
                log_row(output, "image", update=state.update, pictures=seen, seconds=state.seconds, **figures)
            if state.update % 500 == 0:
                state.save(output / "image.pt")
    state.save(output / "image.pt")


def save(
    output: Output,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    destination: Annotated[Path, typer.Option(help="folder to write")] = IMAGE_PATH,
) -> None:
    """Writes the averaged encoder and adapter in fp16, and where the denoiser was trained as well the pipeline."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    state = torch.load(output / "image.pt", weights_only=True, map_location="cpu")
    has_denoiser = any(key.startswith("denoiser.") for key in state["average"])
    model = ImagePath(pipe, denoiser=has_denoiser)
    model.trained.load_state_dict(state["average"])
    if has_denoiser:
        shutil.copytree(pipeline, destination, ignore=shutil.ignore_patterns("unet", "README.md"))
    save_image_path(model, destination)
    if has_denoiser:
        pipe.unload_ip_adapter()
        pipe.unet.half().save_pretrained(destination / "unet")
    size = sum(file.stat().st_size for file in destination.rglob("*.safetensors")) / 1e6
    typer.echo(f"{destination}: {size:.2f} MB, update {state['update']}")


app = typer.Typer(help=__doc__, no_args_is_help=True)
for command in (train, save, sheet):
    app.command()(command)

if __name__ == "__main__":
    app()
