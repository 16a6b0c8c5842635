"""Stock pipelines, driven: a `Walk` is one `pipeline(...)` call that pauses inside every `scheduler.step`.

The pipeline's own code has by then encoded the prompt, applied guidance, packed and signed everything; what
`step` receives is uniform over families. The walk runs in a greenlet of the same OS thread, so exceptions,
Ctrl-C and CUDA stream order stay ordinary. Grad mode and adapter binding are set anew at each switch.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from diffopd.prediction import Prediction, Step, Transition
from diffopd.schedulers import (
    Place,
    Scheduler,
    family_of,
    known_noise,
    native_transition,
    to_model_output,
    to_prediction,
)

Binding = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Call:
    """What one side is told: a pipeline and the keyword arguments of its call. Lists go with the batch.

    `binding` opens whatever must hold while this side's networks run (its adapter); it is open only between two
    pauses, so a backward pass always sees the student's own.
    """

    pipeline: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    binding: Binding = nullcontext

    def told(self, **arguments: Any) -> Call:
        """The same call with further or other keyword arguments."""
        return Call(self.pipeline, {**self.arguments, **arguments}, self.binding)

    def prompted(self, prompts: Sequence[str], **arguments: Any) -> Call:
        """The same call for a batch of B prompts: a negative prompt that is one string is repeated B times.

        Stock pipelines refuse a list of prompts beside a negative prompt that is a string.
        """
        repeated = {
            key: [value] * len(prompts)
            for key, value in self.arguments.items()
            if key.startswith("negative_prompt") and isinstance(value, str)
        }
        return self.told(**repeated, **arguments, prompt=list(prompts))


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
    held = [getattr(pipeline, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [module for module in held if module is not None]


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


class Visit:
    """One pause: the pipeline stands at `sample` and its network has said `model_output`.

    index counts the pauses of this walk; for schedulers with several calls a step it exceeds the step count.
    """

    def __init__(self, scheduler: Scheduler, step: Callable[..., Any], index: int, arguments: dict[str, Any]) -> None:
        self._scheduler, self._step = scheduler, step
        self.index = index
        self.arguments = arguments
        self.model_output: Tensor = arguments["model_output"]
        self.sample: Tensor = arguments["sample"]
        self.place: Place = family_of(scheduler).locate(scheduler, arguments["timestep"])

    @cached_property
    def prediction(self) -> Prediction:
        """The canonical prediction, with the gradient of `model_output` if it has one."""
        return to_prediction(self._scheduler, self.place, self.model_output, self.sample)

    @property
    def step(self) -> Step:
        """The canonical state and the step about to be taken."""
        wide = torch.promote_types(self.sample.dtype, torch.float32)
        canonical = self.sample.detach().to(wide) / self.place.scale
        return Step(canonical, self.place.sigma, self.place.sigma_next, self.index)

    def native(self, prediction: Prediction) -> Transition:
        """The scheduler's own step from this state under `prediction`, canonical; the scheduler does not move."""
        output = to_model_output(self._scheduler, self.place, prediction)
        return native_transition(self._scheduler, self._step, {**self.arguments, "model_output": output}, self.place)

    def native_reply(self, noise: Tensor | None = None) -> Any:
        """Take the scheduler's own step for real; returns what `step` returned, for `Walk.advance`.

        noise (B, ...) is the draw to use; None leaves it to the pipeline call's generator.
        """
        arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        with torch.no_grad(), known_noise(self._scheduler, noise):
            return self._step(**arguments)

    def answer(self, sample: Tensor) -> Any:
        """Move the scheduler on by one call, but answer with the given next pipeline sample (B, ...)."""
        # Some pipelines scale their next input by the scheduler's position, so the scheduler must move too.
        self.native_reply(torch.zeros_like(self.sample))
        if self.arguments.get("return_dict", True):
            return SimpleNamespace(prev_sample=sample, pred_original_sample=sample, denoised=sample)
        return sample, sample

    def reply(self, canonical: Tensor) -> Any:
        """`answer` with a canonical next sample (B, ...)."""
        return self.answer((canonical * self.place.scale_next).to(self.sample.dtype))


