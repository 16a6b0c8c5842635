"""Pictures drawn by the plain pipeline call of one side, and grids of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffopd import noise
from diffopd.batches import Size
from diffopd.drive import Call

if TYPE_CHECKING:
    from diffopd.distill import Run

LOOK = 2**31 + 48  # noise key: no update of a run ever has this number
HEADING = 14  # pixels above a column


def draw(run: Run, call: Call, prompts: Sequence[str], numbers: Sequence[int], size: Size | None) -> list[Image.Image]:
    """What a stock call draws, its own steps and guidance, from noise that depends on the numbers alone."""
    from diffopd.distill import told_size

    shape = run.walk_at(size).latents_shape
    keys = {"run_seed": run.recipe.seed, "update": LOOK, "solver_step": 0, "sample_indices": list(numbers)}
    latents = noise.draw(shape, **keys).to(run.device)
    generator = torch.Generator(run.device).manual_seed(run.recipe.seed)  # for schedulers that draw noise
    asked = call.prompted(prompts, **told_size(size)).told(latents=latents, generator=generator, output_type="pil")
    with torch.no_grad(), call.binding():
        return call.pipeline(**asked.arguments).images


def sharpness(image: Image.Image) -> float:
    """Mean difference of neighbouring pixels of a picture's grey values, in [0, 1]."""
    grey = np.asarray(image.convert("L"), dtype=np.float64) / 255
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def grid(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str]) -> Image.Image:
    """Rows of pictures under headings, one column each; every cell has the size of the largest picture."""
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    page = Image.new("RGB", (width * len(headings), HEADING + height * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        pen.text((column * width + 2, 1), heading, fill="black")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            page.paste(image, (column * width, HEADING + number * height))
    return page


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def embeddings(pipeline: Any, images: Sequence[Image.Image]) -> np.ndarray | None:
    """(N, D) unit vectors of pictures by the pipeline's own CLIP image encoder, None where it has none."""
    encoder, extractor = (getattr(pipeline, name, None) for name in ("image_encoder", "feature_extractor"))
    if encoder is None or extractor is None:
        return None
    pixels = extractor(images=list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        found = encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds.float()
    return torch.nn.functional.normalize(found, dim=1).cpu().numpy()
