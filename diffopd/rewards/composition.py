"""Object composition in the manner of GenEval (arXiv:2310.11513): count, colour, position, by a detector.

The detector is one of transformers' object detectors, or an instance segmentation such as GenEval's Mask2Former (it
needs scipy: diffopd[geneval]); colours are told by a CLIP. Nothing needs mmdet. A row of GenEval's metadata says what
must be seen: "include", a list of {"class", "count", "color"?, "position"?: [relation, index of another entry]}, and
"exclude", a list of {"class", "count"}: so many or more are too many.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

DETECTOR = "PekingU/rtdetr_r50vd"
MARGIN = 0.1  # of the sizes of both boxes: by less, nothing is beside anything
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Found:
    """One detection: class name, confidence, box (left, top, right, bottom) in pixels, where known its mask (H, W)."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: Any = None


class Composition:
    """1 where a picture shows what its row asks for, else 0; credit "share" gives the share of met requirements.

    detector: hub id or folder of an object detector, or of an instance segmentation; color_model: of a CLIP, loaded
    only when a row asks for a colour. threshold: least confidence of a detection, count_threshold where more than one
    is asked for (GenEval's
    .3 and .9 are for its Mask2Former: check yours on pictures first). aliases: GenEval's class -> the detector's.

    Raises OSError for a detector that cannot be had, ValueError for a class that it does not know.
    """

    packages: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("detector", "color_model")

    def __init__(
        self,
        detector: str = DETECTOR,
        color_model: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        count_threshold: float = 0.9,
        credit: str = "all",
        aliases: dict[str, str] | None = None,
        device: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoImageProcessor

        if credit not in ("all", "share"):
            raise ValueError(f'credit = {credit!r} is not allowed. Give "all" or "share".')
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._has_masks, kind = _kind_of(_loaded(AutoConfig, detector))
        self._detector = _loaded(kind, detector, use_safetensors=True).to(self._device).eval()
        self._processor = _loaded(AutoImageProcessor, detector)
        self._names = {int(key): name for key, name in self._detector.config.id2label.items()}
        self._thresholds, self._credit = (threshold, count_threshold), credit
        self._aliases, self._color_model, self._colors = aliases or {}, color_model, None

    @staticmethod
    def check(
        prompts: list[str],
        metadata: list[dict[str, Any]],
        *,
        download: bool = False,
        detector: str = DETECTOR,
        aliases: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Raises ValueError for a row that a call would refuse, by the classes that the detector's config lists.

        Where that config is not here, nor to be had if download allows it, classes are left to the first call.
        """
        known = _listed_classes(detector, download)
        for row in metadata:
            translated(row, known, aliases or {})

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """(B,) in [0, 1]. Raises ValueError for a row that asks for nothing, or for a class nobody knows."""
        known = frozenset(self._names.values())
        rows = [translated(row, known, self._aliases) for row in metadata]
        scores = []
        for image, found, row in zip(images, self.detect(images), rows, strict=True):
            kept = [self._kept(found, entry) for entry in row["include"]]
            colors = [self._of_color(image, held, entry) for held, entry in zip(kept, row["include"], strict=True)]
            met = requirements(row, colors, found, self._thresholds[1])
            scores.append(float(all(met)) if self._credit == "all" else sum(met) / len(met))
        return scores

    def detect(self, images: list[Any]) -> list[list[Found]]:
        """The detections of B pictures above the lower threshold, surest first."""
        import torch

        pictures = [image.convert("RGB") for image in images]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._device)
        with torch.no_grad():
            said = self._detector(**inputs)
        sizes = [(image.height, image.width) for image in pictures]
        least = min(self._thresholds)
        if self._has_masks:
            options = {"threshold": least, "target_sizes": sizes, "return_binary_maps": True}
            found = self._processor.post_process_instance_segmentation(said, **options)
            return [self._segmented(one) for one in found]
        found = self._processor.post_process_object_detection(said, threshold=least, target_sizes=sizes)
        return [self._listed(one) for one in found]

    def _listed(self, one: dict[str, Any]) -> list[Found]:
        parts = zip(one["labels"].tolist(), one["scores"].tolist(), one["boxes"].tolist(), strict=True)
        listed = [Found(self._names[label], score, tuple(box)) for label, score, box in parts]
        return sorted(listed, key=lambda found: -found.confidence)

    def _segmented(self, one: dict[str, Any]) -> list[Found]:
        listed = []
        masks = one["segmentation"] if one["segments_info"] else []  # else it is one empty map, not none
        for info, mask in zip(one["segments_info"], masks, strict=True):
            if mask.any():
                ys, xs = mask.bool().nonzero(as_tuple=True)
                box = tuple(float(edge) for edge in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
                listed.append(Found(self._names[info["label_id"]], info["score"], box, mask.bool().cpu().numpy()))
        return sorted(listed, key=lambda found: -found.confidence)

    def _kept(self, found: list[Found], entry: dict[str, Any]) -> list[Found]:
        least = self._thresholds[entry["count"] > 1]
        return [one for one in found if one.name == entry["class"] and one.confidence >= least]

    def _of_color(self, image: Any, found: list[Found], entry: dict[str, Any]) -> list[Found]:
        if not entry.get("color") or not found:
            return found
        found = found[: entry["count"]]  # as GenEval: the surest must have the colour, no other will do
        self._colors = self._colors or ColorJudge(self._color_model, self._device)
        told = self._colors([cut_out(image, one) for one in found], entry["class"])
        return [one for one, color in zip(found, told, strict=True) if color == entry["color"]]


class ColorJudge:
    """The likeliest of GenEval's ten colours of each cut-out, by a CLIP as GenEval asks it: three texts a colour."""

    def __init__(self, model: str, device: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._model = _loaded(CLIPModel, model, use_safetensors=True).to(device).eval()
        self._processor, self._device = _loaded(CLIPProcessor, model), device
        self._directions: dict[str, Any] = {}

    def __call__(self, cuts: list[Any], name: str) -> list[str]:
        """One colour for each of B cut-outs of things called `name`."""
        import torch

        if name not in self._directions:
            self._directions[name] = self._told(name)
        inputs = self._processor(images=cuts, return_tensors="pt").to(self._device)
        with torch.no_grad():
            seen = self._model.visual_projection(self._model.vision_model(**inputs).pooler_output)
        best = (seen @ self._directions[name].T).argmax(1)  # the length of a picture's vector changes no order
        return [COLORS[place] for place in best.tolist()]

    def _told(self, name: str) -> Any:
        """(10, D): the unit vector of each colour, along the mean of its texts' unit vectors."""
        import torch
        from torch.nn.functional import normalize

        texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
        inputs = self._processor(text=texts, padding=True, return_tensors="pt").to(self._device)
        with torch.no_grad():
            said = self._model.text_projection(self._model.text_model(**inputs).pooler_output)
        each = normalize(said, dim=-1).unflatten(0, (len(COLORS), len(COLOR_TEXTS)))
        return normalize(each.mean(1), dim=-1)


def translated(row: dict[str, Any], known: Collection[str] | None, aliases: dict[str, str]) -> dict[str, Any]:
    """A row's requirements under the detector's class names; known: all of these, None where that is not known.

    Raises ValueError as `checked_row`, and for a class that is not among them.
    """
    checked = checked_row(row)
    for entry in (*checked["include"], *checked["exclude"]):
        entry["class"] = aliases.get(entry["class"], entry["class"])
        if known is not None and entry["class"] not in known:
            raise ValueError(
                f'the detector knows no {entry["class"]!r}. Give options.aliases = {{"{entry["class"]}" = '
                '"its name"}, or another detector.'
            )
    return checked


@cache
def _listed_classes(detector: str, download: bool) -> frozenset[str] | None:
    """The class names in a detector's config, None where it cannot be had."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(detector, local_files_only=not download)
    except (OSError, ValueError):  # told when the detector is loaded
        return None
    return frozenset(config.id2label.values())


def checked_row(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of a row's requirements. Raises ValueError for one that asks for nothing or for what is not there."""
    include, exclude = _entries(row, "include"), _entries(row, "exclude")
    if not include:
        raise ValueError(f'the row {row} asks for nothing. Give it "include" as GenEval\'s metadata have it.')
    for entry in include:
        color, position = entry.get("color"), entry.get("position")
        if color is not None and color not in COLORS:
            raise ValueError(f"color {color!r} is not one of {', '.join(COLORS)}.")
        if position is not None and not _is_position(position, len(include)):
            raise ValueError(f"position {position!r} is not one of {', '.join(RELATIONS)} and an entry of include.")
    return {"include": include, "exclude": exclude}


def _entries(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    given = row.get(key, [])
    if not isinstance(given, list) or not all(isinstance(e, dict) and isinstance(e.get("class"), str) for e in given):
        raise ValueError(
            f'"{key}" of the row {row} is not a list of {{"class": name, ...}} as GenEval\'s metadata have.'
        )
    entries = [{"count": 1, **entry} for entry in given]
    for entry in entries:
        if type(entry["count"]) is not int or entry["count"] < 1:
            raise ValueError(f"count {entry['count']!r} of {entry['class']!r} is not a whole number of at least 1.")
    return entries


def _is_position(given: Any, count: int) -> bool:
    """Whether it is [relation, index of one of count entries]."""
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        return False
    return given[0] in RELATIONS and type(given[1]) is int and 0 <= given[1] < count


def requirements(
    row: dict[str, Any], kept: list[list[Found]], found: list[Found], count_threshold: float
) -> list[bool]:
    """Which requirements of a row are met: each entry's count, each position, each exclusion.

    kept: per entry of include its detections of the right class and colour; found: all detections.
    """
    met = [len(held) >= entry["count"] for held, entry in zip(kept, row["include"], strict=True)]
    for held, entry in zip(kept, row["include"], strict=True):
        if entry.get("position"):
            relation, other = entry["position"]
            met.append(_stands(held[: entry["count"]], relation, kept[other][: row["include"][other]["count"]]))
    for entry in row["exclude"]:
        sure = [one for one in found if one.name == entry["class"] and one.confidence >= count_threshold]
        met.append(len(sure) < entry["count"])
    return met


def _stands(things: list[Found], relation: str, others: list[Found]) -> bool:
    """Every thing stands so to every other; where one side was not found, nothing does."""
    return bool(things and others) and all(relation in relations(a.box, b.box) for a in things for b in others)


def relations(box: tuple[float, ...], other: tuple[float, ...]) -> set[str]:
    """How the first box stands to the second; none where their centres hardly differ, two on a diagonal.

    GenEval's rule: the offset of the centres, shortened on each axis by .1 of both boxes' sizes, over its full
    length, must exceed 1/2 on an axis.
    """
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (box[low] + box[high]) / 2 - (other[low] + other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offset.append(apart)
        shortened.append(max(abs(apart) - MARGIN * sizes, 0.0) * (1 if apart > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length == 0:
        return set()
    across, down = shortened[0] / length, shortened[1] / length
    told = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in told.items() if holds}


def cut_out(image: Any, found: Found) -> Any:
    """A detection's box of the picture; where its mask is known all else is grey, as GenEval shows it to CLIP."""
    from PIL import Image

    if found.mask is None:
        return crop(image, found.box)
    shape, grey = Image.fromarray(found.mask), Image.new("RGB", image.size, (153, 153, 153))
    return crop(Image.composite(image.convert("RGB"), grey, shape), found.box)


def crop(image: Any, box: tuple[float, ...]) -> Any:
    """The box of a picture, at least one pixel large."""
    left, top = max(0, int(box[0])), max(0, int(box[1]))
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    right, bottom = min(image.width, max(left + 1, round(box[2]))), min(image.height, max(top + 1, round(box[3])))
    return image.convert("RGB").crop((left, top, right, bottom))


def _kind_of(config: Any) -> tuple[bool, Any]:
    """(whether it gives masks, the class that loads it)."""
    from transformers import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        AutoModelForObjectDetection,
        AutoModelForUniversalSegmentation,
    )

    is_detector = type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING
    return not is_detector, AutoModelForObjectDetection if is_detector else AutoModelForUniversalSegmentation


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except OSError as error:
        raise OSError(
            f"{name} is no folder with a model in safetensors, and the hub did not give it "
            f"({str(error).splitlines()[0]}). Download it first (hf download {name}), or name a folder."
        ) from error
