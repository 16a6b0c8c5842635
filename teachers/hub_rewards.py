"""Rewards that need published scorers. They are loaded when first asked, from the hub or from a folder, never pickled.

DIFFOPD_REWARD_MODELS names a folder that holds the scorers as owner/repository, for machines without a network.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
QUOTED = re.compile(r'"([^"]+)"')
THRESHOLD, COUNTING_THRESHOLD, MARGIN = 0.3, 0.9, 0.1  # GenEval's own (arXiv 2310.11513)


def clip_score(images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Cosine of picture and prompt in CLIP ViT-L/14, negative ones as 0."""
    return [max(0.0, cosine) for cosine, _ in _similarities(CLIP, CLIP, images, prompts)]


def aesthetic(images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Mean of PickScore / 26 and the CLIP score. The third part of the published reward, HPSv2.1, is a pickle."""
    picks = _similarities(PICKSCORE, PICKSCORE_PROCESSOR, images, prompts)
    clips = clip_score(images, prompts, metadata)
    return [
        (min(1.0, max(0.0, scale * cosine / 26)) + clip) / 2 for (cosine, scale), clip in zip(picks, clips, strict=True)
    ]


def ocr(images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 - edit distance / length between the prompt's quoted words and what is read; 1 where they are contained."""
    return [text_score(_quoted(prompt), _read(image)) for image, prompt in zip(images, prompts, strict=True)]


def text_score(wanted: str, read: str) -> float:
    """Case and spaces aside, in [0, 1]."""
    wanted, read = (re.sub(r"\s+", "", text).lower() for text in (wanted, read))
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def geneval(images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Share of the row's "include" and "exclude" requirements that the picture fulfils, by GenEval's rules."""
    scores = []
    for image, row in zip(images, metadata, strict=True):
        threshold = COUNTING_THRESHOLD if row["tag"] == "counting" else THRESHOLD
        scores.append(requirements_met(_detect(image, threshold), row, functools.partial(_color_of, image)))
    return scores


def requirements_met(found: dict[str, list[tuple[Any, Any]]], row: dict[str, Any], color_of: Any) -> float:
    """`found`: class -> its (box, mask), best first; color_of(name, box, mask) names a colour. In [0, 1]."""
    met, groups = [], []
    for wanted in row["include"]:
        name, count = wanted["class"], wanted["count"]
        objects = found.get(name, [])
        is_met = len(objects) >= count
        if is_met and "color" in wanted:
            is_met = sum(color_of(name, *thing) == wanted["color"] for thing in objects[:count]) >= count
        if is_met and "position" in wanted:
            relation, target = wanted["position"]
            is_met = bool(groups[target]) and all(
                relation in relations(mine[0], other[0]) for mine in objects[:count] for other in groups[target]
            )
        groups.append(objects[:count])
        met.append(is_met)
    met += [len(found.get(unwanted["class"], [])) < unwanted["count"] for unwanted in row.get("exclude", [])]
    return sum(met) / len(met)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box (left, top, right, bottom) lies from another, beyond a margin of their sizes."""
    centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, other)]
    sizes = [(b[2] - b[0], b[3] - b[1]) for b in (box, other)]
    offset = [centers[0][axis] - centers[1][axis] for axis in (0, 1)]
    kept = [
        max(abs(d) - MARGIN * (sizes[0][i] + sizes[1][i]), 0.0) * (1 if d > 0 else -1) for i, d in enumerate(offset)
    ]
    length = (kept[0] ** 2 + kept[1] ** 2) ** 0.5
    if not length:
        return set()
    x, y = kept[0] / length, kept[1] / length
    named = {"right of": x > 0.5, "left of": x < -0.5, "below": y > 0.5, "above": y < -0.5}
    return {name for name, holds in named.items() if holds}


def _quoted(prompt: str) -> str:
    found = QUOTED.search(prompt)
    if not found:
        raise ValueError(f"the OCR reward needs a prompt with the wanted words in double quotes, got {prompt!r}.")
    return found[1]


def _similarities(model: str, processor: str, images: list[Any], prompts: list[str]) -> list[tuple[float, float]]:
    """(cosine, the model's scale) of every picture with its prompt."""
    import torch

    network, prepare = _load(model, "AutoModel"), _load(processor, "AutoProcessor")
    inputs = prepare(text=prompts, images=images, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        answer = network(**inputs.to(network.device))
    cosines = (answer.image_embeds * answer.text_embeds).sum(-1)
    return [(float(cosine), float(network.logit_scale.exp())) for cosine in cosines]


def _detect(image: Any, threshold: float) -> dict[str, list[tuple[Any, Any]]]:
    """class -> (box, mask) of its instances above the threshold, best first."""
    import torch

    network, prepare = _load(DETECTOR, "Mask2FormerForUniversalSegmentation"), _load(DETECTOR, "AutoImageProcessor")
    inputs = prepare(images=image, return_tensors="pt").to(network.device)
    with torch.no_grad():
        answer = network(**inputs)
    size = [(image.height, image.width)]
    segments = prepare.post_process_instance_segmentation(
        answer, threshold=threshold, target_sizes=size, return_binary_maps=True
    )[0]
    found: dict[str, list[tuple[Any, Any]]] = {}
    order = sorted(range(len(segments["segments_info"])), key=lambda i: -segments["segments_info"][i]["score"])
    for index in order:
        mask = segments["segmentation"][index].bool()
        if mask.any():
            ys, xs = mask.nonzero(as_tuple=True)
            box = tuple(float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            name = network.config.id2label[segments["segments_info"][index]["label_id"]]
            found.setdefault(name, []).append((box, mask))
    return found


def _color_of(image: Any, name: str, box: Sequence[float], mask: Any) -> str:
    """The colour of a detected thing, its surroundings greyed out, by CLIP among GenEval's ten."""
    from PIL import Image

    grey = Image.new("RGB", image.size, (153, 153, 153))
    shape = Image.fromarray(mask.cpu().numpy().astype("uint8") * 255)
    crop = Image.composite(image.convert("RGB"), grey, shape).crop(tuple(map(int, box)))
    prompts = [f"a photo of a {color} {name}" for color in COLORS]
    cosines = [cosine for cosine, _ in _similarities(CLIP, CLIP, [crop] * len(COLORS), prompts)]
    return COLORS[cosines.index(max(cosines))]


@functools.cache
def _load(name: str, kind: str) -> Any:
    """A scorer or its processor, on the GPU where there is one."""
    import torch
    import transformers

    local = Path(os.environ.get("DIFFOPD_REWARD_MODELS", "")) / name
    source = str(local) if os.environ.get("DIFFOPD_REWARD_MODELS") and local.is_dir() else name
    try:
        if "Processor" in kind:
            return getattr(transformers, kind).from_pretrained(source)
        network = getattr(transformers, kind).from_pretrained(source, use_safetensors=True)
    except OSError as error:
        raise OSError(
            f"the reward needs {name}, which neither the hub nor $DIFFOPD_REWARD_MODELS gave: {error} Connect to the "
            "hub once, or save the model there with save_pretrained."
        ) from error
    return network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _reader() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            "the OCR reward reads with RapidOCR, which is not installed. pip install diffopd[ocr]"
        ) from error
    return RapidOCR()


def _read(image: Any) -> str:
    """All words that are read in a picture, in reading order."""
    import numpy as np

    answer = _reader()(np.asarray(image.convert("RGB"))[:, :, ::-1])  # it takes BGR
    return " ".join(answer.txts or ())
