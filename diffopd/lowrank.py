"""Deltas of a base cut to a rank: truncated SVD per layer, with the error that the cut leaves.

A full checkpoint becomes a LoRA of its base; the average of several LoRAs becomes what a student begins from.

A LoRA holds the weights of linear and convolution layers. Whatever else differs (norms, biases, embeddings) stays as
the base has it and is counted as error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffopd.drive import denoiser_name, denoiser_of
from diffopd.errors import UserError
from diffopd.load import load_lora
from diffopd.teacher import TeacherCard

AVERAGED = "averaged"  # name of the adapter that is being read


@dataclass(frozen=True)
class LayerDelta:
    """One layer: rank kept, Frobenius norms of its delta and of what the cut leaves of it."""

    rank: int
    norm: float
    left: float

    @property
    def error(self) -> float:
        """Relative error of the delta."""
        return self.left / self.norm


@dataclass
class LowRank:
    """layers: name -> its delta. kept_out: parameter -> norm of a delta that no LoRA holds.

    factors: layer -> (A (r, inputs, ...), B (outputs, r, ...)) with delta = B A.
    """

    layers: dict[str, LayerDelta] = field(default_factory=dict)
    kept_out: dict[str, float] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """|teacher - (base + delta)| / |teacher - base| over all parameters, 0 where nothing differs."""
        return _relative([layer.left for layer in self.layers.values()], self)


def low_rank(base: nn.Module, teacher: nn.Module, rank: int) -> LowRank:
    """The best delta of this rank (Eckart-Young) from `base` to `teacher`, layer by layer, in float32.

    Raises UserError where the two are not of one architecture.
    """
    mine, others = dict(base.named_parameters()), dict(teacher.named_parameters())
    different = [n for n in {*mine, *others} if n not in mine or n not in others or mine[n].shape != others[n].shape]
    if different:
        raise UserError(
            f"{min(different)} is absent or of another shape in one of the two ({len(different)} such parameters). "
            "Base and teacher must be of one architecture."
        )
    found, adaptable = LowRank(), dict(_adaptable(base))
    for name, parameter in mine.items():
        delta = others[name].detach().float().to(parameter.device) - parameter.detach().float()
        layer = name.removesuffix(".weight")
        if not bool(delta.any()):
            continue
        if name.endswith(".weight") and layer in adaptable:
            a, b, found.layers[layer] = _cut(delta, rank)
            found.factors[layer] = a, b
        else:
            found.kept_out[name] = float(delta.double().norm())
    return found


def average_delta(base: Any, cards: Sequence[TeacherCard]) -> dict[str, Tensor]:
    """layer -> the mean over LoRA teachers of what each adds to its weight, in float32 on the CPU.

    This is the weight average of the teachers (a "soup") as a delta of their common base, which has no adapter before
    and after. Raises UserError for a teacher that is no LoRA.
    """
    mean: dict[str, Tensor] = {}
    for card in cards:
        if card.form != "lora":
            raise UserError(
                f'teacher {card.name!r} is of form "{card.form}", and only LoRA teachers are averaged. Convert it with '
                'scripts/lowrank_teacher.py, or set student.begin_from = "base".'
            )
        load_lora(base, card, adapter_name=AVERAGED)
        for name, layer in denoiser_of(base).named_modules():
            if isinstance(layer, BaseTunerLayer) and AVERAGED in layer.lora_A:
                delta = layer.get_delta_weight(AVERAGED).float().cpu() / len(cards)
                mean[name] = mean[name] + delta if name in mean else delta
        base.unload_lora_weights()
    return mean


def begin_at(denoiser: nn.Module, adapter_name: str, delta: dict[str, Tensor]) -> float:
    """Set a fresh adapter to the best approximation of `delta` that its rank holds; returns the relative error.

    Directions of the rank that the delta does not need stay as they were (B = 0), so they can still be learnt.
    Raises UserError for a delta on layers that the adapter does not have.
    """
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, BaseTunerLayer) and adapter_name in m.lora_A}
    absent = sorted(set(delta) - set(layers))
    if absent:
        raise UserError(
            f"the teachers change {absent[0]} (and {len(absent) - 1} other layers) on which the student has no LoRA, "
            "so their average would be cut. Add these layers to student.target_modules."
        )
    cut = []
    for name, change in delta.items():
        a, b = layers[name].lora_A[adapter_name].weight, layers[name].lora_B[adapter_name].weight
        down, up, kept = _cut(change, a.shape[0])
        cut.append(kept)
        scale = layers[name].scaling[adapter_name] ** 0.5
        a.data[: kept.rank] = down.to(a) / scale
        b.data[:, : kept.rank] = up.to(b) / scale
    return _relative([kept.left for kept in cut], LowRank(dict(zip(delta, cut, strict=True))))


def _adaptable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers whose delta a LoRA can hold."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield name, layer


def _cut(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, LayerDelta]:
    """Factors of the best approximation, of the delta's own rank if that is less; each gets the root of the values."""
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    needed = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())  # matrix rank; none for a delta of zeros
    rank = min(rank, needed)
    root = s[:rank].sqrt()
    a = (root[:, None] * v[:rank]).reshape(rank, *delta.shape[1:])
    b = (u[:, :rank] * root).reshape(delta.shape[0], rank, *[1] * (delta.ndim - 2))
    left = LayerDelta(rank, float(s.double().norm()), float(s[rank:].double().norm()))
    return a.contiguous().cpu(), b.contiguous().cpu(), left


def _relative(left: list[float], found: LowRank) -> float:
    outside = sum(norm**2 for norm in found.kept_out.values())
    whole = outside + sum(layer.norm**2 for layer in found.layers.values())
    return ((outside + sum(norm**2 for norm in left)) / whole) ** 0.5 if whole else 0.0


def save_lora(found: LowRank, pipeline: Any, folder: Path) -> Path:
    """Write the delta as a diffusers LoRA for the pipeline's denoiser, with its metadata; returns the file.

    Raises UserError where no layer differs.
    """
    from peft import LoraConfig

    if not found.layers:
        raise UserError("No linear or convolution layer differs from the base: there is nothing to write as a LoRA.")
    ranks = {name: layer.rank for name, layer in found.layers.items()}
    highest = max(ranks.values())
    lower = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != highest}
    config = LoraConfig(
        r=highest,
        lora_alpha=highest,
        target_modules=f"^({'|'.join(map(re.escape, ranks))})$",
        rank_pattern=lower,
        alpha_pattern=lower,
    )
    layers = {}
    for name, (a, b) in found.factors.items():
        layers |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    part = denoiser_name(pipeline)
    options = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config.to_dict()}
    type(pipeline).save_lora_weights(str(folder), **options)
    return folder / "pytorch_lora_weights.safetensors"


def reloaded_error(found: LowRank, denoiser: nn.Module, teacher: nn.Module, adapter_name: str) -> float:
    """The relative error once more, from a denoiser that carries the written file as an adapter."""
    others, left = dict(teacher.named_parameters()), []
    for name in found.layers:
        layer = denoiser.get_submodule(name)
        target = others[f"{name}.weight"].detach().float()
        held = layer.base_layer.weight.detach().float() + layer.get_delta_weight(adapter_name).float()
        left.append(float((target - held.to(target.device)).double().norm()))
    return _relative(left, found)
