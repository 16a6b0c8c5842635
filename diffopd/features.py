"""Feature spaces for what is watched while a student is tuned: networks that the user names, loaded by transformers.

DINO sees whether it is the same thing, CLIP whether the picture is of its prompt, and KID (arXiv:1801.01401) how far
two sets of pictures are apart in the features of one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffopd.errors import UserError
from diffopd.locate import download, parse_hub_id

if TYPE_CHECKING:
    from diffopd.tune_recipe import TuneRecipe

FILES = ["*.safetensors", "*.json", "*.txt"]
NETWORKS = ("dino", "clip")
KID_SUBSETS = 50


@dataclass(frozen=True)
class Features:
    """Networks on one device; None where the recipe names none. Each is (model, image processor, tokenizer or None)."""

    dino: tuple[Any, Any, None] | None = None
    clip: tuple[Any, Any, Any] | None = None

    def of_dino(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) unit vectors: DINO's class token."""
        model, processor, _ = self.dino
        return _unit(_asked(model, **_pixels(processor, images)).last_hidden_state[:, 0])

    def of_clip(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) unit vectors of pictures, and of as many prompts."""
        model, processor, tokenizer = self.clip
        texts = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        said = _asked(model, **_pixels(processor, images), input_ids=texts.input_ids)
        return _unit(said.image_embeds), _unit(said.text_embeds)


def check_features(asked: TuneRecipe) -> dict[str, Path]:
    """name -> folder of every network that look.dino and look.clip name; those on the hub are downloaded.

    Raises UserError before anything is trained for a folder that is missing or lacks a part.
    """
    found = {}
    for name in NETWORKS:
        spec = getattr(asked.look, name)
        if spec is None:
            continue
        folder, place = _folder(spec), asked.place("look", name)
        parts = ["config.json", "preprocessor_config.json", *(["tokenizer_config.json"] if name == "clip" else [])]
        missing = [part for part in parts if not (folder / part).is_file()]
        missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
        if missing:
            raise UserError(
                f"{place}: look.{name} = {spec!r} has no {' and no '.join(missing)} in {folder}. Give a folder or hub "
                f"id of a {name.upper()} network as transformers saves it, or leave look.{name} out."
            )
        found[name] = folder
    return found


def load_features(folders: dict[str, Path], device: str) -> Features:
    """The networks of `check_features`, frozen. Raises UserError for weights that transformers cannot load."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    loaded = {}
    for name, folder in folders.items():
        try:
            model = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval().requires_grad_(False)
            tokenizer = AutoTokenizer.from_pretrained(folder) if name == "clip" else None
            loaded[name] = model, AutoImageProcessor.from_pretrained(folder, backend="pil"), tokenizer
        except (OSError, ValueError, KeyError) as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(f"look.{name}: {folder} cannot be loaded: {line}") from error
    return Features(**loaded)


def kid(features: np.ndarray, others: np.ndarray) -> float:
    """Kernel distance of two sets of features (N, D), (M, D), unbiased: 0 in the mean for sets of one source.

    torchmetrics' KernelInceptionDistance on given features, in subsets as large as the smaller set.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(features), len(others))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features that it is given
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=size)
    metric.update(torch.as_tensor(others).double(), real=True)
    metric.update(torch.as_tensor(features).double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # which subsets are taken
        return float(metric.compute()[0])


def nearest_cosine(features: np.ndarray, others: np.ndarray) -> float:
    """Mean cosine of each unit vector (N, D) to the nearest of others (M, D)."""
    return float((features @ others.T).max(1).mean())


def _folder(spec: str) -> Path:
    local = Path(spec).expanduser()
    hub = None if local.exists() else parse_hub_id(spec)
    return download(hub, FILES) if hub else local


def _pixels(processor: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    return {
        "pixel_values": processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    }


def _asked(model: Any, **inputs: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(**{name: value.to(model.device) for name, value in inputs.items()})


def _unit(values: Any) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(values.float(), dim=-1).cpu().numpy()
