"""LoRA files in the layouts that people share: PEFT, diffusers, kohya / sd-scripts, ComfyUI.

A layout is a spelling of tensor names and a place where alpha is kept. Every file becomes the same thing here: pairs
of matrices by module of the denoiser. Names that are the denoiser's own, in whatever spelling, are looked up among its
modules; names of another implementation (LDM, Black Forest Labs, ...) go through the converter of the pipeline's own
class in diffusers, and what comes out is held against what went in. Nothing is dropped: what is not understood is an
error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffopd.drive import denoiser_name, denoiser_of
from diffopd.errors import UserError

PAIRS = (  # how the first and the second matrix of a layer end, longest first
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
)
PEFT_PREFIX = "base_model.model."
TEXT_ENCODERS = ("text_encoder", "lora_te", "te1_", "te2_", "conditioner.", "cond_stage_model.")
OTHER_KINDS = {  # a word in a tensor's name -> what the file is
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "a LoRA with a middle matrix (Tucker)",
    "oft_": "OFT",
}
METADATA = "lora_adapter_metadata"  # where diffusers keeps a LoraConfig in a file's header
INITS = ("gaussian", "eva", "orthogonal", "mica")  # named beginnings of peft's that leave the base as it is
CLOSE = 1e-6  # relative, between the size of what went into a converter and what came out


@dataclass(frozen=True)
class Layer:
    """One layer of a LoRA: its delta is scale * up @ down. down (rank, in, ...), up (out, rank, ...)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the delta, from the two small products: tr((up' up) (down down'))."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())


@dataclass(frozen=True)
class Lora:
    """Layers by module of the denoiser; config: what peft's LoraConfig is made of, where the file came with one."""

    layers: dict[str, Layer]
    config: dict[str, Any] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As `load_lora_adapter` of a diffusers model takes them, without a prefix; a scale of its own is in `up`."""
        found = {}
        for name, layer in self.layers.items():
            up = layer.up if layer.scale == 1.0 else layer.up.float() * layer.scale
            found |= {f"{name}.lora_A.weight": layer.down.to(up.dtype), f"{name}.lora_B.weight": up}
        return found


def read_lora(file: Path, pipeline: Any) -> Lora:
    """A LoRA file in any known layout, as layers of the pipeline's denoiser; the pipeline is not changed.

    alpha comes from diffusers' metadata in the file, PEFT's adapter_config.json beside it, or the file's .alpha
    tensors (then scale = alpha / rank, layer by layer); a file with none of them means alpha = rank.
    Raises UserError for tensors of the text encoder, kinds other than LoRA, layers that the denoiser does not have,
    and whatever else would be left out.
    """
    layers, config = read_layers(file)
    own = match(layers, denoiser_of(pipeline), denoiser_name(pipeline))
    if own is None and config is None:
        own = _by_diffusers(layers, pipeline)
    if own is None:
        raise UserError(_unknown_layers(file, layers, pipeline))
    return Lora(own, config)


def read_layers(file: Path) -> tuple[dict[str, Layer], dict[str, Any] | None]:
    """The layers of a LoRA file by their names there, and its LoraConfig where it has one. Errors as `read_lora`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file}: is not a safetensors file ({error}). Save or copy it anew.") from error
    refuse_others(file, list(tensors))
    config = _config(file, tensors, header)
    alphas = {key.removesuffix(".alpha"): float(tensors.pop(key)) for key in list(tensors) if key.endswith(".alpha")}
    if alphas and config:
        raise UserError(
            f"{file}: says lora_alpha twice, in .alpha tensors and in its config. Save it with one of them."
        )
    layers = {}
    for name, (down, up) in paired(file, tensors).items():
        if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise UserError(f"{file}: the two matrices of {name} are {shapes}: not (rank, in) and (out, rank).")
        scale = alphas.pop(name, float(down.shape[0])) / down.shape[0]
        layers[name] = Layer(down, up, 1.0 if config else scale)
    if alphas:
        raise UserError(f"{file}: has an .alpha of {next(iter(alphas))}, but no layer of that name. Save it anew.")
    return layers, config


def refuse_others(file: Path, keys: list[str]) -> None:
    """Raise UserError for tensors that no teacher or student here can use, by their names alone."""
    for key in keys:
        kind = next((kind for word, kind in OTHER_KINDS.items() if word in key), None)
        if kind:
            raise UserError(
                f"{file}: is {kind}, not a plain LoRA ({key}). Merge it into a full checkpoint, form = 'full'."
            )
    of_text = [key for key in keys if key.startswith(TEXT_ENCODERS)]
    if of_text:
        raise UserError(
            f"{file}: {len(of_text)} of its {len(keys)} tensors change the text encoder ({of_text[0]}). Student and "
            "teachers share the base's text encoders, so this LoRA cannot be honoured as it is. To use its denoiser "
            'part alone, knowingly: python -c "from diffopd.dialects import without_text_encoder as w; '
            "w('IN.safetensors', 'OUT.safetensors')\"."
        )


