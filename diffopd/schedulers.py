"""What a diffusers scheduler's `model_output` and `sample` mean, and its own step as a `Transition`.

This is the only place that knows scheduler classes. One row of `FAMILIES` per class says where on which path a
`step` call stands (canonical sigma in [0, 1]), how the pipeline's sample is scaled there, and whether its steps
draw noise. Everything else in the project speaks `Prediction` and `Transition`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopd.parts import widened
from diffopd.path import PATHS, Path
from diffopd.prediction import Prediction, Transition

Scheduler = Any  # a diffusers SchedulerMixin; the library has no common base with `step`


@dataclass(frozen=True)
class Place:
    """Where one `scheduler.step` call stands: levels before and after it, and the scale of the samples there.

    sigma, sigma_next: canonical noise levels in [0, 1]. scale, scale_next: pipeline sample = scale * canonical
    sample (1 except for the VE-scaled Euler kind and trigflow). output_scale: the same for what the network says.
    path: "flow" or "vp".
    """

    sigma: float
    sigma_next: float
    path: Path
    scale: float = 1.0
    scale_next: float = 1.0
    output_scale: float = 1.0


@dataclass(frozen=True)
class Family:
    """One row: how to locate a step call of this scheduler class, which settings are refused, and its grid.

    draws_noise(scheduler, call): whether its steps do, given the pipeline call's arguments. path: "flow" or "vp".
    level: the canonical sigma of a timestep on the vp path. grid_from_call: only the pipeline's call knows the grid.
    """

    locate: Callable[[Scheduler, Any], Place]
    refuse: Callable[[Scheduler], str | None] = lambda scheduler: None
    timesteps: Callable[[Scheduler], Tensor] = lambda scheduler: scheduler.timesteps
    draws_noise: Callable[[Scheduler, Mapping[str, Any]], bool] = lambda scheduler, call: False
    path: Callable[[Scheduler], str] = lambda scheduler: "vp"
    level: Callable[[Scheduler, float], float] = lambda scheduler, t: _from_alphas(scheduler.alphas_cumprod[int(t)])
    grid_from_call: bool = False


def _from_alphas(alpha_cumprod: float) -> float:
    return max(0.0, 1.0 - float(alpha_cumprod)) ** 0.5


def _alphas_place(scheduler: Scheduler, timestep: Any, previous: int) -> Place:
    """DDIM, DDPM, PNDM, LCM: levels from alphas_cumprod, `previous` < 0 means the final level."""
    alphas = scheduler.alphas_cumprod.double()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    now = _from_alphas(alphas[int(timestep)])
    after = _from_alphas(alphas[int(previous)] if previous >= 0 else final)
    return Place(now, after, PATHS["vp"])


def _leading_place(scheduler: Scheduler, timestep: Any) -> Place:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _alphas_place(scheduler, timestep, int(timestep) - stride)


def _ddpm_place(scheduler: Scheduler, timestep: Any) -> Place:
    return _alphas_place(scheduler, timestep, int(scheduler.previous_timestep(timestep)))


def _lcm_place(scheduler: Scheduler, timestep: Any) -> Place:
    index = _step_index(scheduler, timestep)
    last = index + 1 >= len(scheduler.timesteps)
    if last:  # LCM's last step returns the denoised sample itself
        return Place(_alphas_place(scheduler, timestep, -1).sigma, 0.0, PATHS["vp"])
    return _alphas_place(scheduler, timestep, int(scheduler.timesteps[index + 1]))


def _pndm_place(scheduler: Scheduler, timestep: Any) -> Place:
    """PLMS visits the second level twice; its second call steps again from the first level (Eq. 13, 2202.09778)."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    now = int(timestep)
    return _alphas_place(scheduler, now, now if scheduler.counter == 1 else now - stride)


def _step_index(scheduler: Scheduler, timestep: Any) -> int:
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def _ve_level(value: Any) -> tuple[float, float]:
    """(canonical VP sigma, scale) of a variance-exploding level: x_ve = sqrt(1 + s^2) x_vp."""
    scale = (1.0 + float(value) ** 2) ** 0.5
    return float(value) / scale, scale


def _ve_place(scheduler: Scheduler, timestep: Any) -> Place:
    index = _step_index(scheduler, timestep)
    sigma, scale = _ve_level(scheduler.sigmas[index])
    sigma_next, scale_next = _ve_level(scheduler.sigmas[index + 1])
    return Place(sigma, sigma_next, PATHS["vp"], scale, scale_next)


def _kdpm2_place(scheduler: Scheduler, timestep: Any) -> Place:
    """First call: from sigma to the interpolated level; second call: from there to the next level."""
    index = _step_index(scheduler, timestep)
    if scheduler.state_in_first_order:
        levels = scheduler.sigmas[index], scheduler.sigmas_interpol[index + 1]
    else:
        levels = scheduler.sigmas_interpol[index], scheduler.sigmas[index]
    (sigma, scale), (sigma_next, scale_next) = map(_ve_level, levels)
    return Place(sigma, sigma_next, PATHS["vp"], scale, scale_next)


