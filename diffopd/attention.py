"""Attention backends by diffusers' own names, and the proof that a denoiser really uses the one that was asked for.

`set_attention_backend` is accepted by every diffusers model, but reaches only attention processors that dispatch. Those
of UNets and of Stable Diffusion 3 do not: there the call changes nothing, so it is refused here instead.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffopd.errors import UserError

DEFAULT = "default"


def use_attention_backend(denoiser: nn.Module, name: str) -> None:
    """Have a denoiser compute its attention with a backend; "default" leaves it as it is.

    Raises UserError where the backend is not installed, does not run here, or would be accepted without effect.
    """
    if name == DEFAULT:
        return
    check_attention_backend(denoiser, name)
    if dispatches(denoiser):
        _dispatch_to(denoiser, name)
    else:
        _use_xformers(denoiser)


def check_attention_backend(denoiser: nn.Module, name: str) -> None:
    """Raise UserError for what can be known of a backend on a denoiser without weights; nothing is downloaded."""
    if name == DEFAULT:
        return
    if dispatches(denoiser):
        _check_dispatch(name)
    elif name == "xformers":
        if denoiser.device.type == "meta":
            _use_xformers(copy.deepcopy(denoiser))
    else:
        raise UserError(
            f'train.attention_backend = "{name}" has no effect on {type(denoiser).__name__}: its attention layers '
            'do not look at it. Set "default" or "xformers".'
        )


def dispatches(denoiser: nn.Module) -> bool:
    """Whether all attention layers of a denoiser take diffusers' backends."""
    found = _processors(denoiser)
    return bool(found) and all(hasattr(processor, "_attention_backend") for processor in found)


@contextmanager
def proof_of_use(name: str, denoiser: nn.Module) -> Iterator[None]:
    """While open, count what the backend computes; UserError at the end where it was never called.

    Only denoisers that dispatch are counted; the layers of others say themselves what they use.
    """
    if name == DEFAULT or not dispatches(denoiser):
        yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    held, backend = _AttentionBackendRegistry._backends, AttentionBackendName(name)
    original, calls = held[backend], []

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    held[backend] = counted
    try:
        yield
    finally:
        held[backend] = original
    if not calls:
        raise UserError(
            f'train.attention_backend = "{name}" was accepted by {type(denoiser).__name__}, but never called. '
            'Set "default".'
        )


def _processors(denoiser: nn.Module) -> list[Any]:
    return [m.processor for m in denoiser.modules() if getattr(m, "processor", None) is not None]


def _check_dispatch(name: str) -> None:
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        _check_attention_backend_requirements,
    )

    if AttentionBackendName(name) not in _AttentionBackendRegistry._backends:
        raise UserError(f'train.attention_backend = "{name}" does not exist for this torch. Set "default" or "native".')
    with _refused(name):
        _check_attention_backend_requirements(AttentionBackendName(name))


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """What diffusers says against a backend, as an error of the user's."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f'train.attention_backend = "{name}" cannot be used here: {error} Install what it needs, on a machine with '
            'a supported GPU, or set train.attention_backend = "default".'
        ) from error


def _dispatch_to(denoiser: nn.Module, name: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry._active_backend
    try:
        with _refused(name):
            denoiser.set_attention_backend(name)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)  # this denoiser's layers have it; no other model asked
    wrong = [type(p).__name__ for p in _processors(denoiser) if p._attention_backend != AttentionBackendName(name)]
    if wrong:
        raise UserError(f'train.attention_backend = "{name}" was not taken by {wrong[0]}. Set "default".')


def _use_xformers(denoiser: nn.Module) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError) as error:
        raise UserError(
            f'train.attention_backend = "xformers" cannot be used here: {error} Install diffopd[xformers] on a machine '
            'with a GPU, or set train.attention_backend = "default".'
        ) from error
    names = {type(processor).__name__ for processor in _processors(denoiser)}
    if not all("XFormers" in name for name in names):
        raise UserError(f"xformers was asked for, but the attention layers use {', '.join(sorted(names))}.")