def without_text_encoder(source: str | Path, target: str | Path) -> None:
    """Copy a LoRA file without its tensors for text encoders."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as opened:
        kept = {key: opened.get_tensor(key) for key in opened.keys() if not key.startswith(TEXT_ENCODERS)}
        header = dict(opened.metadata() or {})
    if METADATA in header:
        config = json.loads(header[METADATA])
        header[METADATA] = json.dumps({k: v for k, v in config.items() if not k.startswith(TEXT_ENCODERS)})
    save_file(kept, target, metadata=header)


def paired(file: Path, tensors: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Layer -> (first, second) of tensors, or of their shapes. Raises UserError for one that has no partner."""
    found, left = {}, dict(tensors)
    for first, second in PAIRS:
        for key in [key for key in left if key.endswith(first)]:
            name = key.removesuffix(first)
            if name + second in left:
                found[name] = left.pop(key), left.pop(name + second)
    if left or not found:
        what = f"{next(iter(left))} is no part of a LoRA layer" if left else "it has no tensors"
        endings = ", ".join(f"{first} and {second}" for first, second in PAIRS[-3:])
        raise UserError(
            f"{file}: {what} ({len(left)} such tensors). A layer is a pair that ends in {endings}, with an .alpha "
            "beside it or not. Save it with the pipeline's save_lora_weights, or merge it into a full checkpoint."
        )
    return found


def ranks_said(ranks: Iterable[int]) -> str:
    """'rank 4', or 'ranks 2 to 16' of a LoRA whose layers differ."""
    found = sorted(set(ranks))
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {found[0]} to {found[-1]}"


def match(names: dict[str, Any], denoiser: nn.Module, component: str) -> dict[str, Any] | None:
    """`names` by module of the denoiser, None unless each is one of its modules, by a known prefix, '.' or '_'."""
    modules = [name for name in _plain(dict(denoiser.named_modules())) if name]
    flat = Counter(name.replace(".", "_") for name in modules)
    known = {name: name for name in modules} | {
        name.replace(".", "_"): name for name in modules if flat[name.replace(".", "_")] == 1
    }
    prefixes = (
        f"{component}.{PEFT_PREFIX}", PEFT_PREFIX, f"{component}.", "model.diffusion_model.", "diffusion_model.",
        "lora_unet_", f"lora_{component}_", "lycoris_", "",
    )  # fmt: skip
    for prefix in prefixes:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names):
            return {known[name.removeprefix(prefix)]: value for name, value in names.items()}
    return None


def _plain(modules: dict[str, nn.Module]) -> list[str]:
    """Module names as they were before any adapter came."""
    return [name for name in modules if ".base_layer" not in name and ".lora_" not in name]


def _config(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, Any] | None:
    """What a LoraConfig is made of: from diffusers' metadata, or from PEFT's file beside the weights."""
    if METADATA in header:
        stored = json.loads(header[METADATA])
        parts = {key.split(".", 1)[0] for key in stored}
        if len(parts) > 1:
            raise UserError(f"{file}: its metadata is of {', '.join(sorted(parts))}. Save the denoiser's LoRA alone.")
        return _plain_config(file, {key.split(".", 1)[1]: value for key, value in stored.items()})
    own_alpha = any(key.endswith(".alpha") for key in tensors)
    if not tensors or own_alpha or not all(key.startswith(PEFT_PREFIX) for key in tensors):
        return None
    beside = file.with_name("adapter_config.json")
    if not beside.is_file():
        raise UserError(
            f"{file}: is in PEFT's layout, which keeps lora_alpha in adapter_config.json, and there is none beside it. "
            "Copy that file there; without it the strength of the LoRA is not known."
        )
    from peft import LoraConfig, PeftConfig

    _plain_config(beside, json.loads(beside.read_text(encoding="utf-8")))  # before peft wants packages for some kinds
    config = PeftConfig.from_pretrained(str(beside.parent))
    if not isinstance(config, LoraConfig):
        raise UserError(f"{beside}: is not a LoRA (peft_type {config.peft_type}). Merge it first.")
    return _plain_config(beside, config.to_dict())


