"""Stock pipelines, driven: a `Walk` is one `pipeline(...)` call that pauses inside every `scheduler.step`.

The pipeline's own code has by then encoded the prompt, applied guidance, packed and signed everything; what
`step` receives is uniform over families. The walk runs in a greenlet of the same OS thread, so exceptions,
Ctrl-C and CUDA stream order stay ordinary. Grad mode and adapter binding are set anew at each switch.
"""

from __future__ import annotations

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

from diffopd.branches import first_tensor, split
from diffopd.parts import (
    checked_for_gradient,
    completed,
    denoiser_name,
    denoiser_of,
    denoisers_of,
    idle_denoiser,
    narrowed_decode,
    narrowed_inputs,
    noted_latents,
    replaced_forward,
    shell,
    widened,
)
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

__all__ = [
    "Binding",
    "Call",
    "Survey",
    "Visit",
    "Walk",
    "decode",
    "denoiser_name",
    "denoiser_of",
    "denoisers_of",
    "next_sample",
    "replaced_forward",
    "rollout",
    "shell",
    "survey",
]
Binding = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Call:
    """What one side is told: a pipeline and the keyword arguments of its call (`completed`). Lists go with the batch.

    `binding` opens whatever must hold while this side's networks run (its adapter); it is open only between two
    pauses, so a backward pass always sees the student's own.
    """

    pipeline: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    binding: Binding = nullcontext

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", completed(type(self.pipeline), self.arguments))

    @property
    def guidance(self) -> float:
        """The factor of guidance by two answers."""
        return float(self.arguments.get("true_cfg_scale", self.arguments["guidance_scale"]))

    def told(self, **arguments: Any) -> Call:
        """The same call with further or other keyword arguments."""
        return Call(self.pipeline, {**self.arguments, **arguments}, self.binding)

    def regridded(self, num_inference_steps: int) -> Call:
        """The same call on its scheduler's own grid of so many steps, whatever levels it names."""
        named = ("timesteps", "sigmas", "intermediate_timesteps")
        kept = {key: value for key, value in self.arguments.items() if key not in named}
        return Call(self.pipeline, {**kept, "num_inference_steps": num_inference_steps}, self.binding)

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


class Visit:
    """One pause: the pipeline stands at `sample` and its network has said `model_output`.

    index counts the pauses of this walk; for schedulers with several calls a step it exceeds the step count.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step: Callable[..., Any],
        index: int,
        arguments: dict[str, Any],
        answers: Sequence[Any] = (),
    ) -> None:
        self._scheduler, self._step, self._answers = scheduler, step, answers
        self.index = index
        self.arguments = arguments
        self.model_output: Tensor = arguments["model_output"]
        self.sample: Tensor = arguments["sample"]
        self.place: Place = family_of(scheduler).locate(scheduler, arguments["timestep"])

    @cached_property
    def prediction(self) -> Prediction:
        """The canonical prediction, with the gradient of `model_output` if it has one."""
        return to_prediction(self._scheduler, self.place, self.model_output, self.sample)

    def branches(self, guidance_scale: float) -> tuple[Prediction, Prediction]:
        """The predictions with the prompt and with the negative one, whose guided sum `prediction` is.

        For a walk that keeps its network's answers. Raises ValueError where the call was not guided by two of them.
        """
        positive, negative = split(self._answers, self.model_output, guidance_scale)
        made = (to_prediction(self._scheduler, self.place, answer, self.sample) for answer in (positive, negative))
        return next(made), next(made)

    @property
    def step(self) -> Step:
        """The canonical state and the step about to be taken."""
        canonical = widened(self.sample.detach()) / self.place.scale
        return Step(canonical, self.place.sigma, self.place.sigma_next, self.index)

    def native(self, prediction: Prediction) -> Transition:
        """The scheduler's own step from this state under `prediction`, canonical; the scheduler does not move."""
        output = to_model_output(self._scheduler, self.place, prediction)
        return native_transition(self._scheduler, self._step, {**self.arguments, "model_output": output}, self.place)

    def native_reply(self, noise: Tensor | None = None) -> Any:
        """Take the scheduler's own step for real; returns what `step` returned, for `Walk.advance`.

        noise (B, ...) is the draw to use; None leaves it to the pipeline call's generator. The state that follows is
        float32 under half-precision weights too: rounding it at every step would drown small steps.
        """
        arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        arguments |= {k: widened(arguments[k]) for k in ("model_output", "sample")}
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
        return self.answer((canonical * self.place.scale_next).to(widened(self.sample).dtype))


def next_sample(reply: Any) -> Tensor:
    """The next pipeline sample in what a scheduler's `step` returned (output object, tuple or tensor)."""
    if isinstance(reply, Tensor):
        return reply
    return reply[0] if isinstance(reply, tuple) else reply.prev_sample


