"""The embedded world's base: text encoder and denoiser, trained on all tasks."""

import json
import os
import shutil
import time
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from world_data import (
    Pool,
    sample_scores,
    save_sheet,
    validation_rows,
)
from world_models import ROOT, Base, build_scheduler, build_text_encoder, build_unet, open_tokenizer, world
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

from diffopd.metrics import diversity


def average_gradients(parameters: list[torch.Tensor], num_processes: int) -> None:
    """One all-reduce of all gradients."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if num_processes == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    flat /= num_processes
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))


class BaseState:
    """Weights, their average, optimizers and update count of the base training, with load and save.

    Muon moves the matrices at twice AdamW's rate; AdamW moves embeddings, biases and norms.
    """

    def __init__(self, model: Base) -> None:
        self.model, self.average, self.update = model, deepcopy(model).requires_grad_(False), 0
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim > 1 and not name.endswith("_embedding.weight")]
        others = [p for name, p in named if p.ndim == 1 or name.endswith("_embedding.weight")]
        self.muon = Muon(matrices, lr=0.0)
        self.adamw = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)

    def step(self, learning_rate: float) -> None:
        set_rate(self.muon, 2 * learning_rate)
        set_rate(self.adamw, learning_rate)
        self.muon.step()
        self.adamw.step()

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.update = state["update"]

    def save(self, path: Path) -> None:
        weights = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        optimizers = {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
        save_state(path, weights | optimizers | {"update": self.update})

    def save_average(self, path: Path) -> None:
        """Half-precision copy of the averaged weights alone."""
        weights = {key: value.half() for key, value in self.average.state_dict().items() if value.is_floating_point()}
        save_state(path, {"average": weights, "update": self.update})


def base(
    output: Output,
    pictures: Annotated[int, typer.Option(help="stop after this many training pictures")] = 1_000_000,
    resume: Annotated[bool, typer.Option(help="go on from <output>/base.pt")] = False,
    begin_from: Annotated[Path | None, typer.Option(help="begin from the weights of this pipeline folder")] = None,
    batch: Annotated[int, typer.Option(help="pictures an update, over all processes")] = 64,
    learning_rate: float = 1e-3,
    decay_from: Annotated[int, typer.Option(help="cosine decay from this picture to the last; 0: none")] = 0,
    wrong: Annotated[float, typer.Option(help="share of captions with one element wrong")] = 0.2,
    confused: Annotated[
        str, typer.Option(help="share of relations, letters and manners told as their neighbour")
    ] = "0,0,0",
    shares: Annotated[str, typer.Option(help="of composition, text and style in a batch")] = "0.4,0.35,0.25",
    snapshot_every: Annotated[int, typer.Option(help="pictures between kept copies of the average")] = 50_000,
    device: Device = "cpu",
    workers: Workers = 0,
) -> None:
    """Trains text encoder and denoiser on all three tasks, a part of the captions being wrong."""
    place = prepare(device)
    task_shares, task_confused = (
        dict(zip(world.TASKS, map(float, given.split(",")), strict=True)) for given in (shares, confused)
    )
    rank, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1:
        torch.distributed.init_process_group("gloo")
    if rank == 0:
        open_tokenizer(output / "tokenizer")  # built by one process where there is none
    if num_processes > 1:
        torch.distributed.barrier()
    tokenizer = open_tokenizer(output / "tokenizer")
    model = open_weights(begin_from) if begin_from else Base(build_text_encoder(tokenizer), build_unet())
    state = BaseState(model.to(place))
    if resume:
        state.load(output / "base.pt")
    pool, scheduler, parameters = Pool(output, tokenizer), build_scheduler(), list(state.model.parameters())
    began, first, total = time.time(), state.update, 0.0

    def draw(update: int) -> tuple[int, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([3, update, rank])
        seed = int(rng.integers(2**62))
        drawn = pool.draw(batch // num_processes, rng, task_shares, wrong=wrong, confused=task_confused)
        return seed, *(tensor.numpy() for tensor in drawn)

    with drawn_ahead(draw, state.update, workers) as batches:
        while (seen := state.update * batch) < pictures:
            seed, *drawn = next(batches)
            latents, tokens = (torch.from_numpy(array).to(place) for array in drawn)
            decay = cosine((seen - decay_from) / (pictures - decay_from)) if 0 < decay_from < seen else 1.0
            rate = learning_rate * min(1, (state.update + 1) / 100) * decay
            generator = torch.Generator().manual_seed(seed)
            loss = velocity_loss(state.model, scheduler, latents, tokens, generator)
            state.model.zero_grad()
            loss.backward()
            average_gradients(parameters, num_processes)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            state.step(rate)
            state.update += 1
            slowness = min(0.999, (state.update + 1) / (state.update + 10))
            update_average(list(state.average.parameters()), parameters, slowness)
            total += loss.detach()
            if state.update % 100 == 0:
                pool.scan()
                if rank == 0:
                    row = {"update": state.update, "pictures": state.update * batch, "loss": float(total) / 100}
                    speed = (state.update - first) * batch / (time.time() - began)
                    log_row(output, "base", **row, pictures_per_second=speed)
                total = 0.0
            if rank == 0:
                _keep(state, output, batch, snapshot_every)
    if rank == 0:
        state.save(output / "base.pt")
    if num_processes > 1:
        torch.distributed.destroy_process_group()


def open_weights(pipeline: Path) -> Base:
    """Text encoder and denoiser of a saved pipeline, in float32 and training mode."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    return Base(pipe.text_encoder, pipe.unet).train()


