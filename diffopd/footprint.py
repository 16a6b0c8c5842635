"""What a run holds in memory, counted from configs and safetensors headers, and what is unsure of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopd.blueprint import (
    BYTES,
    NOT_IN_TRAINING,
    add_adapter_like,
    add_lora_on_meta,
    build_component,
    num_stored,
    num_values,
    tensor_shapes,
)
from diffopd.context import NETWORK
from diffopd.dialects import paired, ranks_said
from diffopd.fit_check import lora_size
from diffopd.grid import make_scheduler, side_arguments
from diffopd.preflight import Parts
from diffopd.recipe import Recipe
from diffopd.teacher import TeacherCard, hub_weights, lora_file, weight_files

if TYPE_CHECKING:
    import torch
    from torch import nn

TEXT_ENCODER = "text_encoder"  # how the names of text encoders begin
# Bits of a quantised weight with its scales: bitsandbytes' nf4 keeps a float32 for each 64 weights, int8 one a row.
BITS = {"bnb-4bit": 4.5, "bnb-8bit": 8.0, "torchao-int8": 8.0, "bitsandbytes_4bit": 4.5, "bitsandbytes_8bit": 8.0}
QUANTO_BITS = {"float8": 8.0, "int8": 8.0, "int4": 4.5, "int2": 2.5}  # `weights_dtype` of quant_backend "quanto"
# A LoRA on the hub is taken to have these, which published few-step ones of UNets share. Counted so in float16,
# latent-consistency's are 135 MB for Stable Diffusion 1.5 and 394 MB for SDXL, which is the size of their files.
STEP_LORA_RANK = 64
STEP_LORA_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
]


@dataclass(frozen=True)
class Footprint:
    """trained: parameters that are trained; adapter: the rank of a LoRA that training starts from, "" without one.

    memory: item -> bytes, without an entry for the graph of a pipeline that cannot be rehearsed. encoding: bytes of the
    encoders that are released before the first update, 0 if none are. evaluating: bytes of what is loaded after the
    last one. unsure: what is taken for granted, a sentence each.
    """

    trained: int
    adapter: str
    memory: dict[str, int]
    encoding: int
    evaluating: int
    unsure: tuple[str, ...]


def footprint(parts: Parts) -> Footprint:
    """What a checked recipe trains and holds while the loop runs."""
    import torch

    from diffopd.precision import DTYPES, answer_in_float32

    recipe, base = parts.recipe, parts.base
    train, frozen = recipe.train, DTYPES[recipe.train.frozen_dtype]
    denoiser, adapter, unsure = copy.deepcopy(base.meta_denoiser if parts.adapted is None else parts.adapted), "", []
    if recipe.student.train == "full":
        trained = base.num_parameters()
        denoiser.requires_grad_(True)
    else:
        denoiser.to(frozen)
        trained, adapter = _with_adapter(recipe, denoiser, base.denoiser, unsure)
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    for settings, card in zip(recipe.teachers, parts.cards, strict=True):
        kind = settings.context.kind if settings.context else None
        if kind in NETWORK:
            named = getattr(settings.context, NETWORK[kind])
            unsure.append(f"not in the sum: with what teacher {card.name} sees pictures ({named})")
    averages = int(train.ema_decay > 0) + sum(card.form == "ema" for card in parts.cards)
    memory = {f"base {name}": size for name, size in _resident(parts, frozen, unsure).items()}
    memory |= {
        "teachers": _teachers(parts, trained, frozen, unsure),
        "trained weights": BYTES * trained,
        "gradients and AdamW": 3 * BYTES * trained,
        "averages": BYTES * trained * averages,
    }
    if frozen is not torch.float32:
        answer_in_float32(denoiser, frozen)
    graph = _graph(parts, denoiser)
    memory |= {"graph of one state": graph} if graph is not None else {}
    memory = {name: size for name, size in memory.items() if size}
    return Footprint(trained, adapter, memory, _encoding(parts, frozen), _evaluating(parts), tuple(unsure))


def _with_adapter(recipe: Recipe, denoiser: nn.Module, component: str, unsure: list[str]) -> tuple[int, str]:
    """The numbers of the student's adapter, and the rank of the file it starts from, if any.

    A new adapter is on the meta denoiser already (`Parts.adapted`); that of a file is put there.
    """
    start, here = recipe.student.init_weights, Path.cwd()
    if start is None:
        return sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad), ""
    if hub_weights(start, here) and component == "unet":
        unsure.append(f"{start} is on the hub: it is taken to be a few-step LoRA of the usual rank {STEP_LORA_RANK}")
        return add_lora_on_meta(denoiser, STEP_LORA_RANK, STEP_LORA_LAYERS), ""
    if hub_weights(start, here):
        unsure.append(f"{start} is on the hub: it is taken to be a LoRA of rank {recipe.student.rank}, student.rank")
        return lora_size(recipe, denoiser), ""
    file = lora_file(start, here, recipe.place("student", "init_weights"))
    shapes = {name: shape for name, shape in tensor_shapes(file).items() if not name.endswith(".alpha")}
    pairs = paired(file, shapes)
    ranks = {name: down[0] for name, (down, _) in pairs.items()}
    if not add_adapter_like(denoiser, component, ranks):
        unsure.append(f"the graph is that of a LoRA of student.rank: {file.name} names its layers in another way")
        lora_size(recipe, denoiser)
    return sum(math.prod(down) + math.prod(up) for down, up in pairs.values()), ranks_said(ranks.values())


def _resident(parts: Parts, frozen: torch.dtype, unsure: list[str]) -> dict[str, int]:
    """component -> bytes, for what stays while the loop runs: released encoders and VAE do not."""
    train, held = parts.recipe.train, parts.base.component_sizes()
    held = {name: size for name, size in held.items() if name not in NOT_IN_TRAINING}
    if train.text_encoders == "released":
        gone = (TEXT_ENCODER,) if parts.recipe.objective.states == "data" else (TEXT_ENCODER, "vae")
        held = {name: size for name, size in held.items() if not name.startswith(gone)}
    bits, components = quantized_bits(parts.recipe.student.quantization, parts.base.denoiser)
    if bits is None:
        unsure.append("how many bits this quantization leaves is not known here: the base is counted as it is on disk")
    found = {}
    for name, size in held.items():
        width = BYTES if name == "vae" else frozen.itemsize  # the VAE stays in float32
        found[name] = size * width
        if bits and name in components:
            inside = _linear_weights(parts, name)
            found[name] = int((size - inside) * width + inside * bits / 8)
    if bits:
        unsure.append(f"all linear layers are taken to be quantized, at {bits:g} bits a weight")
    return found


def _encoding(parts: Parts, frozen: torch.dtype) -> int:
    """Bytes of the text encoders that are released before the first update; they are loaded before the denoiser is."""
    if parts.recipe.train.text_encoders != "released":
        return 0
    sizes = parts.base.component_sizes()
    return frozen.itemsize * sum(size for name, size in sizes.items() if name.startswith(TEXT_ENCODER))


def _evaluating(parts: Parts) -> int:
    """Bytes of what is scored afterwards: base, student and the teachers that have a denoiser of their own."""
    evaluate, base = parts.recipe.evaluate, parts.base
    width, denoiser = (BYTES if evaluate.dtype == "float32" else 2), num_stored(base.meta_denoiser)
    own = [denoiser for card in parts.cards if evaluate.teachers and _has_own(parts, card)]
    teachers = max(own, default=0) if parts.recipe.train.offload_teachers else sum(own)
    apart = denoiser if evaluate.teachers and evaluate.dtype == "float32" else 0  # the student's, its LoRA folded in
    return width * (sum(base.component_sizes().values()) + teachers + apart)


def quantized_bits(quantization: str | Mapping[str, Any], denoiser: str) -> tuple[float | None, tuple[str, ...]]:
    """(bits of a quantised weight, the components that have such): 0 for "none", None where it is not known here."""
    if isinstance(quantization, str):
        return (0.0, ()) if quantization == "none" else (BITS[quantization], (denoiser,))
    backend, components = quantization["quant_backend"], quantization.get("components_to_quantize", [denoiser])
    named = (components,) if isinstance(components, str) else tuple(components)
    if backend == "quanto":
        return QUANTO_BITS.get(quantization.get("quant_kwargs", {}).get("weights_dtype", "int8")), named
    return BITS.get(backend), named


def _linear_weights(parts: Parts, component: str) -> int:
    """Weights (biases aside) of a component's linear layers, which is what the backends quantise."""
    from torch import nn

    base = parts.base
    is_denoiser = component == base.denoiser
    model = base.meta_denoiser if is_denoiser else build_component(base.classes[component], base.configs[component])
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def _teachers(parts: Parts, adapter: int, frozen: torch.dtype, unsure: list[str]) -> int:
    """Bytes that teachers add to the device: adapters all, own denoisers all or, offloaded, the largest alone."""
    sizes = {card.name: _teacher_size(parts, card, adapter, unsure) for card in parts.cards}
    own = [sizes[card.name] * frozen.itemsize for card in parts.cards if _has_own(parts, card)]
    adapters = [sizes[card.name] for card in parts.cards if not _has_own(parts, card)]
    return (max(own, default=0) if parts.recipe.train.offload_teachers else sum(own)) + BYTES * sum(adapters)


