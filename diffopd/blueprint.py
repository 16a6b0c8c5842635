"""What a pipeline folder is, from its configs and safetensors headers alone: no weight is read.

Sizes that depend on the architecture are measured on the meta device, where tensors have shapes but no data.
"""

from __future__ import annotations

import inspect
import json
import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopd.errors import UserError
from diffopd.locate import find_pipeline, shipped_configs
from diffopd.teacher import file_sha256

if TYPE_CHECKING:
    from torch import nn

CONFIG_PATTERNS = ["*.json", "*/*.json", "*/*.txt"]
LOADED = (".safetensors", ".json", ".txt")
WEIGHTS = (  # what diffusers and transformers load a model's folder from, by name; the first that is there
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
BYTES = 4  # of a float32
NOT_IN_TRAINING = ("safety_checker",)  # components that training loads without: what it does to pictures is no lesson


@dataclass(frozen=True)
class Blueprint:
    """A pipeline folder: its class, and the config of every component (component name -> config).

    classes: component -> (library, class) as model_index.json says; options: its plain settings (is_distilled, ...).
    """

    folder: Path
    pipeline_class: str
    configs: dict[str, dict[str, Any]]
    classes: dict[str, tuple[str, str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        """ "unet" or "transformer"."""
        return "unet" if "unet" in self.configs else "transformer"

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's config."""
        return self.configs[self.denoiser]

    @cached_property
    def meta_denoiser(self) -> nn.Module:
        """The denoiser's modules with shapes and no data."""
        return build_on_meta(self.denoiser_config)

    @property
    def is_video(self) -> bool:
        """Whether the pipeline draws frames instead of pictures."""
        import diffusers

        return is_video(getattr(diffusers, self.pipeline_class))

    def num_parameters(self) -> int:
        """Parameters of the denoiser."""
        return sum(parameter.numel() for parameter in self.meta_denoiser.parameters())

    def component_sizes(self) -> dict[str, int]:
        """component -> its numbers: of its .safetensors files where there are some, else of its config on meta."""
        files = self.weight_files()
        held = {name: sum(map(num_values, files[name])) for name in files}
        for name, config in self.configs.items():
            if name not in held and "scheduler" not in name:
                model = self.meta_denoiser if name == self.denoiser else build_component(self.classes[name], config)
                held[name] = num_stored(model)
        return held

    def weight_files(self) -> dict[str, list[Path]]:
        """component -> the .safetensors files that it is loaded from, for components that have them all."""
        found = {name: loaded_weights(self.folder / name) for name in self.configs}
        return {name: files for name, files in found.items() if files}


def read_blueprint(name: str, *, shipped: bool = False) -> Blueprint:
    """The blueprint of a base by shelf name, path or hub id (of which only the configs are downloaded).

    shipped: for a hub id take the configs that come with diffopd, if it has them, and ask no network.
    Raises UserError for a folder without model_index.json, with broken JSON, or without a denoiser.
    """
    folder = shipped_configs(name) if shipped else None
    folder = folder or find_pipeline(name, patterns=CONFIG_PATTERNS)
    index = read_json(folder / "model_index.json")
    configs, classes, options = {}, {}, {}
    for component, value in index.items():
        if component.startswith("_"):
            continue
        if not isinstance(value, list):
            options[component] = value
            continue
        if value[0] is None:
            continue
        classes[component] = (value[0], value[1])
        for file in ("config.json", "scheduler_config.json"):
            if (folder / component / file).is_file():
                configs[component] = read_json(folder / component / file)
    if not {"unet", "transformer"} & set(configs):
        raise UserError(f"{folder}: the pipeline has no unet and no transformer with a config.json. Save it anew.")
    kind = index.get("_class_name")
    return Blueprint(folder, kind[-1] if isinstance(kind, list) else str(kind), configs, classes, options)


def loaded_weights(folder: Path) -> list[Path]:
    """The .safetensors files that a component is loaded from: one file or the shards of its index, never a variant's.

    Empty where there is none, or where a shard is missing.
    """
    named = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if named is None or named.suffix == ".safetensors":
        return [named] if named else []
    shards = sorted({folder / name for name in read_json(named).get("weight_map", {}).values()})
    return shards if all(shard.is_file() for shard in shards) else []


def without_weights(folder: Path) -> list[str]:
    """Components of a pipeline folder that have a model's config and nothing that it would be loaded from."""
    models = [path.parent for path in sorted(folder.glob("*/config.json")) if "tokenizer" not in path.parent.name]
    return [model.name for model in models if not loaded_weights(model)]


def is_video(pipeline_class: type) -> bool:
    """Whether the pipeline returns frames instead of images: its call's documented choice of their number."""
    return "num_frames" in inspect.signature(pipeline_class.__call__).parameters


def pipeline_hashes(folder: Path) -> dict[str, str]:
    """component/file -> sha256 of all that a pipeline folder is loaded from: weights, configs, tokenizer files."""
    held = [path for path in sorted(folder.glob("*/*")) if path.suffix in LOADED]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in held}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Save the pipeline anew.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}). Save the pipeline anew.") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a .safetensors file, from its header. Raises UserError for a broken one."""
    with path.open("rb") as file:
        start = file.read(8)
        length, size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0, path.stat().st_size
        text = file.read(length) if 0 < length <= size else b""
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a safetensors file (its header is broken). Save or copy it anew.") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    ends = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if ends > size:
        raise UserError(f"{path}: is cut short ({size:,} of {ends:,} bytes). Save or copy it anew.")
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


