"""The forms an export may have, and how each is written: folder, LoRA, LoRA for ComfyUI and kohya, one file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffopd.dialects import Layer
from diffopd.drive import denoiser_name, denoiser_of
from diffopd.errors import UserError
from diffopd.load import LORA_FILE, fuse_adapter, student_with_adapter
from diffopd.locate import find_pipeline
from diffopd.recipe import Recipe
from diffopd.single_file import write_single_file
from diffopd.stranger import Form
from diffopd.teacher import weights_sha256

FOLDERS = {"diffusers": "pipeline", "lora": "lora", "kohya": "kohya", "single-file": "single-file"}  # in export/
FORMATS = tuple(FOLDERS)
# Largest difference of a pixel in [0, 1]. The same weights may be summed in another order where they lie otherwise in
# memory (3e-7 was seen); a LoRA is added to each layer's output instead of being fused into its weights.
ALLOWED = {"diffusers": 1e-5, "single-file": 1e-5, "lora": 1e-3, "kohya": 1e-3}
COMFYUI_READS = (  # transformers whose diffusers names ComfyUI knows in LoRA files
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
)


@dataclass(frozen=True)
class Deployed:
    """The student to export: adapter fused; its layers as they were before, empty where all weights were trained."""

    recipe: Recipe
    checkpoint: Path
    pipeline: Any
    layers: dict[str, Layer]

    def digest(self) -> str:
        """sha256 of the checkpoint's deployable weights."""
        return weights_sha256(self.checkpoint / (LORA_FILE if self.layers else denoiser_name(self.pipeline)))


def deployed(run: Path, recipe: Recipe, checkpoint: Path) -> Deployed:
    """The student of a run's checkpoint. Raises UserError as `student_pipeline`."""
    pipeline = student_with_adapter(run)
    layers = adapter_layers(denoiser_of(pipeline))
    if layers:
        fuse_adapter(pipeline)
    return Deployed(recipe, checkpoint, pipeline, layers)


def check_formats(formats: list[str], recipe: Recipe) -> list[str]:
    """The formats to write, each once; without any, the folder and, for a LoRA student, its LoRA.

    Raises UserError for a LoRA format of a student that is none.
    """
    is_lora = recipe.student.train == "lora"
    for name in formats:
        if name in ("lora", "kohya") and not is_lora:
            raise UserError(
                f'--format {name}: this student was trained whole (student.train = "full") and has no LoRA. Take '
                "diffusers or single-file."
            )
    return list(dict.fromkeys(formats)) or ["diffusers", *(["lora"] if is_lora else [])]


def form_of(name: str, student: Deployed, folder: Path) -> Form:
    """How a stock client loads one format below `folder`, written or yet to be."""
    place, recipe = folder / FOLDERS[name], student.recipe
    if name == "diffusers":
        return Form(name, str(place))
    onto = {
        "folder": str(find_pipeline(recipe.student.pretrained_model_name_or_path)),
        "scheduler": recipe.student.scheduler,
    }
    file = str(place / (LORA_FILE if name == "lora" else f"{recipe.name}.safetensors"))
    if name == "single-file":
        return Form(name, **onto, file=file, pipeline_class=type(student.pipeline).__name__)
    return Form(name, **onto, lora=file)


def write_form(name: str, student: Deployed, folder: Path) -> Form:
    """Write one format below `folder`; returns how a stock client loads it. Raises UserError where it cannot be."""
    form = form_of(name, student, folder)
    if name == "diffusers":
        student.pipeline.save_pretrained(form.folder, safe_serialization=True)
        keep_tokenizer_files(Path(form.folder))
    elif name == "single-file":
        write_single_file(student.pipeline, Path(form.file))
    elif name == "kohya":
        write_kohya(student, Path(form.lora))
    else:
        Path(form.lora).parent.mkdir()
        shutil.copy(student.checkpoint / LORA_FILE, form.lora)
    return form


def adapter_layers(denoiser: torch.nn.Module) -> dict[str, Layer]:
    """Module -> layer of the one adapter that a denoiser carries, with peft's own scale."""
    found = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, BaseTunerLayer):
            (adapter,) = module.lora_A
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            found[name] = Layer(down.detach().clone(), up.detach().clone(), module.scaling[adapter])
    return found


def write_kohya(student: Deployed, file: Path) -> Path:
    """The LoRA as ComfyUI and tools of the sd-scripts family read it.

    UNets: lora_unet_ keys with .alpha (where layers differ in alpha / rank or rank, the scale is in lora_up instead and
    alpha = rank is left out: diffusers reads one alpha for all). Transformers: diffusers' names with the scale in
    lora_B, which diffusers and ComfyUI both read. Raises UserError for transformers that ComfyUI reads otherwise.
    """
    from safetensors.torch import save_file

    kind = type(denoiser_of(student.pipeline)).__name__
    if denoiser_name(student.pipeline) == "unet":
        tensors = kohya_tensors(student.layers)
    elif kind in COMFYUI_READS:
        tensors = {}
        for name, layer in student.layers.items():
            tensors[f"transformer.{name}.lora_A.weight"] = layer.down
            tensors[f"transformer.{name}.lora_B.weight"] = layer.up * layer.scale
    else:
        raise UserError(
            f"--format kohya: no LoRA layout of {kind} is known that ComfyUI and diffusers both read (there is one for "
            f"UNets and {', '.join(COMFYUI_READS)}). Take lora."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return file


def kohya_tensors(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    """lora_unet_ keys of a UNet's layers; their .alpha where it is one for all layers."""
    is_uniform = len({(layer.scale, layer.down.shape[0]) for layer in layers.values()}) == 1
    tensors = {}
    for name, layer in layers.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up if is_uniform else layer.up * layer.scale
        if is_uniform:
            tensors[f"{stem}.alpha"] = torch.tensor(layer.scale * layer.down.shape[0])
    return tensors


def keep_tokenizer_files(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 5 writes only the latter, clients on 4.x fail."""
    for target in sorted(folder.glob("tokenizer*")):
        if (target / "vocab.json").is_file() or not (target / "tokenizer.json").is_file():
            continue
        model = json.loads((target / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
        if model.get("type") == "BPE":
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
            (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
