"""One picture file: opened whole, refused with a reason, and fitted to a size."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from diffopd.errors import UserError

LARGEST = 2**26  # pixels; a file of a few kilobytes may claim any number of them
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # what RGB holds without loss, transparency aside
SIXTEEN_BIT_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
BITS_PER_SAMPLE = 258  # TIFF tag
BACKGROUND = "white"  # transparent pictures are laid over it
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises for broken files


class BadPicture(Exception):
    """Why a file is refused and what to do; the place is told by who asked."""


@dataclass(frozen=True)
class Facts:
    """What a picture is once decoded. size: (width, height) as viewers show it; pixels: sha256 of size and RGB."""

    size: tuple[int, int]
    is_transparent: bool
    pixels: str


def examine(path: Path) -> Facts:
    """Decode a picture from its first to its last byte.

    Raises BadPicture for a file that is empty, no picture, truncated, animated, too large, CMYK, 16-bit or in
    another mode that RGB does not hold.
    """
    image = _decoded(path)
    is_transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
    flat = _as_rgb(image)
    digest = hashlib.sha256(f"{flat.size}".encode() + flat.tobytes()).hexdigest()
    return Facts(flat.size, is_transparent, digest)


def picture(path: Path | str, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture in RGB, turned as its camera says; of `size` (width, height): enlarged to cover it, centre cut out.

    Raises UserError naming the file when it cannot be read (any more).
    """
    try:
        flat = _as_rgb(_decoded(Path(path)))
    except BadPicture as error:
        raise UserError(f"{path}: {error}") from error
    return flat if size is None else ImageOps.fit(flat, size, Image.Resampling.LANCZOS)


def _decoded(path: Path) -> Image.Image:
    try:
        if not path.is_file():
            raise BadPicture("is a folder or a broken link, not a picture. Remove it.")
        if path.stat().st_size == 0:
            raise BadPicture("the file is empty (0 bytes). Copy it anew or remove it.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _refuse_unfit(image, path)
                image.load()
                return image.copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture(_too_large(str(error).split("(")[1].split(")")[0])) from error
    except UnidentifiedImageError as error:
        raise BadPicture("is not a picture that can be read. Save it as PNG, JPEG or WebP.") from error
    except BROKEN as error:
        raise BadPicture(f"cannot be read to its end ({error}). Copy or save it anew.") from error


def _refuse_unfit(image: Image.Image, path: Path) -> None:
    """What the header tells, before a pixel is decoded."""
    width, height = image.size
    if width * height > LARGEST:
        raise BadPicture(_too_large(f"{width} x {height} pixels"))
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG, with a preview or depths behind
        raise BadPicture(f"is animated ({image.n_frames} frames). Save the frame you want as a still picture.")
    if image.mode == "CMYK":
        raise BadPicture("is CMYK, whose colours depend on a printer's profile. Convert it to sRGB.")
    if image.mode in SIXTEEN_BIT_MODES or _has_sixteen_bits(image, path):
        raise BadPicture("has 16 or more bits a channel. Convert it to 8 bits.")
    if image.mode not in MODES:
        raise BadPicture(f"is in colour mode {image.mode}. Convert it to sRGB with 8 bits a channel.")


def _too_large(what: str) -> str:
    return f"is too large ({what}; allowed are {LARGEST / 1e6:.0f} million). Scale it down."


def _has_sixteen_bits(image: Image.Image, path: Path) -> bool:
    """Pillow reads 16-bit colour pictures as 8-bit without a word; their headers tell."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
    return False


def _as_rgb(image: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("RGBA", "LA") or "transparency" in turned.info:
        seen = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", seen.size, BACKGROUND), seen)
    return turned.convert("RGB")
