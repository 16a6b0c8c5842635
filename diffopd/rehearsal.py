"""A side's call, rehearsed on configs alone: the stock pipeline runs, its denoiser has shapes and no weights.

What a family does with guidance, grid and inputs is thereby said by the pipeline's own code, not by rules of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffopd.blueprint import Blueprint, build_component, build_on_meta
from diffopd.parts import completed, denoisers_of, replaced_forward
from diffopd.schedulers import family_of

CLIP_TOKENS = 77


@dataclass
class Rehearsal:
    """What a call did: its grid, the denoiser rows of each step, the bytes that the graph of its first state keeps.

    sigmas is empty for schedulers without noise levels of their own (they are those of the timesteps). heard: all that
    the denoiser was given at the first state, samples aside.
    """

    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    rows: list[int] = field(default_factory=list)
    graph_bytes: int = 0
    heard: list[Any] = field(default_factory=list)


def can_rehearse(base: Blueprint, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline's text inputs are known here and no argument is a picture."""
    return base.pipeline_class in TEXTS and not any("image" in name for name in arguments)


def rehearse(
    base: Blueprint,
    scheduler: Any,
    arguments: Mapping[str, Any],
    *,
    batch_size: int = 1,
    trained: nn.Module | None = None,
) -> Rehearsal:
    """Run the base's pipeline call with `arguments` (prompts and latents aside) on `scheduler`.

    trained: a denoiser on the meta device; its forwards at the first state are then run there, in its own dtypes, and
    what their graph keeps is counted. Without it nothing is computed. Raises KeyError for a pipeline that is not in
    `TEXTS`, and what the pipeline itself raises for arguments that it refuses.
    """
    pipeline = stock_pipeline(base, scheduler, trained or base.meta_denoiser)
    told = {**arguments, **stand_in_texts(base, arguments, batch_size), "output_type": "latent"}
    known = inspect.signature(type(pipeline).__call__).parameters
    told = completed(type(pipeline), {name: value for name, value in told.items() if name in known})
    result = Rehearsal()
    with torch.no_grad(), _stand_ins(pipeline, result, is_computed=trained is not None):
        inspect.unwrap(type(pipeline).__call__)(pipeline, **told)
    levels = getattr(scheduler, "sigmas", None)
    result.timesteps = tuple(float(t) for t in family_of(scheduler).timesteps(scheduler))
    result.sigmas = () if levels is None else tuple(float(s) for s in levels)[: len(result.timesteps)]
    return result


def forwards(base: Blueprint, scheduler: Any, arguments: dict[str, Any]) -> float:
    """Denoiser rows per picture and state of a call with `arguments`, counted on the pipeline's own code.

    Guidance costs a second row in one call, a second call, or nothing, as the family has it. For a pipeline that
    cannot be rehearsed it is taken to cost a second row above a guidance_scale of 1.
    """
    if not can_rehearse(base, arguments):
        return 2 if arguments["guidance_scale"] > 1 else 1
    rows = rehearse(base, scheduler, arguments).rows
    return sum(rows) / len(rows)


def guidance(base: Blueprint, scheduler: Any, arguments: dict[str, Any]) -> tuple[bool, bool]:
    """(whether a call has a second answer to guide by, whether its guidance_scale does anything).

    Both are True where that is not known: the pipeline cannot be rehearsed, or refuses one of the calls.
    """
    if not can_rehearse(base, arguments):
        return True, True
    try:
        asked = rehearse(base, scheduler, arguments)
        if max(asked.rows) > 1:
            return True, True
        others = [rehearse(base, scheduler, {**arguments, "guidance_scale": scale}).heard for scale in (1.0, 0.0)]
    except (TypeError, ValueError, AttributeError):
        return True, True
    return False, not all(_same(asked.heard, heard) for heard in others)


def _same(ones: list[Any], others: list[Any]) -> bool:
    def equal(one: Any, other: Any) -> bool:
        are_tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
        return torch.equal(one, other) if are_tensors else type(one) is type(other) and one == other

    return len(ones) == len(others) and all(map(equal, ones, others))


