"""Pictures drawn with the image path, beside the references that they were told and the drawings from text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from world_data import save_sheet
from world_image_models import WEIGHTS
from world_looks import draw_group, plain_drawings, render, sample_scene
from world_models import ROOT, world
from world_training import Output

IMAGE_PATH = ROOT / "pipelines" / "emoji-ip-adapter"


def open_with_image_path(pipeline: Path, folder: Path) -> Any:
    """The base with the adapter of `folder`, by stock loading. Raises FileNotFoundError where there is none."""
    from diffusers import StableDiffusionPipeline

    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}; run world_image.py train and save, or name another")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw_from(
    pipe: Any, prompts: list[str], references: np.ndarray | None, steps: int, guidance: float, seed: int = 0
) -> np.ndarray:
    """Pictures (B, 48, 48, 3) of prompts, each with its own reference; None: the unseen one, that is text alone."""
    pictures = np.zeros((len(prompts), world.SIZE, world.SIZE, 3), np.uint8) if references is None else references
    pixels = pipe.feature_extractor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    pixels = torch.zeros_like(pixels) if references is None else pixels
    seen, unseen = (
        pipe.image_encoder(shown, output_hidden_states=True).hidden_states[-2][:, None]
        for shown in (pixels, torch.zeros_like(pixels))
    )
    embeds = torch.cat([unseen, seen]) if guidance > 1 else seen
    noise = [torch.Generator().manual_seed(1_000_003 * seed + n) for n in range(len(prompts))]
    given = pipe.prepare_ip_adapter_image_embeds
    pipe.prepare_ip_adapter_image_embeds = lambda image, embeds, *rest: (
        embeds
    )  # stock shows every picture to every prompt
    try:
        drawn = pipe(prompts, ip_adapter_image_embeds=[embeds], num_inference_steps=steps, guidance_scale=guidance,
                     generator=noise, output_type="np").images  # fmt: skip
    finally:
        pipe.prepare_ip_adapter_image_embeds = given
    return np.round(drawn * 255).astype(np.uint8)


def sheet(
    output: Output,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    adapter: Annotated[Path, typer.Option(help="the image path")] = IMAGE_PATH,
    looks: Annotated[int, typer.Option(help="changed manners")] = 3,
    pictures: Annotated[int, typer.Option(help="of a manner")] = 10,
    guidance: float = 2.0,
    steps: int = 20,
) -> None:
    """Writes <output>/sheet.png: for Fluent 3D (never trained on), a seen manner and changed ones four rows each:
    the pictures, drawn from text alone, with the picture shown, with another one of its manner shown.
    """
    torch.set_num_threads(1)
    pipe, rows = open_with_image_path(pipeline, adapter), []
    drawings = [plain_drawings("atlas_3d.png"), plain_drawings(row=1)]
    for number in range(2 + looks):
        rng = np.random.default_rng([23, number])
        if number < 2:
            scenes = [sample_scene(rng) for _ in range(pictures)]
            targets = np.stack([render(scene, drawings[number]) for scene in scenes])
            prompts = [world.captions(s["task"], s)[0].split(" in ")[0] for s in scenes]
        else:
            group = draw_group(pictures, rng, [])
            targets, prompts = group.pictures, [said[0] for said in group.captions]
        shown = [None, targets, np.roll(targets, 1, 0)]
        rows += [targets, *(draw_from(pipe, prompts, references, steps, guidance) for references in shown)]
    save_sheet(np.concatenate([np.concatenate(list(row), 1) for row in rows]), output / "sheet.png", zoom=2)