def _keep(state: BaseState, output: Path, batch: int, snapshot_every: int) -> None:
    """Saves the state every 200 updates and a copy of the average at each multiple of snapshot_every."""
    if state.update % 200 == 0:
        state.save(output / "base.pt")
    thousands = state.update * batch // snapshot_every * snapshot_every // 1000
    if state.update * batch % snapshot_every < batch:
        state.save_average(output / f"snapshot-{thousands}k.pt")


def assemble(output: Path, snapshot: str, weights: str = "average") -> Any:
    """The stock pipeline of one training state, `base` or `snapshot-250k`; weights "model" are `base`'s latest."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    tokenizer = open_tokenizer(output / "tokenizer")
    model = Base(build_text_encoder(tokenizer), build_unet())
    state = torch.load(output / f"{snapshot}.pt", weights_only=True, map_location="cpu")[weights]
    model.load_state_dict(
        {key: value.float() for key, value in state.items() if value.is_floating_point()}, strict=False
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(output / "vae"),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(
    output: Output,
    snapshot: Annotated[str, typer.Option(help="base, or a kept copy such as snapshot-250k")] = "base",
    latest: Annotated[bool, typer.Option(help="base's latest weights, not their average (after a decay)")] = False,
    pipeline: Annotated[Path, typer.Option(help="folder to write")] = ROOT / "pipelines" / "emoji",
) -> None:
    """Writes the shipped pipeline folder (denoiser and autoencoder fp16, text encoder fp32), replaced in one move."""
    pipe = assemble(output, snapshot, "model" if latest else "average")
    pipe.unet.half()  # transformers opens a half text encoder as half even where the rest is opened as float
    pipe.vae.half()
    fresh, stale = pipeline.with_name(pipeline.name + ".new"), pipeline.with_name(pipeline.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(output / "tokenizer" / name, fresh / "tokenizer" / name)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in fresh.glob("*/config.json"):  # where a part was loaded from is nobody's business
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (pipeline / "README.md").exists():
        shutil.copy(pipeline / "README.md", fresh / "README.md")
    if pipeline.exists():
        pipeline.rename(stale)
    fresh.rename(pipeline)
    shutil.rmtree(stale, ignore_errors=True)
    size = sum(file.stat().st_size for file in pipeline.rglob("*") if file.is_file()) / 1e6
    typer.echo(f"{pipeline}: {size:.1f} MB")


def curve(
    output: Output,
    snapshots: Annotated[list[str], typer.Argument(help="for instance snapshot-100k")],
    prompts: int = 128,
    guidance: Annotated[list[float] | None, typer.Option(help="default: 1, 2 and 4")] = None,
    steps: int = 20,
    device: Device = "cpu",
) -> None:
    """Scores of kept copies on validation prompts, appended to <output>/curve.jsonl, and a sheet of samples."""
    torch.set_num_threads(1)
    for snapshot in snapshots:
        pipe, sheet = assemble(output, snapshot).to(device), []
        for scale in guidance or [1.0, 2.0, 4.0]:
            for task in world.TASKS:
                scores, pictures = sample_scores(pipe, task, validation_rows(task, prompts), steps, scale)
                settings = {"guidance_scale": scale, "num_inference_steps": steps, "num_prompts": prompts}
                figures = {"score": float(scores.mean()), "diversity": diversity(pictures)}
                log_row(output, "curve", snapshot=snapshot, task=task, **settings, **figures)
                sheet.append(np.concatenate([np.asarray(picture) for picture in pictures[:16]], 1))
        save_sheet(np.concatenate(sheet), output / f"samples-{snapshot}.png", zoom=2)
