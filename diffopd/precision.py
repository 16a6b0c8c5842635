"""Frozen weights in bfloat16, everything between two network evaluations in float32.

A stock pipeline in bfloat16 also rounds its states after every step. Here a denoiser takes float32 states, computes
in the dtype of its weights and answers in float32, so guidance, scheduler and objective see float32 on both sides. The
same holds for float32 weights under autocast, whose answers would be bfloat16.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def component_dtypes(frozen_dtype: str) -> torch.dtype | dict[str, torch.dtype]:
    """The dtype of each component as `from_pretrained` takes it; the VAE, small and sensitive, stays in float32."""
    dtype = DTYPES[frozen_dtype]
    return dtype if dtype is torch.float32 else {"default": dtype, "vae": torch.float32}


def answer_in_float32(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """From now on the denoiser takes inputs of any floating dtype, computes in `dtype` and answers in float32.

    Times and positions are left as they are: networks embed them in float32 themselves.
    """
    names = list(inspect.signature(denoiser.forward).parameters)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cast = [_cast(value, dtype, name) for name, value in zip(names, args, strict=False)]
        return (*cast, *args[len(names) :]), {name: _cast(value, dtype, name) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, torch.float32)

    denoiser.register_forward_pre_hook(enter, with_kwargs=True)
    denoiser.register_forward_hook(leave)


def _cast(value: Any, dtype: torch.dtype, name: str = "") -> Any:
    """Floating tensors of two dimensions or more in `dtype`, however deep in lists, dicts and output objects."""
    if name.startswith("timestep") or name.endswith("ids"):
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**_cast(vars(value), dtype))
    if isinstance(value, dict):  # diffusers' output objects are dicts as well
        cast = {key: _cast(item, dtype, str(key)) for key, item in value.items()}
        return cast if type(value) is dict else type(value)(**cast)
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (list, tuple) else value
