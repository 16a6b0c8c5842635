"""Solvers: one state and one prediction to the Gaussian over the next state.

A solver is `f(prediction, step, history, *, noise_level) -> Transition`. history holds the walk's earlier predictions,
oldest first, detached; only multistep solvers look at it. Symbols: s, s' = sigma, sigma_next; a, a' = alpha there.
A pipeline's own scheduler ("native") is not here: see schedulers.native_transition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from diffopd.path import Path
from diffopd.prediction import Prediction, Step, Transition

History = tuple[Prediction, ...]
NEARLY = 5e-4  # how near to 1 a first sigma counts as 1


def euler(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """x' = x + v dt, the flow path's ODE."""
    return Transition(step.sample + step.dt * prediction.velocity, 0.0)


def flow_sde(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """Flow SDE, DiffusionOPD Eq. (8), arXiv:2605.15055: g = a sqrt(s / (1 - s)).

    mean = (1 + g^2 dt / 2s) x + (1 + g^2 (1 - s) / 2s) v dt, std = g sqrt(|dt|). At s = 1 the grid's second sigma
    stands in for s in 1 - s of g alone, as released; that step's variance is then a^2 whatever the number of steps.
    Some schedulers begin a hair below 1 (.999999, .99967), where g would be a hundred: that counts as 1, too.
    """
    s, dt = step.sigma, step.dt
    g2 = noise_level**2 * s / (1 - (step.sigma_next if s > 1 - NEARLY else s))
    mean = (1 + g2 * dt / (2 * s)) * step.sample + (1 + g2 * (1 - s) / (2 * s)) * dt * prediction.velocity
    return Transition(mean, math.sqrt(g2 * -dt))


def dance_sde(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """Dance SDE: mean = x + (v - eta^2/2 score) dt, score = -(x - (1 - s) x0) / s^2, std = eta sqrt(|dt|)."""
    s, dt = step.sigma, step.dt
    score = -(step.sample - (1 - s) * prediction.denoised) / s**2
    mean = step.sample + (prediction.velocity - 0.5 * noise_level**2 * score) * dt
    return Transition(mean, noise_level * math.sqrt(-dt))


def ddim(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """DDIM(eta), Eq. (12) of arXiv:2010.02502 in the form that holds on every path.

    std = eta s' sqrt(1 - (a s' / a' s)^2), mean = a' x0 + sqrt(s'^2 - std^2) eps.
    """
    s, s_next = step.sigma, step.sigma_next
    a, a_next = (float(prediction.path.alpha(level)) for level in (s, s_next))
    std = noise_level * s_next * math.sqrt(max(0.0, 1 - (a * s_next / (a_next * s)) ** 2)) if s_next else 0.0
    direction = math.sqrt(max(0.0, s_next**2 - std**2))
    return Transition(a_next * prediction.denoised + direction * prediction.noise, std)


def dpmpp_1(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """DPM-Solver++ of first order, Eq. (12) of arXiv:2211.01095: x' = (s'/s) x - a' (e^-h - 1) x0.

    With e^-h = a s' / (a' s) the coefficient of x0 is a' - a s'/s: no logarithm, so no singular end.
    """
    return _dpmpp(prediction, step, prediction.denoised)


def dpmpp_2m(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """DPM-Solver++(2M), Algorithm 2 of arXiv:2211.01095: x0 is replaced by (1 + 1/2r) x0 - (1/2r) x0_previous.

    r = h_previous / h in log-SNR. First order at the first step, at the last (h infinite) and after a state of
    alpha = 0 (h_previous infinite): the limits of 1/r.
    """
    if not history or step.sigma_next == 0:
        return _dpmpp(prediction, step, prediction.denoised)
    path, previous = prediction.path, history[-1]
    if float(path.alpha(previous.sigma)) == 0:
        return _dpmpp(prediction, step, prediction.denoised)
    before, now, after = (_log_snr(path, level) for level in (previous.sigma, step.sigma, step.sigma_next))
    inverse = (after - now) / (now - before) / 2  # 1 / 2r
    return _dpmpp(prediction, step, (1 + inverse) * prediction.denoised - inverse * previous.denoised)


def lcm(prediction: Prediction, step: Step, history: History, *, noise_level: float) -> Transition:
    """LCM-style re-noising, Algorithm 2 of arXiv:2310.04378: N(a' x0, s'^2)."""
    a_next = float(prediction.path.alpha(step.sigma_next))
    return Transition(a_next * prediction.denoised, step.sigma_next)


def _dpmpp(prediction: Prediction, step: Step, denoised: object) -> Transition:
    a, a_next = (float(prediction.path.alpha(level)) for level in (step.sigma, step.sigma_next))
    ratio = step.sigma_next / step.sigma
    return Transition(ratio * step.sample + (a_next - a * ratio) * denoised, 0.0)


def _log_snr(path: Path, sigma: float) -> float:
    return math.log(float(path.alpha(sigma))) - math.log(float(sigma))


@dataclass(frozen=True)
class Solver:
    """One row: on which paths it is defined, its order as an ODE solver, whether noise_level means anything.

    noise: what noise_level is called in its paper, "" where the solver takes none. still_at_picture: its step to
    sigma = 0 draws no noise.
    """

    name: str
    function: Callable[..., Transition]
    paths: tuple[str, ...]
    order: int
    stochastic: bool = False
    multistep: bool = False
    noise: str = ""
    still_at_picture: bool = False


SOLVERS: dict[str, Solver] = {
    row.name: row
    for row in (
        Solver("euler", euler, ("flow",), 1),
        Solver("flow_sde", flow_sde, ("flow",), 1, stochastic=True, noise="a"),
        Solver("dance_sde", dance_sde, ("flow",), 1, stochastic=True, noise="eta"),
        Solver("ddim", ddim, ("flow", "vp"), 1, stochastic=True, noise="eta", still_at_picture=True),
        Solver("dpmpp_1", dpmpp_1, ("flow", "vp"), 1),
        Solver("dpmpp_2m", dpmpp_2m, ("flow", "vp"), 2, multistep=True),
        Solver("lcm", lcm, ("flow", "vp"), 1, stochastic=True, still_at_picture=True),
    )
}
REASONS = {
    "euler": "its step x + v dt integrates the flow path's ODE; the deterministic step there is ddim",
    "flow_sde": "its drift and its g are those of the flow path; take ddim with noise_level (eta) instead",
    "dance_sde": "its score is that of the flow path; take ddim with noise_level (eta) instead",
}


def get_solver(name: str, path: Path, noise_level: float = 0.0) -> Callable[[Prediction, Step, History], Transition]:
    """The solver `name` for a path, its noise level bound.

    Raises ValueError for an unknown name, a path on which it is undefined, a noise level out of range or without
    effect, always with the reason.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known are native, {', '.join(SOLVERS)}.")
    row = SOLVERS[name]
    if path.name not in row.paths:
        raise ValueError(f"solver {name} is not defined on the {path.name} path: {REASONS[name]}.")
    if not math.isfinite(noise_level) or noise_level < 0:
        raise ValueError(f"noise_level = {noise_level}; it must be a finite number of at least 0.")
    if noise_level and not row.noise:
        raise ValueError(f"noise_level = {noise_level:g} has no effect on solver {name}. Remove it.")
    if name == "ddim" and noise_level > 1:
        raise ValueError(f"noise_level = {noise_level:g} is DDIM's eta and must be at most 1.")
    return partial(row.function, noise_level=noise_level)


def implied_prediction(landing: object, step: Step, path: Path) -> Prediction:
    """The prediction with which ONE deterministic step (Euler on flow, DDIM on vp) from step.sample lands there.

    landing (B, ...). On vp, x' = (a'a + s's) x + (s'a - a's) v. This is how a landing after several teacher
    substeps becomes a velocity that the student can match.
    """
    s, s_next = step.sigma, step.sigma_next
    a, a_next = (float(path.alpha(level)) for level in (s, s_next))
    kept = 1.0 if path.name == "flow" else a_next * a + s_next * s
    return Prediction(step.sample, (landing - kept * step.sample) / path.stride(s, s_next), step.sigma, path)
