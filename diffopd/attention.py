"""Attention backends by diffusers' own names, and the proof that a denoiser really uses the one that was asked for.

`set_attention_backend` is accepted by every diffusers model, but reaches only attention processors that dispatch. Those
of UNets and of Stable Diffusion 3 do not: there the call changes nothing, so it is refused here instead.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from diffopd.errors import UserError
from diffopd.parts import replaced_attribute

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
def proof_of_use(name: str, *denoisers: nn.Module) -> Iterator[None]:
    """While open, count what the backend computes in each denoiser; UserError at the end for one that never called it.

    What is counted are calls of the kernel itself, from inside a forward of the denoiser.
    """
    if name == DEFAULT:
        yield
        return
    calls, running = Counter(), []

    def counting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.update(map(id, running))
            return kernel(*args, **kwargs)

        return counted

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.callback(denoiser.register_forward_pre_hook(lambda module, args: running.append(module)).remove)
            stack.callback(denoiser.register_forward_hook(lambda module, args, output: running.remove(module)).remove)
        stack.enter_context(_replaced_kernel(name, counting, is_dispatched=dispatches(denoisers[0])))
        yield
    idle = next((denoiser for denoiser in denoisers if not calls[id(denoiser)]), None)
    if idle is not None:
        raise UserError(
            f'train.attention_backend = "{name}" was accepted by {type(idle).__name__}, but never called. '
            'Set "default".'
        )


@contextmanager
def _replaced_kernel(
    name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]], *, is_dispatched: bool
) -> Iterator[None]:
    """While open, a backend's kernel is what `change` makes of it: in diffusers' table, or in xformers itself."""
    if not is_dispatched:
        from diffusers.models.attention_processor import xformers

        kernel = xformers.ops.memory_efficient_attention
        with replaced_attribute(xformers.ops, "memory_efficient_attention", change(kernel)):
            yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    held, backend = _AttentionBackendRegistry._backends, AttentionBackendName(name)
    original = held[backend]
    held[backend] = change(original)
    try:
        yield
    finally:
        held[backend] = original


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
