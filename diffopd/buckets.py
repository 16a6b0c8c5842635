"""Aspect buckets: each picture is trained at the size nearest to its own shape, all of about the same area."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffopd.blueprint import Blueprint

WIDEST = 2.0  # sides of a bucket differ by at most this factor; wider pictures lose their ends
DEFAULT_RESOLUTION = 1024  # of transformers, whose configs do not tell it

Size = tuple[int, int]


def native_resolution(base: Blueprint) -> int:
    """Pixels a side that a pipeline draws when it is told nothing."""
    config = base.denoiser_config
    if base.denoiser == "unet" and isinstance(config.get("sample_size"), int):
        return config["sample_size"] * autoencoder_factor(base)
    return DEFAULT_RESOLUTION


def called_size(call: Mapping[str, Any], base: Blueprint) -> Size:
    """(width, height) of the pictures that a call of the pipeline draws."""
    side = native_resolution(base)
    return call.get("width") or side, call.get("height") or side


def known_size(call: Mapping[str, Any], base: Blueprint) -> Size | None:
    """As `called_size` where call or config tell it; None where it is only the usual size of such pipelines."""
    is_said = bool(call.get("width")) and bool(call.get("height"))
    is_of_unet = base.denoiser == "unet" and isinstance(base.denoiser_config.get("sample_size"), int)
    return called_size(call, base) if is_said or is_of_unet else None


def autoencoder_factor(base: Blueprint) -> int:
    """Pixels a side of one latent."""
    config = base.configs.get("vae", {})
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")  # the latter: AutoencoderDC
    return 2 ** (len(levels) - 1) if levels else 8


def bucket_step(base: Blueprint) -> int:
    """What both sides of a picture must be a multiple of: a UNet halves its latents, a transformer packs two.

    Stock pipelines also want a multiple of 8.
    """
    halvings = len(base.denoiser_config.get("block_out_channels", [0] * 4)) - 1 if base.denoiser == "unet" else 1
    return math.lcm(8, autoencoder_factor(base) * 2**halvings)


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """(width, height) of every bucket of at most resolution^2 pixels, multiples of `step`, square first."""
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(step, int(resolution * math.sqrt(WIDEST)) + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width / height, height / width) <= WIDEST:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (abs(math.log(size[0] / size[1])), size))


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose shape is nearest to a picture's (width, height)."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1] * size[1] / size[0])))