def stock_pipeline(base: Blueprint, scheduler: Any, denoiser: nn.Module) -> Any:
    """The stock class over a meta denoiser and autoencoder, without text encoders; its own tensors are on the CPU."""
    import diffusers

    stock = getattr(diffusers, base.pipeline_class)
    cpu = property(lambda self: torch.device("cpu"))
    kind = type(stock.__name__, (stock,), {"_execution_device": cpu, "device": cpu, "__module__": stock.__module__})
    held = {"scheduler": scheduler, base.denoiser: denoiser, "vae": _autoencoder(base)}
    if "transformer_2" in base.configs:
        held["transformer_2"] = build_on_meta(base.configs["transformer_2"])
    init = inspect.signature(stock.__init__).parameters
    needed = [name for name, p in init.items() if p.default is inspect.Parameter.empty and name != "self"]
    options = {name: value for name, value in base.options.items() if name in init}
    if "requires_safety_checker" in init:
        options["requires_safety_checker"] = False
    pipeline = kind(**{**dict.fromkeys(needed), **options, **held})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder(base: Blueprint) -> nn.Module:
    """Its weights are on the meta device, its buffers are zeros: some pipelines scale latents by them."""
    vae = build_component(base.classes["vae"], base.configs["vae"])
    for module in vae.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return vae


@contextmanager
def _stand_ins(pipeline: Any, result: Rehearsal, *, is_computed: bool) -> Iterator[None]:
    """The denoisers answer zeros; the rows of each step are counted, and the graph of the first if it is computed."""
    step, kept = pipeline.scheduler.step, Kept()
    denoisers = denoisers_of(pipeline)
    kept.ignore(denoisers)
    result.rows = [0]
    first = ExitStack()  # open from the first forward to the first step, for the pipeline's own guidance arithmetic too

    def counting(*args: Any, **kwargs: Any) -> Any:
        first.close()
        result.rows.append(0)
        return step(*args, **kwargs)

    def forward(original: Callable[..., Any], channels: int | None, *args: Any, **kwargs: Any) -> Any:
        sample, *others = (*args, *kwargs.values())
        result.rows[-1] += len(sample)
        result.heard += tree_leaves(others) if len(result.rows) == 1 else []
        if is_computed and len(result.rows) == 1:
            args, kwargs = tree_map(_shape_of, (args, kwargs))
            with LeanAttention():
                original(*args, **kwargs)
        answer = tree_map(partial(_zeros, channels), sample)
        return SimpleNamespace(sample=answer) if kwargs.get("return_dict", True) else (answer,)

    pipeline.scheduler.step = counting
    try:
        with ExitStack() as opened:
            for module in denoisers:
                stand_in = partial(forward, module.forward, getattr(module.config, "out_channels", None))
                opened.enter_context(replaced_forward(module, stand_in))
            if is_computed:
                first.enter_context(torch.enable_grad())
                first.enter_context(kept)
            yield
    finally:
        first.close()
        del pipeline.scheduler.step
    result.rows.pop()
    result.graph_bytes = kept.num_bytes()


def _shape_of(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(channels: int | None, sample: Tensor) -> Tensor:
    """An answer to (B, C, ...) or, packed, (B, L, C); a row of a list (C, ...) is answered as it is."""
    answer = torch.zeros_like(sample)
    if sample.ndim > 4 or (sample.ndim == 4 and channels and sample.shape[1] != 1):
        answer = sample.new_zeros(sample.shape[0], channels or sample.shape[1], *sample.shape[2:])
    return answer.requires_grad_(torch.is_grad_enabled()).clone()


class Kept:
    """While open, what autograd keeps for the backward is counted, each storage once and weights aside."""

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._kept: dict[int, Tensor] = {}

    def ignore(self, modules: list[nn.Module]) -> None:
        """The parameters of `modules` are not counted: they are there anyway."""
        self._own |= {p.untyped_storage()._cdata for module in modules for p in module.parameters()}

    def num_bytes(self) -> int:
        """Bytes of the storages kept so far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._own:
            self._kept[storage] = tensor  # held, so that no later storage takes its address
        return tensor


class LeanAttention(TorchFunctionMode):
    """Attention as fused kernels do it: inputs, output and one number a row are kept, never the square of scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return function(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, context.saved_tensors[:3]))


