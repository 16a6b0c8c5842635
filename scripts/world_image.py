"""Trains the embedded world's image path: a stock IP-Adapter with its own small CLIP image encoder, on the frozen base.

    python scripts/world_image.py train --output DIR --drawings FOLDER --seconds 2700 [--resume]
    python scripts/world_image.py save  --output DIR
    python scripts/world_image.py sheet --output DIR

FOLDER holds the unpacked npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0 as for
`world_sprites.py`; their drawings beyond the twelve things appear as objects without a word. DIR keeps weights,
averages, optimizers and the log; to go on, the same command with --resume and more seconds (of processor time, so that
a busy machine changes no schedule). `save` writes pipelines/emoji-ip-adapter, `sheet` draws pictures with it.
"""

from __future__ import annotations

import time
from collections import deque
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from world_image_models import ImagePath, normalized, save_image_path
from world_image_sheet import sheet
from world_looks import Group, draw_group, find_objects
from world_models import ROOT, build_scheduler
from world_optimizer import Muon
from world_training import Output, cosine, log_row, save_state, set_rate, update_average, velocity_loss

SCENES = 6  # of one look
DROPPED = {"both": 0.04, "picture": 0.06, "text": 0.16}  # shares of a batch, for guidance


class Pool:
    """The latest groups of scenes with their latents; every group is drawn and encoded once."""

    def __init__(self, pipe: Any, objects: list[Path], capacity: int) -> None:
        self.pipe, self.objects = pipe, objects
        self.groups: deque[tuple[Group, torch.Tensor]] = deque(maxlen=capacity)
        self.tokens: dict[str, list[int]] = {}

    @torch.no_grad()
    def add(self, number: int) -> None:
        """Draws group `number` and takes it in, for the oldest where the pool is full."""
        group = draw_group(SCENES, np.random.default_rng([21, number]), self.objects)
        pictures = torch.from_numpy(group.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.pipe.vae.encode(pictures).latent_dist.mean * self.pipe.vae.config.scaling_factor
        self.groups.append((group, latents))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Latents, tokens, references and the pictures themselves, the last two normalised (count, 3, 48, 48).

        A reference is the picture itself or, half of the time, another of its look. A left-out one is zeros, as in
        the stock pipeline's unguided half.
        """
        latents, tokens, references, targets = [], [], [], []
        for _ in range(count):
            group, encoded = self.groups[int(rng.integers(len(self.groups)))]
            target, other = (int(n) for n in rng.choice(SCENES, 2, replace=False))
            seen = target if rng.random() < 0.5 else other
            drop = rng.choice(["both", "picture", "text", ""], p=[*DROPPED.values(), 1 - sum(DROPPED.values())])
            said = group.captions[target]
            caption = said[0] if rng.random() < 0.4 else said[int(rng.integers(len(said)))]
            latents.append(encoded[target])
            tokens.append(self.tokenize("" if drop in ("both", "text") else caption))
            picture = normalized(group.pictures[seen])
            references.append(torch.zeros_like(picture) if drop in ("both", "picture") else picture)
            targets.append(normalized(group.pictures[target]))
        return torch.stack(latents), torch.tensor(tokens), torch.stack(references), torch.stack(targets)

    def tokenize(self, caption: str) -> list[int]:
        if caption not in self.tokens:
            self.tokens[caption] = self.pipe.tokenizer(caption, padding="max_length", truncation=True).input_ids
        return self.tokens[caption]


def likeness_loss(features: torch.Tensor, others: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE (arXiv:1807.03748): a reference's pooled feature picks its own target among the batch's.

    It trains the encoder's last layer, which an adapter of hidden states does not use but its `image_embeds` do.
    """
    logits = F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits)))


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
        state = torch.load(path, weights_only=True)
        self.model.trained.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.update, self.seconds = state["update"], state["seconds"]

    def save(self, path: Path) -> None:
        weights = {"model": self.model.trained.state_dict(), "average": self.average.state_dict()}
        optimizers = {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
        save_state(path, weights | optimizers | {"update": self.update, "seconds": self.seconds})


def losses(
    model: ImagePath, scheduler: Any, batch: tuple[torch.Tensor, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's own loss with the reference in view, and the likeness of reference and target."""
    latents, tokens, references, targets = batch
    hidden, features = model.encode(references)

    def told(noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return model(noisy, timesteps, tokens, hidden)

    is_seen = references.flatten(1).any(1)
    alike = likeness_loss(features[is_seen], model.encode(targets[is_seen])[1])
    return velocity_loss(told, scheduler, latents, tokens, generator), alike


def train(
    output: Output,
    drawings: Annotated[Path, typer.Option(help="folder of the unpacked packages")],
    seconds: Annotated[
        float, typer.Option(help="processor time of the whole training, resumed parts included")
    ] = 2700.0,
    resume: Annotated[bool, typer.Option(help="go on from <output>/image.pt")] = False,
    batch: int = 32,
    learning_rate: float = 1e-3,
    capacity: Annotated[int, typer.Option(help="groups of scenes kept")] = 3000,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
) -> None:
    """Trains encoder and adapter; the base stays as it is."""
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    state = State(ImagePath(pipe))
    if resume:
        state.load(output / "image.pt")
    pool, scheduler = Pool(pipe, find_objects(drawings), capacity), build_scheduler()
    for number in range(state.update, state.update + 150):
        pool.add(number)
    last, totals = time.process_time(), np.zeros(2)
    while (progress := state.seconds / seconds) < 1:
        rng = np.random.default_rng([22, state.update])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pool.add(state.update + 150)
        loss, alike = losses(state.model, scheduler, pool.draw(batch, rng), generator)
        state.model.trained.zero_grad()
        (loss + 0.02 * alike).backward()
        torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
        state.step(learning_rate * min(1, (state.update + 1) / 100) * cosine(progress))
        totals += float(loss.detach()), float(alike.detach())
        state.seconds, last = state.seconds + time.process_time() - last, time.process_time()
        if state.update % 50 == 0:
            mean, totals = totals / 50, np.zeros(2)
            figures = {"loss": float(mean[0]), "likeness": float(mean[1])}
            log_row(
                output, "image", update=state.update, pictures=state.update * batch, seconds=state.seconds, **figures
            )
        if state.update % 100 == 0:
            state.save(output / "image.pt")
    state.save(output / "image.pt")


def save(
    output: Output,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    destination: Annotated[Path, typer.Option(help="folder to write")] = ROOT / "pipelines" / "emoji-ip-adapter",
) -> None:
    """Writes the averaged encoder and adapter in fp16."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    model = ImagePath(pipe)
    state = torch.load(output / "image.pt", weights_only=True)
    model.trained.load_state_dict(state["average"])
    save_image_path(model, destination)
    size = sum(file.stat().st_size for file in destination.rglob("*.safetensors")) / 1e6
    typer.echo(f"{destination}: {size:.2f} MB, update {state['update']}")


app = typer.Typer(help=__doc__, no_args_is_help=True)
for command in (train, save, sheet):
    app.command()(command)

if __name__ == "__main__":
    app()
