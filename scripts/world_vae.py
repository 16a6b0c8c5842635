"""The embedded world's autoencoder, and the latents of rendered scenes that the denoiser trains on."""

import json
import time
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from world_data import (
    TASK_SHARES,
    crop_drawings,
    draw_pictures,
    save_sheet,
)
from world_looks import Group, draw_group, find_objects, plain_drawings, render
from world_models import (
    ROOT,
    build_vae,
    world,
)
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
)


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


def learn(
    loss: torch.Tensor, model: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer, update: int
) -> float:
    """Update number `update` (from 1) of the weights and of their average; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update_average(list(average.parameters()), list(model.parameters()), min(0.998, update / (update + 10)))
    return float(loss.detach())


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
        update += 1
        total += learn(loss, model, average, optimizer, update)
        if update % 250 == 0:
            figures = measure_vae(average, output)
            log_row(output, "vae", update=update, seconds=progress * seconds, loss=total / 250, **figures)
            save_state(output / "vae.pt", {"model": average.state_dict(), "figures": figures})
            total = 0.0
    finish_vae(average, output)


OF_A_GROUP = 3  # pictures


def widen(
    output: Output,
    drawings: Annotated[Path, typer.Option(help="folder of the unpacked packages, as for world_image.py")],
    seconds: Annotated[
        float, typer.Option(help="processor time of the whole training, resumed parts included")
    ] = 4000.0,
    resume: Annotated[bool, typer.Option(help="go on from <output>/wide.pt")] = False,
    learning_rate: float = 1e-3,
    groups: Annotated[int, typer.Option(help="of three pictures in one look, an update")] = 4,
    base_rows: Annotated[int, typer.Option(help="the world's own pictures an update")] = 4,
    begin_from: Annotated[Path, typer.Option(help="the autoencoder")] = ROOT / "pipelines" / "emoji" / "vae",
    device: Device = "cpu",
    workers: Workers = 0,
) -> None:
    """Trains an autoencoder on, with drawings in changed looks and other objects, so that it holds what is new."""
    from diffusers import AutoencoderKL

    place = prepare(device)
    output.mkdir(parents=True, exist_ok=True)
    model = AutoencoderKL.from_pretrained(begin_from, torch_dtype=torch.float32).to(place)
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    update, spent, total, objects = 0, 0.0, 0.0, find_objects(drawings)
    if resume:
        state = torch.load(output / "wide.pt", weights_only=True, map_location="cpu")
        update, spent = state["update"], state["seconds"]
        for part, key in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(state[key])

    def draw(number: int) -> Group:
        return draw_group(OF_A_GROUP, np.random.default_rng([24, number]), objects)

    def kept() -> None:
        parts = {"model": model, "average": average, "optimizer": optimizer}
        state = {key: part.state_dict() for key, part in parts.items()}
        save_state(output / "wide.pt", state | {"update": update, "seconds": spent})

    with drawn_ahead(draw, groups * update, workers) as drawn:
        last = time.process_time()
        while spent < seconds:
            set_rate(optimizer, learning_rate * min(1, (update + 1) / 50) * cosine(spent / seconds))
            changed = as_pictures(np.concatenate([group.pictures for group in islice(drawn, groups)]))
            pictures = torch.cat([changed, draw_pictures(base_rows, np.random.default_rng([25, update]))])
            loss = vae_loss(model, pictures.to(place))
            update += 1
            total += learn(loss, model, average, optimizer, update)
            spent, last = spent + time.process_time() - last, time.process_time()
            if update % 250 == 0:
                kept()
                figures = measure_unseen(average.cpu(), output)
                average.to(place)
                log_row(output, "wide", update=update, seconds=spent, loss=total / 250, **figures)
                total, last = 0.0, time.process_time()
    kept()
    average.cpu()
    log_row(output, "wide", final=True, update=update, **measure_unseen(average, output))
    finish_vae(average, output)


def as_pictures(pixels: np.ndarray) -> torch.Tensor:
    """(B, 48, 48, 3) uint8 -> (B, 3, 48, 48) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def measure_unseen(vae: torch.nn.Module, output: Path, count: int = 36) -> dict[str, float]:
    """PSNR of a round trip of Fluent 3D, which no training sees, and of a seen manner; writes a sheet."""
    result, sheet = {}, []
    for name, drawn in (("unseen", plain_drawings("atlas_3d.png")), ("seen", plain_drawings())):
        rng, things = np.random.default_rng(3), list(drawn)
        scenes = [world.sample_scene("style", rng) | {"thing": things[n % len(things)]} for n in range(count)]
        pixels = np.stack([render(scene, drawn) for scene in scenes])
        decoded = vae.decode(vae.encode(as_pictures(pixels)).latent_dist.mean).sample.clamp(-1, 1)
        errors = ((decoded - as_pictures(pixels)) / 2).square().mean((1, 2, 3))
        result[name] = float((-10 * errors.log10()).mean())
        again = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        sheet += [np.concatenate(list(pixels[:12]), 1), np.concatenate(list(again[:12]), 1)]
    save_sheet(np.concatenate(sheet), output / "unseen.png")
    return result


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


def encode(
    output: Output,
    shard: Annotated[int, typer.Option(help="number of the shard, one digit; also its seed")] = 0,
    pictures: Annotated[int, typer.Option(help="pictures in it")] = 9_000,
    device: Device = "cpu",
) -> None:
    """Writes latents of rendered scenes, latents-<shard>.npz; a running base training picks new shards up."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(output / "vae").requires_grad_(False).to(device)
    rng = np.random.default_rng([7, shard])
    tasks = rng.choice(world.TASKS, pictures, p=[TASK_SHARES[task] for task in world.TASKS])
    scenes, latents = [world.sample_scene(task, rng) for task in tasks], []
    for first in range(0, pictures, 50):
        pixels = np.stack([world.render(scene) for scene in scenes[first : first + 50]])
        batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append((model.encode(batch).latent_dist.mean * model.config.scaling_factor).half().cpu().numpy())
    path = output / f"latents-{shard}.tmp.npz"
    np.savez(path, latents=np.concatenate(latents), scenes=np.array(json.dumps(scenes)))
    path.rename(output / f"latents-{shard}.npz")
    typer.echo(f"latents-{shard}.npz: {pictures} pictures")