def stand_in_texts(base: Blueprint, arguments: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Encoded prompts of the longest length instead of prompts, and negative ones unless there would be none."""
    import diffusers

    known = inspect.signature(getattr(diffusers, base.pipeline_class).__call__).parameters
    longest = known["max_sequence_length"].default if "max_sequence_length" in known else CLIP_TOKENS
    shapes = TEXTS[base.pipeline_class](base.denoiser_config, arguments.get("max_sequence_length", longest))
    told: dict[str, Any] = {name: None for name in known if name.removeprefix("negative_").startswith("prompt")}
    told |= {name: _text(name, shape, batch_size) for name, shape in shapes.items()}
    if "true_cfg_scale" not in known or "negative_prompt" in arguments:
        told |= {f"negative_{name}": value for name, value in list(told.items()) if name in shapes}
    return told


def _text(name: str, shape: tuple[int, ...] | list[int], batch_size: int) -> Any:
    if isinstance(shape, list):  # one tensor a prompt, each of its own length
        return [torch.zeros(*shape) for _ in range(batch_size)]
    return torch.ones(batch_size, *shape, dtype=torch.bool if "mask" in name else torch.float32)


Config = Mapping[str, Any]


def _sdxl(config: Config, tokens: int) -> dict[str, Any]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"prompt_embeds": (CLIP_TOKENS, config["cross_attention_dim"]), "pooled_prompt_embeds": (pooled,)}


def _sd3(config: Config, tokens: int) -> dict[str, Any]:
    length = CLIP_TOKENS + tokens
    pooled = (config["pooled_projection_dim"],)
    return {"prompt_embeds": (length, config["joint_attention_dim"]), "pooled_prompt_embeds": pooled}


def _flux(config: Config, tokens: int) -> dict[str, Any]:
    pooled = (config["pooled_projection_dim"],)
    return {"prompt_embeds": (tokens, config["joint_attention_dim"]), "pooled_prompt_embeds": pooled}


def _plain(key: str, config: Config, tokens: int) -> dict[str, Any]:
    return {"prompt_embeds": (tokens, config[key])}


def _listed(key: str, config: Config, tokens: int) -> dict[str, Any]:
    return {"prompt_embeds": [tokens, config[key]]}


def _masked(key: str, mask: str, config: Config, tokens: int) -> dict[str, Any]:
    return {"prompt_embeds": (tokens, config[key]), mask: (tokens,)}


# Pipeline class -> the arguments that stand for an encoded prompt: (denoiser config, tokens) -> name -> shape of a row.
TEXTS: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "StableDiffusionPipeline": partial(_plain, "cross_attention_dim"),
    "LatentConsistencyModelPipeline": partial(_plain, "cross_attention_dim"),
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "Flux2Pipeline": partial(_plain, "joint_attention_dim"),
    "Flux2KleinPipeline": partial(_plain, "joint_attention_dim"),
    "ChromaPipeline": partial(_masked, "joint_attention_dim", "prompt_attention_mask"),
    "ZImagePipeline": partial(_listed, "cap_feat_dim"),
    "QwenImagePipeline": partial(_masked, "joint_attention_dim", "prompt_embeds_mask"),
    "SanaPipeline": partial(_masked, "caption_channels", "prompt_attention_mask"),
    "SanaSprintPipeline": partial(_masked, "caption_channels", "prompt_attention_mask"),
    "PixArtSigmaPipeline": partial(_masked, "caption_channels", "prompt_attention_mask"),
    "Lumina2Pipeline": partial(_masked, "cap_feat_dim", "prompt_attention_mask"),
    "WanPipeline": partial(_plain, "text_dim"),
}
