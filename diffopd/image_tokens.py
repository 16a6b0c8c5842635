"""An IP-Adapter for one side only: a second UNet over the same parameters, with image tokens in its attention.

The student's UNet keeps its own attention processors and its config, so nothing of the adapter is in its walk or in an
export. Both UNets hold the very same parameter objects: what is trained is seen by both.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffopd.adapters import AdapterSwitch
from diffopd.context import ContextSettings, covers
from diffopd.data import PromptRow
from diffopd.drive import Call, denoiser_name, denoiser_of, shell
from diffopd.errors import UserError
from diffopd.image_file import picture
from diffopd.locate import HubId, download, parse_hub_id
from diffopd.parts import replaced_attribute

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def mirror(module: nn.Module) -> nn.Module:
    """A second tree of modules over the same parameters and buffers; children, hooks and config are its own.

    Raises RuntimeError for a module whose forward was replaced: the mirror's would compute the original's children.
    """
    if "forward" in vars(module):
        raise RuntimeError(f"{type(module).__name__} has a replaced forward; mirror it before that.")
    other = copy.copy(module)
    vars(other)["_modules"] = {name: child and mirror(child) for name, child in module._modules.items()}
    for name in HOOKS:
        vars(other)[name] = copy.copy(vars(module)[name])
    config = vars(module).get("_internal_dict")
    if config is not None:
        vars(other)["_internal_dict"] = type(config)(dict(config))
    return other


class ImageTokens:
    """Each row's own picture as IP-Adapter image embeddings, computed once a picture and kept on the CPU."""

    rows_per_call: int | None = None

    def __init__(self, pipeline: Any, guidance_scale: float) -> None:
        self._pipeline = pipeline
        pipeline._guidance_scale = guidance_scale  # the call sets the same; the pipeline itself says what follows
        self._is_guided: bool = pipeline.do_classifier_free_guidance
        self._prepare = pipeline.prepare_ip_adapter_image_embeds
        # Stock calls show every picture that they are given to each of their prompts. Ours come with a row each.
        pipeline.prepare_ip_adapter_image_embeds = _as_given
        self._known: dict[str, list[Tensor]] = {}

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """The rows' own prompts."""
        return [row.prompt for row in rows]

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """ip_adapter_image_embeds: per adapter (B, 1, ...), under guidance (2B, 1, ...), the empty ones first."""
        of_rows = [self._embeds(row.metadata["file_name"]) for row in rows]
        device = denoiser_of(self._pipeline).device
        embeds = []
        for pairs in zip(*of_rows, strict=True):  # one adapter, a (2, 1, ...) tensor per row
            empty, seen = (torch.cat([pair[side : side + 1] for pair in pairs]) for side in (0, 1))
            embeds.append((torch.cat([empty, seen]) if self._is_guided else seen).to(device))
        return {"ip_adapter_image_embeds": embeds}

    def covers(self, row: PromptRow) -> bool:
        """Whether the row names a picture."""
        return covers("ip_adapter", row)

    def _embeds(self, file: str) -> list[Tensor]:
        if file not in self._known:
            device = self._pipeline.image_encoder.device
            with torch.no_grad():
                found = self._prepare([picture(file)], None, device, 1, True)
            self._known[file] = [embeds.cpu() for embeds in found]
        return self._known[file]


def _as_given(ip_adapter_image: None, ip_adapter_image_embeds: list[Tensor], *rest: Any) -> list[Tensor]:
    return ip_adapter_image_embeds


def with_image_tokens(
    call: Call, settings: ContextSettings, adapter: str | None, place: str
) -> tuple[Call, ImageTokens]:
    """A teacher's call on a UNet of its own over the same parameters, with the IP-Adapter of `settings` on it.

    adapter: the LoRA that answers on this side, None for none. Raises UserError for files that are missing, not
    .safetensors, or do not fit.
    """
    pipeline = shell(call.pipeline)
    unet = mirror(denoiser_of(call.pipeline))
    pipeline.register_modules(**{denoiser_name(pipeline): unet})
    _load(pipeline, settings, place)
    switch = AdapterSwitch(unet)
    binding: partial[AbstractContextManager] = partial(switch.bound, adapter)
    tokens = ImageTokens(pipeline, call.arguments["guidance_scale"])
    return Call(pipeline, call.arguments, binding), tokens


def _load(pipeline: Any, settings: ContextSettings, place: str) -> None:
    from transformers import CLIPVisionModelWithProjection

    weights = _adapter_file(settings.ip_adapter, place)
    folder = _folder(settings.image_encoder, ["*.safetensors", "*.json"])
    unet = denoiser_of(pipeline)
    home = {"device": unet.device, "dtype": unet.dtype}
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True, dtype=unet.dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: image_encoder {folder} cannot be loaded: {_line(error)}") from error
    # The feature extractor is made anew, for this encoder's size.
    pipeline.register_modules(image_encoder=encoder.to(unet.device), feature_extractor=None)
    try:  # the library moves the whole UNet at the end: it would round float32 adapters, which both UNets share
        with replaced_attribute(unet, "to", lambda *_, **__: unet):
            pipeline.load_ip_adapter(_state(weights), subfolder="", weight_name="")
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{place}: the IP-Adapter {weights} does not fit the base's {type(unet).__name__}: {_line(error)}. Take "
            "one that was made for this base."
        ) from error
    pipeline.set_ip_adapter_scale(1.0 if settings.scale is None else settings.scale)
    processors = [p for p in unet.attn_processors.values() if isinstance(p, nn.Module)]
    for module in (encoder, unet.encoder_hid_proj, *processors):
        module.to(**home).requires_grad_(False).eval()


def _state(file: Path) -> dict[str, dict[str, Tensor]]:
    """The two parts of an IP-Adapter file. Raises ValueError for a file that holds anything else."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    with safe_open(file, "pt") as opened:
        for key in opened.keys():
            part, _, name = key.partition(".")
            if part not in state:
                raise ValueError(f"it holds {key}, which is no part of an IP-Adapter")
            state[part][name] = opened.get_tensor(key)
    if not all(state.values()):
        raise ValueError("it holds no IP-Adapter (keys image_proj.* and ip_adapter.*)")
    return state


def _adapter_file(spec: str, place: str) -> Path:
    """A local .safetensors file, the only one of a folder, or one on the hub (owner/repo/folder/file@revision)."""
    local = Path(spec).expanduser()
    hub = None if local.exists() else parse_hub_id(spec)
    if hub and hub.subfolder.endswith(".safetensors"):
        parent, _, name = hub.subfolder.rpartition("/")
        return download(HubId(hub.repo, parent, hub.revision), [name]) / name
    folder = download(hub, ["*.safetensors"]) if hub else local
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise UserError(
            f"{place}: ip_adapter {spec!r} is not one .safetensors file ({len(files)} found). Name the file itself; "
            "pickled weights (.bin) are never loaded."
        )
    return files[0]


def _folder(spec: str, patterns: list[str]) -> Path:
    local = Path(spec).expanduser()
    hub = None if local.exists() else parse_hub_id(spec)
    return download(hub, patterns) if hub else local


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
