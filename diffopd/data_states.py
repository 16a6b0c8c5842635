"""Off-policy states: noised pictures instead of the student's own walk. A baseline, and a check of what OPD adds.

Rows name a picture ("file_name", beside their prompt file); its latents are noised to each level of the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopd.data import PromptRow
from diffopd.drive import Visit
from diffopd.errors import UserError
from diffopd.schedulers import Place


def encode_pictures(pipeline: Any, rows: list[PromptRow]) -> Tensor:
    """Scaled latents (B, C, h, w) of the rows' pictures, the autoencoder's mean.

    Raises UserError for a row without "file_name" or a picture that cannot be read.
    """
    return encode_images(pipeline, [_picture(row) for row in rows])


def encode_images(pipeline: Any, images: list[Image.Image]) -> Tensor:
    """Scaled latents (B, C, h, w) of B PIL images of one size, the autoencoder's mean."""
    vae = pipeline.vae
    pixels = torch.stack([_pixels(image) for image in images]).to(device=vae.device, dtype=vae.dtype)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift).float() * vae.config.scaling_factor


def noised(latents: Tensor, noise: Tensor, place: Place) -> Tensor:
    """Canonical states (B, ...) at a place of the grid."""
    return place.path.interpolate(latents, noise, place.sigma)


def next_place(visit: Visit) -> Place:
    """Where the step of a visit leads."""
    here = visit.place
    return Place(here.sigma_next, 0.0, here.path)


def _picture(row: PromptRow) -> Image.Image:
    name = row.metadata.get("file_name")
    if not isinstance(name, str):
        raise UserError(
            f'objective.states = "data" noises pictures, but the row of prompt {row.prompt!r} names none. Add '
            '"file_name" (a path from the prompt file) to every row, or set objective.states = "student".'
        )
    try:
        with Image.open(name) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{name}: the picture of prompt {row.prompt!r} cannot be read: {error}") from error


def _pixels(image: Image.Image) -> Tensor:
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
