"""Off-policy states: noised pictures instead of the student's own walk. A baseline, and a check of what OPD adds.

Rows name a picture ("file_name", beside their prompt file); its latents are noised to each level of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopd.data import PromptRow
from diffopd.drive import Visit
from diffopd.errors import UserError
from diffopd.image_file import picture
from diffopd.schedulers import Place


def encode_pictures(pipeline: Any, rows: list[PromptRow]) -> Tensor:
    """Scaled latents (B, C, h, w) of the rows' pictures at the rows' size, if they have one; the autoencoder's mean.

    Raises UserError for a row without "file_name" or a picture that cannot be read.
    """
    return encode_images(pipeline, [_picture(row) for row in rows])


def encode_images(pipeline: Any, images: list[Image.Image]) -> Tensor:
    """Scaled latents of B PIL images of one size, the autoencoder's mean, in the form of the `latents` argument.

    (B, C, h, w), or (B, tokens, C) where the argument is packed. Raises UserError for a pipeline that is not known.
    """
    vae = pipeline.vae
    pixels = torch.stack([_pixels(image) for image in images]).to(device=vae.device, dtype=vae.dtype)
    encode = ENCODERS.get(type(pipeline).__name__) or ENCODERS.get(type(vae).__name__)
    if encode is None:
        raise UserError(cannot_encode(type(pipeline).__name__))
    with torch.no_grad():
        return encode(pipeline, pixels).float()


def as_states(pipeline: Any, latents: Tensor) -> Tensor:
    """Latents in the form that a pipeline's scheduler sees: FLUX.2 packs what it is given."""
    return pipeline._pack_latents(latents) if _packs(pipeline) else latents


def as_latents(pipeline: Any, states: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `as_states`; shape: of one picture's `latents` argument (`Survey.latents_shape`)."""
    return states.transpose(1, 2).reshape(len(states), *shape) if _packs(pipeline) else states


def _packs(pipeline: Any) -> bool:
    return type(pipeline).__name__ in ("Flux2Pipeline", "Flux2KleinPipeline")


def can_encode(pipeline_class: str, autoencoder_class: str) -> bool:
    """Whether pictures can be made latents of this pipeline."""
    return pipeline_class in ENCODERS or autoencoder_class in ENCODERS


def cannot_encode(pipeline_class: str) -> str:
    """Why, and what to do."""
    return (
        f"{pipeline_class} is not known to make latents of pictures here, so it cannot learn from noised ones. Known "
        f"are {', '.join(name for name in ENCODERS if name.endswith('Pipeline'))}, and pipelines with an AutoencoderKL "
        "or AutoencoderDC."
    )


def _scaled(pipeline: Any, pixels: Tensor) -> Tensor:
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (vae.encode(pixels).latent_dist.mean - shift) * vae.config.scaling_factor


def _deep(pipeline: Any, pixels: Tensor) -> Tensor:
    return pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor


def _packed(pipeline: Any, pixels: Tensor) -> Tensor:
    latents = _scaled(pipeline, pixels)
    return pipeline._pack_latents(latents, *latents.shape)


def _patched(pipeline: Any, pixels: Tensor) -> Tensor:
    return pipeline._encode_vae_image(pixels, None)  # the mean: nothing is drawn


# Pipeline class, or class of an autoencoder -> how (B, 3, H, W) in [-1, 1] becomes latents.
ENCODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "FluxPipeline": _packed,
    "ChromaPipeline": _packed,
    "Flux2Pipeline": _patched,
    "Flux2KleinPipeline": _patched,
    "AutoencoderKL": _scaled,
    "AsymmetricAutoencoderKL": _scaled,
    "AutoencoderDC": _deep,
}


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
    return picture(name, row.bucket)


def _pixels(image: Image.Image) -> Tensor:
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