class Walk:
    """A pipeline call that pauses at each `scheduler.step`. Use as a context manager; closing restores `step`.

    `advance(reply, grad=...)` answers the pending `step` call and runs on to the next pause, returning its `Visit`,
    or None when the call has returned (then `result` holds what it returned). `evaluations` counts the rows its
    denoisers have really computed (guidance by concatenation doubles them). keeps_answers: each visit also holds what
    they answered, for `Visit.branches`.

    Raises ValueError for a scheduler that cannot be driven, and RuntimeError for a pipeline that never called its
    scheduler's `step` (it copies its scheduler) or computes under its own `no_grad`.
    """

    def __init__(self, call: Call, *, keeps_answers: bool = False) -> None:
        family_of(call.pipeline.scheduler)
        self._call, self._keeps_answers = call, keeps_answers
        self._answers: list[Any] = []
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
        # Z-Image writes its chat template into the list of prompts that it is given: lists go in as copies.
        told = {key: list(value) if isinstance(value, list) else value for key, value in self._call.arguments.items()}
        self.result = entry(self._call.pipeline, **told)

    def advance(self, reply: Any = None, *, grad: bool = False, idle: bool = False) -> Visit | None:
        """Answer the pending step (nothing at the first call) and run to the next pause, with or without gradient.

        idle: this state is only passed through, so its network is answered with zeros instead of being evaluated.
        """
        first = self._visits == 0
        self._greenlet.parent = greenlet.getcurrent()
        if grad:
            for module in denoisers_of(self._call.pipeline):
                checked_for_gradient(module)
        aside = idle_denoiser(self._call.pipeline) if idle else self._entered()
        self._answers = []
        with torch.set_grad_enabled(grad), self._call.binding(), narrowed_decode(self._call.pipeline), aside:
            arguments = self._greenlet.switch() if first else self._greenlet.switch(reply)
        if self._greenlet.dead:
            return self._finished()
        self._visits += 1
        visit = Visit(self._scheduler, self._original, self._visits - 1, arguments, self._answers)
        if grad and not visit.model_output.requires_grad:
            raise RuntimeError(self._without_gradient())
        return visit

    def _without_gradient(self) -> str:
        name = type(self._call.pipeline).__name__
        if len(denoisers_of(self._call.pipeline)) > 1:
            return (
                f"{name} gave a model_output without gradient: at this noise level one of its two denoisers answers "
                "that is not trained (only the first is). Such a pipeline can be a teacher, not a student."
            )
        return (
            f"{name} gave a model_output without gradient: it computes under its own no_grad, or nothing in its "
            "denoiser is trainable. Such a pipeline cannot be a student."
        )

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """While open, each denoiser's rows are counted and its sample is cast to the precision of its weights."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.evaluations += len(args[0] if args else next(iter(kwargs.values())))
            return narrowed_inputs(module, args, kwargs)

        held = denoisers_of(self._call.pipeline)
        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in held]
        if self._keeps_answers:
            handles += [module.register_forward_hook(self._keep) for module in held]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._answers.append(first_tensor(output))

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
    """What a call's first pause tells: latent shape without the batch, number of `step` calls, grid of timesteps.

    shape: of the states. latents_shape: what the call's own `latents` argument must have, which differs where the
    pipeline packs the latents that it is given (FLUX.2). num_visits exceeds the steps for Heun or PNDM.
    """

    shape: tuple[int, ...]
    num_visits: int
    timesteps: tuple[float, ...]
    place: Place
    latents_shape: tuple[int, ...]


def survey(call: Call) -> Survey:
    """Run a call up to its first pause, without evaluating its denoiser."""
    with Walk(call) as walk, noted_latents(call.pipeline) as fits:
        visit = walk.advance(idle=True)
        timesteps = family_of(call.pipeline.scheduler).timesteps(call.pipeline.scheduler)
        shape = tuple(visit.sample.shape[1:])
        given = call.arguments.get("latents")
        latents_shape = fits(visit.sample) if given is None else tuple(given.shape[1:])
        return Survey(shape, len(timesteps), tuple(float(t) for t in timesteps), visit.place, latents_shape)


def decode(call: Call, latents: Tensor) -> Any:
    """Images (what the pipeline's output holds) of canonical latents (B, ...), by the pipeline's own last lines.

    Every step of a one-step call is answered with `latents`, and its network is not evaluated. For a video pipeline
    the images are its frames.
    """
    single = call.regridded(1)
    kept = {key: value for key, value in single.arguments.items() if key != "output_type"}
    kept["generator"] = torch.Generator(call.pipeline.device)
    with Walk(Call(call.pipeline, kept, call.binding)) as walk:
        visit = walk.advance(idle=True)
        while visit is not None:
            visit = walk.advance(visit.reply(latents), idle=True)
        return walk.result[0]