def _heun_place(scheduler: Scheduler, timestep: Any) -> Place:
    index = _step_index(scheduler, timestep)
    following = index + 1 if scheduler.state_in_first_order else index
    (sigma, scale), (sigma_next, scale_next) = (_ve_level(scheduler.sigmas[i]) for i in (index, following))
    return Place(sigma, sigma_next, PATHS["vp"], scale, scale_next)


def _dpm_place(scheduler: Scheduler, timestep: Any) -> Place:
    """DPM-Solver, UniPC, DEIS: VE levels as numbers, but samples kept at variance-preserving scale."""
    index = _step_index(scheduler, timestep)
    levels = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    if _flow_sigmas(scheduler) == "flow":
        return Place(float(levels[0]), float(levels[1]), PATHS["flow"])
    return Place(_ve_level(levels[0])[0], _ve_level(levels[1])[0], PATHS["vp"])


def _flow_place(scheduler: Scheduler, timestep: Any) -> Place:
    index = _step_index(scheduler, timestep)
    return Place(float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1]), PATHS["flow"])


def _scm_place(scheduler: Scheduler, timestep: Any) -> Place:
    """Trigflow: x = cos(t) x0 + sin(t) eps is the variance preserving path, times the data's standard deviation.

    F = cos(t) eps - sin(t) x0 is its velocity (arXiv:2410.11081). A first t of 1.5708 is 4e-6 beyond pi / 2.
    """
    index, scale = _step_index(scheduler, timestep), float(scheduler.config.sigma_data)
    now, after = (math.sin(float(scheduler.timesteps[i])) for i in (index, index + 1))
    return Place(now, after, PATHS["vp"], scale, scale, output_scale=scale)


def _flow_sigmas(scheduler: Scheduler) -> str:
    return "flow" if getattr(scheduler.config, "use_flow_sigmas", False) else "vp"


def _always(scheduler: Scheduler, call: Mapping[str, Any]) -> bool:
    return True


def _sde(scheduler: Scheduler, call: Mapping[str, Any]) -> bool:
    return scheduler.config.algorithm_type.startswith("sde")


def _renoised(scheduler: Scheduler, call: Mapping[str, Any]) -> bool:
    return bool(scheduler.config.stochastic_sampling)


def _clips(scheduler: Scheduler) -> str | None:
    for name in ("clip_sample", "thresholding"):
        if getattr(scheduler.config, name, False):
            return (
                f"{type(scheduler).__name__} has {name}=True: its step is not affine in model_output, so the mean "
                f"of a step is undefined for the loss. Set {name} = false in the scheduler config."
            )
    return None


def _prk(scheduler: Scheduler) -> str | None:
    if not scheduler.config.skip_prk_steps:
        return "PNDMScheduler needs skip_prk_steps=True here: its Runge-Kutta warm-up revisits states."
    return None


FAMILIES: dict[str, Family] = {
    "DDIMScheduler": Family(_leading_place, _clips, draws_noise=lambda scheduler, call: call.get("eta", 0.0) > 0),
    "DDPMScheduler": Family(_ddpm_place, _clips, draws_noise=_always),
    "LCMScheduler": Family(_lcm_place, _clips, draws_noise=_always),
    "PNDMScheduler": Family(_pndm_place, _prk),
    "EulerDiscreteScheduler": Family(_ve_place),
    "EulerAncestralDiscreteScheduler": Family(_ve_place, draws_noise=_always),
    "HeunDiscreteScheduler": Family(_heun_place, _clips),
    "KDPM2DiscreteScheduler": Family(_kdpm2_place),
    "DPMSolverMultistepScheduler": Family(_dpm_place, _clips, draws_noise=_sde, path=_flow_sigmas),
    "DPMSolverSinglestepScheduler": Family(_dpm_place, _clips, draws_noise=_sde, path=_flow_sigmas),
    "UniPCMultistepScheduler": Family(_dpm_place, _clips, path=_flow_sigmas),
    "DEISMultistepScheduler": Family(_dpm_place, _clips, path=_flow_sigmas),
    "FlowMatchEulerDiscreteScheduler": Family(_flow_place, draws_noise=_renoised, path=lambda scheduler: "flow"),
    "SCMScheduler": Family(
        _scm_place,
        timesteps=lambda scheduler: scheduler.timesteps[:-1],
        draws_noise=_always,
        level=lambda scheduler, t: math.sin(t),
        grid_from_call=True,  # its set_timesteps takes an argument that is right in two steps only
    ),
}


def family_of(scheduler: Scheduler) -> Family:
    """The row of `scheduler`. Raises ValueError for a class or a setting that cannot be driven, with the reason."""
    name = type(scheduler).__name__
    if name not in FAMILIES:
        raise ValueError(f"Scheduler {name} cannot be driven; known are {', '.join(FAMILIES)}.")
    reason = FAMILIES[name].refuse(scheduler)
    if reason:
        raise ValueError(reason)
    return FAMILIES[name]


