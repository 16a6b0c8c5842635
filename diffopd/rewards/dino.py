"""Likeness to a reference picture by DINO features, through transformers. Needs only the weights."""

from __future__ import annotations

import struct
import zlib
from functools import cache
from typing import Any

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises for broken files


class DinoSimilarity:
    """Cosine of DINOv2's class tokens of a picture and of its row's reference, in [-1, 1].

    1 minus it is the DINO distance of D-OPSD (arXiv:2605.05204). The reference is metadata["reference"], else
    metadata["file_name"]: the path of a picture (in a prompt file, from there). Raises OSError for a model that
    cannot be had.
    """

    packages: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("model",)

    def __init__(self, model: str = "facebook/dinov2-base", device: str | None = None) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model = AutoModel.from_pretrained(model, use_safetensors=True).to(self._device).eval()
            self._processor = AutoImageProcessor.from_pretrained(model)
        except OSError as error:
            raise OSError(
                f"{model} is no folder with a DINO model in safetensors, and the hub did not give it "
                f"({str(error).splitlines()[0]}). Download it first (hf download {model}), or name a folder."
            ) from error
        self._references: dict[str, Any] = {}

    @staticmethod
    def check(prompts: list[str], metadata: list[dict[str, Any]], **options: Any) -> None:
        """Raises ValueError for a row without a reference, or with one that cannot be read, whatever the options."""
        for row in metadata:
            _check_readable(_named(row))

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """(B,). Raises ValueError for a row without a reference, or with one that cannot be read."""
        import torch

        references = torch.cat([self._reference(row) for row in metadata])
        return torch.nn.functional.cosine_similarity(self._features(images), references).cpu()

    def _reference(self, row: dict[str, Any]) -> Any:
        """Features (1, D) of a row's reference picture, computed once."""
        name = _named(row)
        if name not in self._references:
            self._references[name] = self._features([_opened(name)])
        return self._references[name]

    def _features(self, images: list[Any]) -> Any:
        """Class tokens (B, D) of the last layer."""
        import torch

        pictures = [image.convert("RGB") for image in images]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._device)
        with torch.no_grad():
            return self._model(**inputs).last_hidden_state[:, 0].float()


def _named(row: dict[str, Any]) -> str:
    name = row.get("reference") or row.get("file_name")
    if not isinstance(name, str):
        raise ValueError(f'the row {row} names no picture. Give it a "reference", the path of an existing one.')
    return name


def _opened(name: str) -> Any:
    """The picture in RGB, read to its end. Raises ValueError for a file that is missing or broken."""
    from PIL import Image

    try:
        with Image.open(name) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"there is no reference {name}. Put the picture there, or correct the path.") from error
    except BROKEN as error:
        raise ValueError(f"the reference {name} cannot be read as a picture ({error}). Replace it.") from error


@cache
def _check_readable(name: str) -> None:
    """Once a picture, whose rows may be many. Raises ValueError as `_opened`."""
    _opened(name)
