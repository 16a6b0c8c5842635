"""Trains the embedded world's models: the autoencoder, the base, and one teacher per task.

    python scripts/world_train.py vae     --output DIR --seconds 1300
    python scripts/world_train.py encode  --output DIR --shard 0
    python scripts/world_train.py base    --output DIR --pictures 4000000 [--resume | --begin-from PIPELINE]
    python scripts/world_train.py save    --output DIR
    python scripts/world_train.py teacher TASK --output DIR --seconds 600

DIR keeps the raw training state (weights, averages, optimizer) and the logs; `save` writes the folder
that ships, pipelines/emoji, from it. To go on with the base, run the same command with --resume, or,
where DIR is lost, begin with --begin-from pipelines/emoji in a DIR that has its vae and tokenizer. Every
process uses one thread; `torchrun --standalone --nproc_per_node 2 scripts/world_train.py base ...`
trains with two, which average gradients.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from world_data import (
    TASK_SHARES,
    Pool,
    crop_drawings,
    draw_pictures,
    held_out_rows,
    sample_scores,
    save_sheet,
    world_prompts,
)
from world_models import (
    ROOT,
    Base,
    add_lora,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    open_tokenizer,
    world,
)
from world_optimizer import Muon

app = typer.Typer(help=__doc__, no_args_is_help=True)
Output = Annotated[Path, typer.Option(help="folder of the training state and logs")]


def log_row(output: Path, name: str, **row: Any) -> None:
    """Appends one JSON line to <output>/<name>.jsonl and prints it."""
    line = json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    with (output / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


@torch.no_grad()
def update_average(average: list[torch.Tensor], parameters: list[torch.Tensor], decay: float) -> None:
    """Exponential moving average of the weights."""
    torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state without ever leaving a half-written file."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(progress: float) -> float:
    """From 1 to 0.02 while progress goes from 0 to 1."""
    return 0.02 + 0.98 * math.cos(math.pi / 2 * min(progress, 1.0)) ** 2


# The autoencoder.


def vae_loss(vae: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their differences to the neighbours, and a little KL."""
    posterior = vae.encode(pictures).latent_dist
    error = vae.decode(posterior.sample()).sample - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def measure_vae(vae: torch.nn.Module, output: Path, count: int = 96) -> dict[str, float]:
    """PSNR and scores of held-out pictures after a round trip, moments of the latents; writes a sheet."""
    rng = np.random.default_rng(1)
    result: dict[str, float] = {}
    sheet, errors, latents = [], [], []
    for task in world.TASKS:
        scenes = [world.sample_scene(task, rng, held_out=True) for _ in range(count // 3)]
        pixels = np.stack([world.render(scene) for scene in scenes])
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        latent = vae.encode(pictures).latent_dist.mean
        decoded = vae.decode(latent).sample.clamp(-1, 1)
        latents.append(latent)
        errors.append(((decoded - pictures) / 2).square().mean((1, 2, 3)))
        again = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = [world.describe(task, scene) for scene in scenes]
        images = [Image.fromarray(picture) for picture in again]
        result[task] = float(world.SCORERS[task](images, [""] * len(rows), rows).mean())
        sheet += [np.concatenate(list(pixels[:12]), 1), np.concatenate(list(again[:12]), 1)]
    save_sheet(np.concatenate(sheet), output / "reconstructions.png")
    every = torch.cat(latents)
    result["psnr"] = float((-10 * torch.cat(errors).log10()).mean())
    return result | {"mean": float(every.mean()), "std": float(every.std())}


@app.command()
def vae(
    output: Output,
    seconds: Annotated[float, typer.Option(help="length of the schedule")] = 1300.0,
    stop: Annotated[float, typer.Option(help="stop after this part of the schedule")] = 1.0,
    learning_rate: float = 2e-3,
    crop_share: Annotated[float, typer.Option(help="first part of the schedule spent on crops")] = 0.4,
) -> None:
    """Trains the autoencoder: first on lively crops, then on whole pictures (group statistics differ)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    model = build_vae()
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    start, update, total = time.time(), 0, 0.0
    while (progress := (time.time() - start) / seconds) < stop:
        set_rate(optimizer, learning_rate * min(1, (update + 1) / 100) * cosine(progress))
        is_crop = progress < crop_share
        loss = vae_loss(model, crop_drawings(draw_pictures(16, rng), 24, rng) if is_crop else draw_pictures(6, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update += 1
        update_average(list(average.parameters()), list(model.parameters()), min(0.998, update / (update + 10)))
        total += float(loss.detach())
        if update % 250 == 0:
            figures = measure_vae(average, output)
            log_row(output, "vae", update=update, seconds=progress * seconds, loss=total / 250, **figures)
            save_state(output / "vae.pt", {"model": average.state_dict(), "figures": figures})
            total = 0.0
    finish_vae(average, output)


@torch.no_grad()
def finish_vae(model: torch.nn.Module, output: Path) -> None:
    """Normalises every latent channel (folded into the 1 x 1 convolutions) and saves a folder."""
    pictures = draw_pictures(384, np.random.default_rng(2))
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(48)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward = model.quant_conv, model.post_quant_conv
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= std[None, :, None, None]
    inward.weight[:4] /= std[:, None, None, None]
    inward.bias[:4] = (inward.bias[:4] - mean) / std
    inward.bias[4:] -= 2 * std.log()
    figures = measure_vae(model, output, 384)
    log_row(output, "vae", final=True, channel_std=[round(float(x), 3) for x in std], **figures)
    model.register_to_config(scaling_factor=1.0)
    model.save_pretrained(output / "vae")


@app.command()
def encode(
    output: Output,
    shard: Annotated[int, typer.Option(help="number of the shard, one digit; also its seed")] = 0,
    pictures: Annotated[int, typer.Option(help="pictures in it")] = 9_000,
) -> None:
    """Writes latents of rendered scenes, latents-<shard>.npz; a running base training picks new shards up."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(output / "vae").requires_grad_(False)
    rng = np.random.default_rng([7, shard])
    tasks = rng.choice(world.TASKS, pictures, p=[TASK_SHARES[task] for task in world.TASKS])
    scenes, latents = [world.sample_scene(task, rng) for task in tasks], []
    for first in range(0, pictures, 50):
        pixels = np.stack([world.render(scene) for scene in scenes[first : first + 50]])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append((model.encode(batch).latent_dist.mean * model.config.scaling_factor).half().numpy())
    path = output / f"latents-{shard}.tmp.npz"
    np.savez(path, latents=np.concatenate(latents), scenes=np.array(json.dumps(scenes)))
    path.rename(output / f"latents-{shard}.npz")
    typer.echo(f"latents-{shard}.npz: {pictures} pictures")


# The base.


def velocity_loss(
    model: Callable[..., torch.Tensor],
    scheduler: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v = alpha eps - sigma x0 (arXiv:2202.00512); noisy timesteps are drawn more often."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = (1000 * torch.rand(len(latents), generator=generator) ** 0.7).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, tokens), scheduler.get_velocity(latents, noise, timesteps))


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
        state = torch.load(path, weights_only=True)
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


@app.command()
def base(
    output: Output,
    pictures: Annotated[int, typer.Option(help="stop after this many training pictures")] = 1_000_000,
    resume: Annotated[bool, typer.Option(help="go on from <output>/base.pt")] = False,
    begin_from: Annotated[Path | None, typer.Option(help="begin from the weights of this pipeline folder")] = None,
    batch: Annotated[int, typer.Option(help="pictures an update, over all processes")] = 64,
    learning_rate: float = 1e-3,
    decay_from: Annotated[int, typer.Option(help="cosine decay from this picture to the last; 0: none")] = 0,
    wrong: Annotated[float, typer.Option(help="share of captions with one element wrong")] = 0.2,
    shares: Annotated[str, typer.Option(help="of composition, text and style in a batch")] = "0.4,0.35,0.25",
    snapshot_every: Annotated[int, typer.Option(help="pictures between kept copies of the average")] = 50_000,
) -> None:
    """Trains text encoder and denoiser on all three tasks, a part of the captions being wrong."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task_shares = dict(zip(world.TASKS, map(float, shares.split(",")), strict=True))
    rank, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1:
        torch.distributed.init_process_group("gloo")
    if rank == 0:
        open_tokenizer(output / "tokenizer")  # built by one process where there is none
    if num_processes > 1:
        torch.distributed.barrier()
    tokenizer = open_tokenizer(output / "tokenizer")
    state = BaseState(open_weights(begin_from) if begin_from else Base(build_text_encoder(tokenizer), build_unet()))
    if resume:
        state.load(output / "base.pt")
    pool, scheduler, parameters = Pool(output, tokenizer), build_scheduler(), list(state.model.parameters())
    began, first, total = time.time(), state.update, 0.0
    while (seen := state.update * batch) < pictures:
        rng = np.random.default_rng([3, state.update, rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        decay = cosine((seen - decay_from) / (pictures - decay_from)) if 0 < decay_from < seen else 1.0
        rate = learning_rate * min(1, (state.update + 1) / 100) * decay
        latents, tokens = pool.draw(batch // num_processes, rng, task_shares, wrong)
        loss = velocity_loss(state.model, scheduler, latents, tokens, generator)
        state.model.zero_grad()
        loss.backward()
        average_gradients(parameters, num_processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        state.step(rate)
        state.update += 1
        slowness = min(0.999, (state.update + 1) / (state.update + 10))
        update_average(list(state.average.parameters()), parameters, slowness)
        total += float(loss.detach())
        if state.update % 100 == 0:
            pool.scan()
            if rank == 0:
                row = {"update": state.update, "pictures": state.update * batch, "loss": total / 100}
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
    """Saves the state every 500 updates and a copy of the average at each multiple of snapshot_every."""
    if state.update % 200 == 0:
        state.save(output / "base.pt")
    thousands = state.update * batch // snapshot_every * snapshot_every // 1000
    if state.update * batch % snapshot_every < batch:
        state.save_average(output / f"snapshot-{thousands}k.pt")


def assemble(output: Path, snapshot: str) -> Any:
    """The stock pipeline of one training state: `base` (its average) or `snapshot-250k`."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    tokenizer = open_tokenizer(output / "tokenizer")
    model = Base(build_text_encoder(tokenizer), build_unet())
    weights = torch.load(output / f"{snapshot}.pt", weights_only=True)["average"]
    model.load_state_dict(
        {key: value.float() for key, value in weights.items() if value.is_floating_point()}, strict=False
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


@app.command()
def save(
    output: Output,
    snapshot: Annotated[str, typer.Option(help="base, or a kept copy such as snapshot-250k")] = "base",
    pipeline: Annotated[Path, typer.Option(help="folder to write")] = ROOT / "pipelines" / "emoji",
) -> None:
    """Writes the shipped pipeline folder (denoiser and autoencoder fp16, text encoder fp32), replaced in one move."""
    pipe = assemble(output, snapshot)
    pipe.unet.half()  # transformers opens a half text encoder as half even where the rest is opened as float
    pipe.vae.half()
    fresh, stale = pipeline.with_name(pipeline.name + ".new"), pipeline.with_name(pipeline.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(output / "tokenizer" / name, fresh / "tokenizer" / name)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if (pipeline / "README.md").exists():
        shutil.copy(pipeline / "README.md", fresh / "README.md")
    if pipeline.exists():
        pipeline.rename(stale)
    fresh.rename(pipeline)
    shutil.rmtree(stale, ignore_errors=True)
    size = sum(file.stat().st_size for file in pipeline.rglob("*") if file.is_file()) / 1e6
    typer.echo(f"{pipeline}: {size:.1f} MB")


@app.command()
def curve(
    output: Output,
    snapshots: Annotated[list[str], typer.Argument(help="for instance snapshot-100k")],
    prompts: int = 128,
    guidance: Annotated[list[float] | None, typer.Option(help="default: 1, 2 and 4")] = None,
    steps: int = 20,
) -> None:
    """Scores of kept copies on held-out prompts, appended to <output>/curve.jsonl, and a sheet of samples."""
    torch.set_num_threads(1)
    for snapshot in snapshots:
        pipe, sheet = assemble(output, snapshot), []
        for scale in guidance or [1.0, 2.0, 4.0]:
            for task in world.TASKS:
                scores, pictures = sample_scores(pipe, task, held_out_rows(task, prompts), steps, scale)
                settings = {"guidance_scale": scale, "num_inference_steps": steps, "num_prompts": prompts}
                figures = {"score": float(scores.mean()), "diversity": world.diversity(pictures)}
                log_row(output, "curve", snapshot=snapshot, task=task, **settings, **figures)
                sheet.append(np.concatenate([np.asarray(picture) for picture in pictures[:16]], 1))
        save_sheet(np.concatenate(sheet), output / f"samples-{snapshot}.png", zoom=2)


# Teachers and their prompts.


@app.command()
def prompts(teachers: Annotated[Path, typer.Option(help="the shelf")] = ROOT / "teachers") -> None:
    """Writes teachers/<task>/prompts: train.jsonl, test.jsonl (held out) and, for style, unseen.jsonl."""
    for task in world.TASKS:
        folder = teachers / task / "prompts"
        folder.mkdir(parents=True, exist_ok=True)
        files = {"train": world_prompts(task, held_out=False), "test": world_prompts(task, held_out=True)}
        if task == "style":
            files["test"] *= -(-1000 // len(files["test"]))  # few wordings: each comes again with other noise
            pairs = [{"thing": thing, "manner": manner} for thing, manner in world.UNSEEN_PAIRS]
            files["unseen"] = [{"prompt": text, **pair} for pair in pairs for text in world.captions(task, pair)]
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            num_prompts = len({row["prompt"] for row in rows})
            typer.echo(f"{folder / name}.jsonl: {len(rows)} rows, {num_prompts} different prompts")


@app.command()
def teacher(
    task: Annotated[str, typer.Argument(help="composition, text or style")],
    output: Output,
    seconds: Annotated[float, typer.Option(help="training time")] = 600.0,
    form: Annotated[str, typer.Option(help="lora or full")] = "lora",
    rank: int = 32,
    learning_rate: float = 2e-3,
    batch: int = 32,
    save_every: Annotated[int, typer.Option(help="updates between saves of the average so far")] = 500,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    destination: Annotated[Path | None, typer.Option(help="default: teachers/<task>")] = None,
) -> None:
    """Specialises the base to one task on clean captions of it and writes the teacher's weights."""
    from diffusers import StableDiffusionPipeline

    if task not in world.TASKS or form not in ("lora", "full"):
        raise typer.BadParameter(f"got task {task!r}, form {form!r}; allowed are {world.TASKS} and ('lora', 'full')")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.train().requires_grad_(form == "full")
    folder = destination or ROOT / "teachers" / task
    if form == "lora":
        add_lora(pipe.unet, rank)
    model = Base(pipe.text_encoder, pipe.unet)
    pool, scheduler = Pool(output, pipe.tokenizer), build_scheduler()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = with_fused_adapter(model) if form == "lora" else model
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start, update, total = time.time(), 0, 0.0
    while (progress := (time.time() - start) / seconds) < 1:
        rng = np.random.default_rng([13, world.TASKS.index(task), update])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        set_rate(optimizer, learning_rate * min(1, (update + 1) / 50) * cosine(progress))
        latents, tokens = pool.draw(batch, rng, {task: 1.0}, wrong=0.0)
        loss = velocity_loss(forward, scheduler, latents, tokens, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update += 1
        total += float(loss.detach())
        update_average(average, parameters, min(0.995, update / (update + 10)))
        if update % 100 == 0:
            row = {
                "update": update,
                "pictures": update * batch,
                "seconds": progress * seconds,
                "loss": total / 100,
            }
            log_row(output, f"teacher-{task}", form=form, **row)
            total = 0.0
        if update % save_every == 0:
            save_average(pipe, form, parameters, average, folder)
    save_average(pipe, form, parameters, average, folder)


def with_fused_adapter(model: Base) -> Callable[..., torch.Tensor]:
    """The model's forward with W + scale B A in place of W: the adapter's exact function at the cost of the plain net.

    A branch beside every convolution costs as much again as a small net itself.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from diffopd.adapters import AdapterSwitch

    AdapterSwitch(model.unet).select(None)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}

    def forward(*arguments: torch.Tensor) -> torch.Tensor:
        fused = {}
        for name, layer in layers.items():
            weight = layer.base_layer.weight
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = layer.scaling["default"] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
            fused[f"{name}.base_layer.weight"] = weight + delta
        return torch.func.functional_call(model, fused, arguments)

    return forward


@torch.no_grad()
def save_average(
    pipe: Any, form: str, parameters: list[torch.Tensor], average: list[torch.Tensor], folder: Path
) -> None:
    """Saves the teacher with its averaged weights and puts the current ones back."""
    current = [parameter.clone() for parameter in parameters]
    torch._foreach_copy_(parameters, average)
    save_teacher(pipe, form, folder)
    torch._foreach_copy_(parameters, current)


def save_teacher(pipe: Any, form: str, folder: Path) -> None:
    """Writes fp16 weights: pytorch_lora_weights.safetensors with its metadata, or the folder unet."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if form == "full":
        deepcopy(pipe.unet).half().save_pretrained(folder / "unet")
        return
    adapter = get_peft_model_state_dict(pipe.unet)
    settings = pipe.unet.peft_config["default"].to_dict()  # without it lora_alpha would be lost
    layers = {key: value.half().contiguous() for key, value in adapter.items()}
    pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.chmod(0o644)
    digest, card = hashlib.sha256(weights.read_bytes()).hexdigest(), folder / "teacher.toml"
    if card.exists():
        card.write_text(re.sub(r'(?m)^sha256 = ".*"', f'sha256 = "{digest}"', card.read_text()))
    typer.echo(f"{weights}: sha256 {digest}")


if __name__ == "__main__":
    app()