def num_stored(model: nn.Module) -> int:
    """How many numbers a model's file holds: its parameters, each once, and the buffers that are saved with them."""
    return sum({id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}.values())


def num_values(path: Path) -> int:
    """How many numbers a .safetensors file holds."""
    return sum(math.prod(shape) for shape in tensor_shapes(path).values())


def build_on_meta(config: dict[str, Any]) -> nn.Module:
    """A diffusers model of this config on the meta device, frozen. Raises UserError for an unknown class."""
    import diffusers
    from accelerate import init_empty_weights

    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"denoiser class {name!r} is not one of the installed diffusers ({diffusers.__version__}).")
    with init_empty_weights(include_buffers=True):
        return kind.from_config(config).requires_grad_(False)


def build_component(library_and_class: tuple[str, str], config: dict[str, Any]) -> nn.Module:
    """Any component of a pipeline on the meta device. Raises UserError for a class that is not installed."""
    import importlib

    import diffusers
    import torch

    library, name = library_and_class
    known = library in ("diffusers", "transformers")
    module = importlib.import_module(library) if known else getattr(diffusers.pipelines, library, None)
    kind = getattr(module, name, None)
    if kind is None:
        raise UserError(f"model_index.json names {library}.{name}, which is not installed. Install a newer {library}.")
    with torch.device("meta"):
        if known and library == "diffusers":
            return kind.from_config(config).requires_grad_(False)
        model = kind(kind.config_class.from_dict(config)).requires_grad_(False)
    model.tie_weights()  # what the constructor shares is two tensors on the meta device
    return model


def lora_shapes(path: Path, denoiser: str) -> dict[str, tuple[int, int]]:
    """Module -> (inputs, outputs) of an adapter's layers for `denoiser`; empty for a layout not read here."""
    shapes, found = tensor_shapes(path), {}
    for name, shape in shapes.items():
        if name.startswith(f"{denoiser}.") and name.endswith(".lora_A.weight"):
            module = name.removeprefix(f"{denoiser}.").removesuffix(".lora_A.weight")
            outputs = shapes.get(name.replace(".lora_A.", ".lora_B."), (0,))
            found[module] = (shape[1], outputs[0])
    return found


def misfit(path: Path, blueprint: Blueprint) -> str | None:
    """Why a LoRA file does not fit the base, None where it does or where its layout is left to the loader."""
    other = "transformer" if blueprint.denoiser == "unet" else "unet"
    layers = lora_shapes(path, blueprint.denoiser)
    if not layers and lora_shapes(path, other):
        return f"its layers are for a {other}, the base has a {blueprint.denoiser}"
    for name, (inputs, outputs) in layers.items():
        weight = dict(blueprint.meta_denoiser.named_parameters()).get(f"{name}.weight")
        if weight is None:
            return f"its layer {name} does not exist in the base's {blueprint.denoiser}"
        if (weight.shape[1], weight.shape[0]) != (inputs, outputs):
            expected = f"{weight.shape[1]} -> {weight.shape[0]}"
            return f"its layer {name} is {inputs} -> {outputs}, the base's is {expected}"
    return None


def add_lora_on_meta(denoiser: nn.Module, rank: int, targets: list[str] | str) -> int:
    """Put an adapter on a meta denoiser; returns its parameter count. ValueError when nothing matches."""
    from accelerate import init_empty_weights
    from peft import LoraConfig

    with init_empty_weights(include_buffers=True):
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name="student")
    return sum(p.numel() for name, p in denoiser.named_parameters() if ".lora_" in name)


def add_adapter_like(denoiser: nn.Module, component: str, ranks: dict[str, int]) -> bool:
    """Put an adapter on a meta denoiser with the layers of a LoRA file, name there -> rank.

    False, and nothing is put, where the file does not name them as the denoiser does, in whatever spelling.
    """
    from accelerate import init_empty_weights
    from peft import LoraConfig

    from diffopd.dialects import match

    own = match(ranks, denoiser, component)
    if own is None:
        return False
    rank = max(own.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(own), rank_pattern=own)
    with init_empty_weights(include_buffers=True):
        denoiser.add_adapter(config, adapter_name="student")
    return True