def to_prediction(scheduler: Scheduler, place: Place, model_output: Tensor, sample: Tensor) -> Prediction:
    """`model_output` (B, ...) at pipeline `sample` (B, ...) as a canonical Prediction in float32 or wider.

    Raises ValueError where the conversion is undefined (epsilon at alpha = 0) or the type is unknown.
    """
    wide = torch.promote_types(sample.dtype, torch.float32)
    output, canonical = model_output.to(wide) / place.output_scale, sample.to(wide) / place.scale
    kind = _prediction_type(scheduler, place)
    if kind == "velocity":
        return Prediction(canonical, output, place.sigma, place.path)
    if kind == "epsilon":
        return Prediction.from_noise(canonical, output, place.sigma, place.path)
    return Prediction.from_denoised(canonical, output, place.sigma, place.path)


def to_model_output(scheduler: Scheduler, place: Place, prediction: Prediction) -> Tensor:
    """The inverse of `to_prediction`: what this scheduler's `step` would have to receive."""
    kind = _prediction_type(scheduler, place)
    if kind == "velocity":
        return prediction.velocity * place.output_scale
    return prediction.noise if kind == "epsilon" else prediction.denoised


def _prediction_type(scheduler: Scheduler, place: Place) -> str:
    if place.path.name == "flow":
        return "velocity"
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    known = {"epsilon": "epsilon", "v_prediction": "velocity", "sample": "denoised", "trigflow": "velocity"}
    if kind not in known:
        raise ValueError(f"prediction_type {kind!r} of {type(scheduler).__name__}; known are {', '.join(known)}.")
    return known[kind]


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """The scheduler's state, lists and tensors copied: schedulers append to and add into them in place."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(item) for item in value]
        return value.clone() if isinstance(value, Tensor) else value

    return {name: copied(value) for name, value in vars(scheduler).items()}


def restore(scheduler: Scheduler, state: dict[str, Any]) -> None:
    """Put back what `snapshot` took; the snapshot itself stays usable."""
    vars(scheduler).clear()
    vars(scheduler).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})


@contextmanager
def known_noise(scheduler: Scheduler, noise: Tensor | float | None) -> Iterator[None]:
    """While open, the scheduler draws `noise` (a number means a constant tensor); None leaves its own generator."""
    module = sys.modules[type(scheduler).__module__]
    if noise is None or not hasattr(module, "randn_tensor"):
        yield
        return

    def given(shape: Any, **options: Any) -> Tensor:
        dtype, device = options.get("dtype"), options.get("device")
        if isinstance(noise, Tensor):
            return noise.to(device=device, dtype=dtype)
        return torch.full(tuple(shape), float(noise), dtype=dtype, device=device)

    original = module.randn_tensor
    module.randn_tensor = given
    try:
        yield
    finally:
        module.randn_tensor = original


def fork(scheduler: Scheduler, step: Callable[..., Any], arguments: dict[str, Any], noise: float) -> Tensor:
    """The next sample that `step` would give with constant `noise`, leaving the scheduler's state untouched."""
    state = snapshot(scheduler)
    try:
        with known_noise(scheduler, noise):
            return step(**{**arguments, "return_dict": False})[0]
    finally:
        restore(scheduler, state)


def native_transition(
    scheduler: Scheduler, step: Callable[..., Any], arguments: dict[str, Any], place: Place
) -> Transition:
    """The scheduler's own step from `arguments` (model_output, timestep, sample, ...) as a canonical Transition.

    The mean is the step with zero noise and keeps the gradient of `model_output`; the std is the difference that
    one unit of noise makes. Multistep history is the scheduler's, hence exact and detached. The state is restored.
    """
    wide = {k: widened(arguments[k]) for k in ("model_output", "sample")}
    mean = fork(scheduler, step, {**arguments, **wide}, 0.0)
    probe = {**arguments, **{k: torch.zeros_like(v[:1].detach()) for k, v in wide.items()}}
    std = _noise_std(scheduler, step, probe)
    return Transition(mean / place.scale_next, std / place.scale_next)


def _noise_std(scheduler: Scheduler, step: Callable[..., Any], probe: dict[str, Any]) -> float:
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        return 0.0
    state = snapshot(scheduler)
    for name, value in vars(scheduler).items():  # history rows must fit the one-row probe; they cancel anyway
        vars(scheduler)[name] = _first_row(value, probe["sample"])
    try:
        with torch.no_grad():
            unit, zero = (fork(scheduler, step, probe, noise) for noise in (1.0, 0.0))
    finally:
        restore(scheduler, state)
    return float((unit - zero).double().mean())


def _first_row(value: Any, probe: Tensor) -> Any:
    if isinstance(value, list):
        return [_first_row(item, probe) for item in value]
    is_history = isinstance(value, Tensor) and value.ndim == probe.ndim and value.shape[1:] == probe.shape[1:]
    return torch.zeros_like(value[:1]) if is_history else value