def next_sample(reply: Any) -> Tensor:
    """The next pipeline sample in what a scheduler's `step` returned (output object, tuple or tensor)."""
    if isinstance(reply, Tensor):
        return reply
    return reply[0] if isinstance(reply, tuple) else reply.prev_sample


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` answers by `forward` while open; replacements may nest."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def idle_denoiser(pipeline: Any) -> Iterator[None]:
    """While open, a UNet answers zeros of its output shape without computing. Other denoisers compute as always."""
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        yield
        return

    def zeros(sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        answer = sample.new_zeros(sample.shape[0], unet.config.out_channels, *sample.shape[2:])
        return SimpleNamespace(sample=answer) if return_dict else (answer,)

    with replaced_forward(unet, zeros):
        yield


class Walk:
    """A pipeline call that pauses at each `scheduler.step`. Use as a context manager; closing restores `step`.

    `advance(reply, grad=...)` answers the pending `step` call and runs on to the next pause, returning its `Visit`,
    or None when the call has returned (then `result` holds what it returned). `evaluations` counts the rows its
    denoisers have really computed (guidance by concatenation doubles them).

    Raises ValueError for a scheduler that cannot be driven, and RuntimeError for a pipeline that never called its
    scheduler's `step` (it copies its scheduler) or computes under its own `no_grad`.
    """

    def __init__(self, call: Call) -> None:
        family_of(call.pipeline.scheduler)
        self._call = call
        self._scheduler = call.pipeline.scheduler
        self._original = self._scheduler.step
        self._visits = 0
        self._greenlet: greenlet | None = None
        self.result: Any = None
        self.evaluations = 0

    def __enter__(self) -> Walk:
        if "step" in vars(self._scheduler):
            raise RuntimeError("This pipeline is already in mid-walk; give each side its own object with shell().")
        self._greenlet = greenlet(self._run)
        signature = inspect.signature(self._original)

        @functools.wraps(self._original)
        def pausing(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            return self._greenlet.parent.switch(dict(bound.arguments))

        self._scheduler.step = pausing
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)
        vars(self._scheduler).pop("step", None)

    def _run(self) -> None:
        entry = inspect.unwrap(type(self._call.pipeline).__call__)
        self.result = entry(self._call.pipeline, **self._call.arguments)

    def advance(self, reply: Any = None, *, grad: bool = False, idle: bool = False) -> Visit | None:
        """Answer the pending step (nothing at the first call) and run to the next pause, with or without gradient.

        idle: this state is only passed through, so its network is answered with zeros instead of being evaluated.
        """
        first = self._visits == 0
        self._greenlet.parent = greenlet.getcurrent()
        aside = idle_denoiser(self._call.pipeline) if idle else self._counting()
        with torch.set_grad_enabled(grad), self._call.binding(), aside:
            arguments = self._greenlet.switch() if first else self._greenlet.switch(reply)
        if self._greenlet.dead:
            return self._finished()
        self._visits += 1
        visit = Visit(self._scheduler, self._original, self._visits - 1, arguments)
        if grad and not visit.model_output.requires_grad:
            raise RuntimeError(
                f"{type(self._call.pipeline).__name__} gave a model_output without gradient: it computes under its "
                "own no_grad, or nothing in its denoiser is trainable. Such a pipeline cannot be a student."
            )
        return visit

    @contextmanager
    def _counting(self) -> Iterator[None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.evaluations += len(args[0] if args else next(iter(kwargs.values())))

        held = denoisers_of(self._call.pipeline)
        handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in held]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _finished(self) -> None:
        if self._visits == 0:
            raise RuntimeError(
                f"{type(self._call.pipeline).__name__} returned without calling its scheduler's step: it uses a copy "
                "of the scheduler and cannot be driven."
            )
        return None


def rollout(call: Call) -> Iterator[Visit]:
    """The plain pipeline call, seen from inside: yields each Visit of the native walk, without gradients."""
    with Walk(call) as walk:
        visit = walk.advance()
        while visit is not None:
            yield visit
            visit = walk.advance(visit.native_reply())


@dataclass(frozen=True)
class Survey:
    """What a call's first pause tells: latent shape without the batch, number of `step` calls, grid of timesteps."""

    shape: tuple[int, ...]
    num_visits: int
    timesteps: tuple[float, ...]
    place: Place


def survey(call: Call) -> Survey:
    """Run a call up to its first pause (no UNet evaluation). num_visits exceeds the steps for Heun or PNDM."""
    with Walk(call) as walk:
        visit = walk.advance(idle=True)
        timesteps = tuple(float(t) for t in call.pipeline.scheduler.timesteps)
        return Survey(tuple(visit.sample.shape[1:]), len(timesteps), timesteps, visit.place)


def decode(call: Call, latents: Tensor) -> Any:
    """Images (what the pipeline's output holds) of canonical latents (B, ...), by the pipeline's own last lines.

    Every step of a one-step call is answered with `latents`, and its network is not evaluated.
    """
    kept = {k: v for k, v in call.arguments.items() if k not in ("timesteps", "sigmas", "output_type")}
    with Walk(Call(call.pipeline, {**kept, "num_inference_steps": 1, "latents": latents}, call.binding)) as walk:
        visit = walk.advance(idle=True)
        while visit is not None:
            visit = walk.advance(visit.reply(latents / visit.place.scale_next), idle=True)
        return walk.result.images if hasattr(walk.result, "images") else walk.result[0]