def _has_own(parts: Parts, card: TeacherCard) -> bool:
    return card.form == "full" or (card.form == "lora" and parts.recipe.train.fuse_teachers)


def _teacher_size(parts: Parts, card: TeacherCard, adapter: int, unsure: list[str]) -> int:
    """Numbers that a teacher adds; an adapter on the hub, whose size is not known yet, is taken to be `adapter`."""
    if card.weights is None:
        return 0
    if _has_own(parts, card):
        return num_stored(parts.base.meta_denoiser)
    if card.hub_weights:
        unsure.append(f"teacher {card.name} is on the hub: it is taken to be as large as the student's LoRA")
        return adapter
    return sum(num_values(file) for file in weight_files(card.weights_path()))


def _graph(parts: Parts, denoiser: nn.Module) -> int | None:
    """Bytes that the backward of one state of one micro-batch needs; None for a pipeline that cannot be rehearsed.

    With train.fuse_student these are also the folded weights, a second set of those that the adapter covers.
    """
    from diffopd.adapters import fused_forward
    from diffopd.rehearsal import can_rehearse, rehearse

    base, recipe = parts.base, parts.recipe
    arguments = side_arguments(recipe.student, recipe.student.num_inference_steps)
    if not can_rehearse(base, arguments):
        return None
    if recipe.train.gradient_checkpointing:
        denoiser.train()
        denoiser.enable_gradient_checkpointing()
    scheduler = make_scheduler(recipe, base)
    # Under train.mixed_precision activations are smaller than this: it is counted without autocast.
    with fused_forward(denoiser) if recipe.train.fuse_student else nullcontext():
        return rehearse(base, scheduler, arguments, batch_size=recipe.train.batch_size, trained=denoiser).graph_bytes
