"""The parts of a stock pipeline, and what stands in for one of them for a moment; everything is put back."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DENOISERS = ("unet", "transformer", "transformer_2")


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network that a pipeline denoises with. Raises ValueError where there is none."""
    for name in ("unet", "transformer"):
        module = getattr(pipeline, name, None)
        if module is not None:
            return module
    raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer.")


def denoiser_name(pipeline: Any) -> str:
    """ "unet" or "transformer"."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"


def denoisers_of(pipeline: Any) -> list[nn.Module]:
    """Every network that the pipeline may denoise with (some have two, for high and low noise)."""
    held = [getattr(pipeline, name, None) for name in DENOISERS]
    return [module for module in held if module is not None]


def completed(pipeline_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, completed where a default of the class fits one number of steps only.

    Sana-Sprint's intermediate_timesteps, 1.3, is the middle of its two-step grid: any other number of steps wants None,
    which no recipe can say.
    """
    key = "intermediate_timesteps"
    if key not in inspect.signature(pipeline_class.__call__).parameters:
        return dict(arguments)
    told = {name: value for name, value in arguments.items() if (name, value) != (key, None)}
    return told if told.get("num_inference_steps", 2) == 2 else {key: None, **told}


CHECKPOINTS_WRONGLY = {
    "ChromaTransformer2DModel": "diffusers leaves the attention mask out of its single blocks under checkpointing",
}


def checked_for_gradient(module: nn.Module) -> None:
    """Raises ValueError for a denoiser that computes something else under gradient checkpointing, with the reason."""
    name = type(module).__name__
    if name in CHECKPOINTS_WRONGLY and module.is_gradient_checkpointing:
        raise ValueError(
            f"{name} gives other outputs with gradient checkpointing than without: {CHECKPOINTS_WRONGLY[name]}. "
            "Set train.gradient_checkpointing = false for this family."
        )


def shell(pipeline: Any) -> Any:
    """A second pipeline over the same modules with its own scheduler copy.

    `__call__` stores its guidance on the pipeline object and its position on the scheduler, so two calls that run
    in lockstep need an object each.
    """
    components = {**pipeline.components, "scheduler": copy.deepcopy(pipeline.scheduler)}
    options = {k: v for k, v in pipeline.config.items() if k in _init_options(pipeline) and k not in components}
    other = type(pipeline)(**components, **options)
    other.set_progress_bar_config(disable=True)
    return other


def _init_options(pipeline: Any) -> set[str]:
    return set(inspect.signature(type(pipeline).__init__).parameters)


@contextmanager
def replaced_attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    """The instance attribute `name` of `holder` is `value` while open; replacements may nest."""
    absent = object()
    before = vars(holder).get(name, absent)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(holder, name)
        else:
            setattr(holder, name, before)


def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """`module` answers by `forward` while open; replacements may nest."""
    return replaced_attribute(module, "forward", forward)


@contextmanager
def idle_denoiser(pipeline: Any) -> Iterator[None]:
    """While open, the denoisers answer zeros of their output's shape without computing."""

    def idle(module: nn.Module) -> Callable[..., Any]:
        def zeros(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            sample = args[0] if args else next(iter(kwargs.values()))
            rows = isinstance(sample, list)
            answer = [_idle_answer(module, row) for row in sample] if rows else _idle_answer(module, sample)
            return SimpleNamespace(sample=answer) if return_dict else (answer,)

        return zeros

    with ExitStack() as open_ones:
        for module in denoisers_of(pipeline):
            open_ones.enter_context(replaced_forward(module, idle(module)))
        yield


def _idle_answer(module: nn.Module, sample: Tensor) -> Tensor:
    """Zeros in the shape of a denoiser's output: its input's, with the output's channels where it is (B, C, ...)."""
    channels = getattr(module.config, "out_channels", None)
    is_packed = sample.ndim < 4 or channels is None
    return torch.zeros_like(sample) if is_packed else sample.new_zeros(sample.shape[0], channels, *sample.shape[2:])


def widened(value: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def narrowed_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A denoiser's arguments with its sample in the precision of its weights; timesteps stay as exact as they are."""

    def narrow(value: Any) -> Any:
        return [row.to(module.dtype) for row in value] if isinstance(value, list) else value.to(module.dtype)

    if args:
        args = (narrow(args[0]), *args[1:])
    names = set() if args else {next(iter(kwargs))}
    if isinstance(kwargs.get("timestep_cond"), Tensor):  # the guidance embedding takes the states' precision
        names.add("timestep_cond")
    return args, {key: narrow(value) if key in names else value for key, value in kwargs.items()}


@contextmanager
def narrowed_decode(pipeline: Any) -> Iterator[None]:
    """While open, the pipeline's VAE takes latents of any precision: states are wider than half-precision weights."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    original = vae.decode

    @functools.wraps(original)
    def decode_in_own_precision(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(latents.to(vae.dtype), *args, **kwargs)

    with replaced_attribute(vae, "decode", decode_in_own_precision):
        yield


@contextmanager
def noted_latents(pipeline: Any) -> Iterator[Callable[[Tensor], tuple[int, ...]]]:
    """Yields fits(state) -> the shape, batch aside, of latents with which `prepare_latents` makes such a state.

    Most pipelines hand given latents on; those that pack them want the shape in which they draw them themselves.
    """
    original = getattr(pipeline, "prepare_latents", None)
    if original is None:
        yield lambda state: tuple(state.shape[1:])
        return
    drawn: list[Tensor] = []
    asked: dict[str, Any] = {}
    module = sys.modules[original.__func__.__module__]
    draw = module.randn_tensor

    def drawing(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    def noting(*args: Any, **kwargs: Any) -> Any:
        asked.update(inspect.signature(original).bind(*args, **kwargs).arguments)
        with replaced_attribute(module, "randn_tensor", drawing):
            return original(*args, **kwargs)

    def fits(state: Tensor) -> tuple[int, ...]:
        try:
            made = original(**{**asked, "latents": torch.zeros_like(state)})
        except (ValueError, IndexError, RuntimeError):  # not a shape that it takes
            return tuple(drawn[0].shape[1:])
        made = made if isinstance(made, Tensor) else made[0]
        return tuple((state if made.shape == state.shape else drawn[0]).shape[1:])

    with replaced_attribute(pipeline, "prepare_latents", noting):
        yield fits