def _plain_config(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config, so that peft begins with nothing that costs or changes the base: the tensors come from the file.

    Raises UserError for what is more than A and B, and for A and B that are relative to a base that peft rewrote.
    """
    from peft import LoraConfig

    variants = [field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    more = [name for name in (*variants, "modules_to_save") if config.get(name)]
    if more:
        raise UserError(f"{source}: is not a plain LoRA, it has {', '.join(more)}. Merge it first.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in INITS:
        raise UserError(
            f"{source}: has init_lora_weights = {init!r}. Such a LoRA begins by taking something out of the base's own "
            "weights, which student and teachers share, so its matrices are no difference to that base. Save it "
            "converted to a plain one (peft: save_pretrained with path_initial_model_for_weight_conversion), or merge "
            "it into a full checkpoint, form = 'full'."
        )
    return config | ({"init_lora_weights": True, "eva_config": None} if init in INITS[1:] else {})


def _by_diffusers(layers: dict[str, Layer], pipeline: Any) -> dict[str, Layer] | None:
    """Layers renamed by the converter of the pipeline's class; None where it does not know them or loses anything."""
    if not hasattr(type(pipeline), "lora_state_dict"):
        return None
    even = {name: _evened(layer) for name, layer in layers.items()}  # else a small layer could be lost unseen
    for spelled, evened in zip(_spellings(layers), _spellings(even), strict=True):
        own = _converted(spelled, pipeline)
        if own and _is_whole(own, layers) and _is_whole(_converted(evened, pipeline) or {}, even):
            return own
    return None


def _evened(layer: Layer) -> Layer:
    """The layer with a delta of size 1, whatever it has; one without any, as a layer is before training, gets one."""
    squared = layer.squared_norm()
    if squared <= 1e-12 * layer.scale**2 * float(layer.down.double().norm() * layer.up.double().norm()) ** 2:
        return _evened(Layer(torch.ones_like(layer.down), torch.ones_like(layer.up)))
    return replace(layer, scale=layer.scale / squared**0.5)


def _is_whole(found: dict[str, Layer], given: dict[str, Layer]) -> bool:
    """Whether the deltas of a converter's layers are together as large as those that it was given."""
    size, expected = (sum(layer.squared_norm() for layer in layers.values()) for layers in (found, given))
    return abs(size - expected) <= CLOSE * expected


def _converted(tensors: dict[str, Tensor], pipeline: Any) -> dict[str, Layer] | None:
    """What diffusers makes of the tensors, by module of the denoiser; None where that is not what it makes."""
    converted = _convert(tensors, pipeline)
    return match(converted, denoiser_of(pipeline), denoiser_name(pipeline)) if converted else None


def _spellings(layers: dict[str, Layer]) -> list[dict[str, Tensor]]:
    """The file's tensors, scale applied, as sd-scripts, as ComfyUI and as diffusers would name them."""
    spelled: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, layer in layers.items():
        up, down = layer.up.float() * layer.scale, layer.down.float()
        bare = name.removeprefix("model.").removeprefix("diffusion_model.").removeprefix(PEFT_PREFIX)
        flat = bare if bare.startswith("lora_") else "lora_unet_" + bare.replace(".", "_")
        for number, (stem, (first, second)) in enumerate(
            ((flat, PAIRS[3]), (f"diffusion_model.{bare}", PAIRS[5]), (name, PAIRS[5] if "." in name else PAIRS[3]))
        ):
            spelled[number] |= {stem + first: down, stem + second: up}
    return spelled


def _convert(tensors: dict[str, Tensor], pipeline: Any) -> dict[str, Layer] | None:
    """What diffusers makes of the tensors, None where it refuses or leaves something that is not a pair."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    is_unet = denoiser_name(pipeline) == "unet"
    options = {"unet_config": denoiser_of(pipeline).config} if is_unet else {}
    try:
        found = type(pipeline).lora_state_dict(dict(tensors), **options)
        state = found[0] if isinstance(found, tuple) else found
        state = convert_unet_state_dict_to_peft(state) if is_unet else state
        return {name: Layer(*pair) for name, pair in paired(Path("converted"), state).items()}
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, UserError):
        return None  # another implementation's names: the caller says so, with the file's own names


def _unknown_layers(file: Path, layers: dict[str, Layer], pipeline: Any) -> str:
    component, kind = denoiser_name(pipeline), type(denoiser_of(pipeline)).__name__
    alone = [name for name in layers if match({name: 0}, denoiser_of(pipeline), component) is None]
    first = alone[0] if alone else next(iter(layers))
    return (
        f"{file}: does not fit the base: {len(alone)} of its {len(layers)} layers are not in the {component} ({kind}) "
        f"and diffusers' conversion does not keep them all, the first is {first}. Take a LoRA "
        "of this base, in PEFT's, diffusers', kohya's or ComfyUI's layout."
    )


__all__ = [
    "Layer",
    "Lora",
    "match",
    "paired",
    "ranks_said",
    "read_layers",
    "read_lora",
    "refuse_others",
    "without_text_encoder",
]
