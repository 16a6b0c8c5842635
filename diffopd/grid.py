"""The student's walk before any weight is loaded: scheduler, grid, solver and objective fit each other."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffopd.blueprint import Blueprint
from diffopd.errors import UserError, suggestion
from diffopd.recipe import Recipe, StudentSettings, TeacherSettings
from diffopd.settings import Location


@dataclass(frozen=True)
class Grid:
    """Timesteps of the walk, one per call of `scheduler.step`, and the noise level in [0, 1] of each."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


def make_scheduler(recipe: Recipe, base: Blueprint) -> Any:
    """The scheduler with the recipe's override.

    UserError for a wrong class, key or value, or a missing package.
    """
    import diffusers
    from diffusers.utils import DummyObject

    from diffopd.schedulers import FAMILIES

    config = base.configs.get("scheduler", {})
    override = dict(recipe.student.scheduler)
    name = override.pop("class", config.get("_class_name", ""))
    place = recipe.place("student", "scheduler")
    kind = getattr(diffusers, name, None)
    if kind is None or not name.endswith("Scheduler"):
        known = [known for known in dir(diffusers) if known.endswith("Scheduler")]
        near = suggestion(name, known).split(" Known:")[0]
        raise UserError(f"{place}: diffusers has no scheduler class {name!r}.{near} Name one of diffusers' classes.")
    keys = [key for key in inspect.signature(kind.__init__).parameters if key != "self"]
    for key in override:
        if key not in keys and not isinstance(kind, DummyObject):  # which stands for a class whose packages are absent
            where = recipe.place("student", "scheduler", key)
            raise UserError(f"{where}: {name} has no setting {key!r}.{suggestion(key, keys)}")
    try:
        made = kind.from_config(config, **override)
    except ImportError as error:
        rest = "" if name in FAMILIES else f" It could not be driven even then; known are {', '.join(FAMILIES)}."
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: {name} needs a package that is not installed: {reason}{rest}") from error
    except (TypeError, ValueError, NotImplementedError) as error:
        if name not in FAMILIES:
            raise UserError(f"{place}: {name} cannot be driven; known are {', '.join(FAMILIES)}.") from error
        raise UserError(f"{place}: {name} refuses its settings: {error}. Correct student.scheduler.") from error
    answer = getattr(made.config, "prediction_type", None)
    if getattr(made.config, "use_flow_sigmas", False) and answer != "flow_prediction":
        raise UserError(
            f"{place}: {name} with use_flow_sigmas would read the network's answer as {answer!r}, which is not driven "
            'here. Set prediction_type = "flow_prediction" for a network that answers so, or leave use_flow_sigmas out.'
        )
    return made


def drivable_scheduler(recipe: Recipe, base: Blueprint) -> Any:
    """`make_scheduler`, and UserError for one that cannot be driven."""
    from diffopd.schedulers import family_of

    made = make_scheduler(recipe, base)
    try:
        family_of(made)
    except ValueError as error:
        raise UserError(f"{recipe.place('student', 'scheduler')}: {error}") from error
    return made


def path_name(scheduler: Any) -> str:
    """ "flow" or "vp": the path that a scheduler walks."""
    from diffopd.schedulers import family_of

    return family_of(scheduler).path(scheduler)


def grid_of(
    recipe: Recipe, base: Blueprint, scheduler: Any, num_inference_steps: int, *, teacher: int | None = None
) -> Grid | None:
    """The grid of the student's walk (or of a teacher's, by its index) in so many steps.

    None where only the pipeline itself decides it and cannot be rehearsed. Raises UserError for a number of steps or
    arguments that scheduler or pipeline refuse.
    """
    side = recipe.student if teacher is None else recipe.teachers[teacher]
    location = ("student",) if teacher is None else ("teachers", teacher)
    if path_name(scheduler) == "flow" or _from_call(scheduler) or {"timesteps", "sigmas"} & set(side.call):
        return _rehearsed_grid(recipe, base, scheduler, side_arguments(side, num_inference_steps), location)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise UserError(
            f"{recipe.place('student', 'num_inference_steps')}: {type(scheduler).__name__} refuses "
            f"{num_inference_steps} steps: {error}"
        ) from error
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    return Grid(timesteps, _vp_levels(scheduler, timesteps))


def side_arguments(
    side: StudentSettings | TeacherSettings, num_inference_steps: int, guidance_scale: float | None = None
) -> dict[str, Any]:
    """What the call of one side is told, prompts aside. guidance_scale: a teacher's, where its card gives it."""
    scale = side.guidance_scale if guidance_scale is None else guidance_scale
    told = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0 if scale is None else scale, **side.call}
    negative = side.negative_prompt if isinstance(side, StudentSettings) else ""
    return told | ({"negative_prompt": negative} if negative else {})


def _rehearsed_grid(
    recipe: Recipe, base: Blueprint, scheduler: Any, arguments: dict[str, Any], location: Location
) -> Grid | None:
    """The grid that the pipeline's own code makes of a call: its shift may depend on the resolution."""
    from diffopd.rehearsal import can_rehearse, rehearse

    if not can_rehearse(base, arguments):
        return None
    try:
        made = rehearse(base, scheduler, arguments)
    except (TypeError, ValueError, AttributeError) as error:
        place = recipe.place(*location, "call")
        raise UserError(
            f"{place}: {base.pipeline_class} cannot be called like this with a {type(scheduler).__name__}: {error} "
            "Correct the side's call, or student.scheduler."
        ) from error
    levels = made.sigmas if path_name(scheduler) == "flow" else _vp_levels(scheduler, made.timesteps)
    return Grid(made.timesteps, levels)


def _from_call(scheduler: Any) -> bool:
    from diffopd.schedulers import family_of

    return family_of(scheduler).grid_from_call


def _vp_levels(scheduler: Any, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    from diffopd.schedulers import family_of

    return tuple(family_of(scheduler).level(scheduler, t) for t in timesteps)


def check_nesting(recipe: Recipe, base: Blueprint, scheduler: Any, grid: Grid) -> None:
    """Every teacher, in m substeps between two states, must stand at each state of the student. UserError otherwise."""
    steps, many = recipe.student.num_inference_steps, recipe.objective.substeps
    place = recipe.place("objective", "substeps")
    if many > 1 and len(grid.timesteps) != steps:
        raise UserError(
            f"{place}: {type(scheduler).__name__} calls its step {len(grid.timesteps)} times for {steps} "
            "steps, and substeps need one call a step. Take another scheduler or substeps = 1."
        )
    for index, teacher in enumerate(recipe.teachers):
        fine = grid_of(recipe, base, scheduler, steps * many, teacher=index)
        anchors = fine.timesteps[::many] if fine else grid.timesteps
        missed = [t for t, at in zip_longest(grid.timesteps, anchors, fillvalue=-1.0) if abs(at - t) > 1e-3]
        if missed:
            raise UserError(
                f"{place}: the grid of teacher {Path(teacher.name).name!r}, {steps} x {many} = {steps * many} steps, "
                f"does not contain the student's timestep {missed[0]:g} (student: {_shown(grid.timesteps)}; teacher: "
                f"{_shown(anchors)} at its anchors). {_nesting_remedy(scheduler)}"
            )


def _nesting_remedy(scheduler: Any) -> str:
    if path_name(scheduler) == "flow":
        return (
            "Give both sides explicit levels that nest (student.call.sigmas, and call.sigmas of the teacher with "
            "substeps times as many), a scheduler without shift_terminal, or substeps = 1."
        )
    return (
        'Set student.scheduler.timestep_spacing = "trailing", with a number of steps that divides '
        f"{scheduler.config.num_train_timesteps}, or substeps = 1."
    )


def _shown(timesteps: tuple[float, ...]) -> str:
    return ", ".join(f"{t:g}" for t in timesteps)


def check_walk(recipe: Recipe, base: Blueprint) -> Grid | None:
    """Scheduler, grid, solver and objective fit each other and the settings that count steps.

    Returns the student's grid, None where only the pipeline decides it. Raises UserError for what does not fit.
    """
    scheduler = drivable_scheduler(recipe, base)
    grid = grid_of(recipe, base, scheduler, recipe.student.num_inference_steps)
    visits = len(grid.timesteps) if grid else recipe.student.num_inference_steps
    _check_step_settings(recipe, visits)
    _check_solver(recipe, scheduler)
    _check_step_calls(recipe, scheduler, grid)
    _check_noise(recipe, scheduler, visits)
    _check_noise_objective(recipe, scheduler, grid, visits)
    if grid:
        _check_first_state(recipe, scheduler, grid)
        check_nesting(recipe, base, scheduler, grid)
    return grid


def _check_step_settings(recipe: Recipe, visits: int) -> None:
    objective = recipe.objective
    if objective.step_weights and len(objective.step_weights) != visits:
        raise UserError(
            f"{recipe.place('objective', 'step_weights')}: {len(objective.step_weights)} weights for {visits} "
            "steps. Give one weight per step."
        )
    if isinstance(objective.query, dict) and objective.query.get("random", 0) > visits:
        raise UserError(
            f"{recipe.place('objective', 'query')}: the query draws {objective.query['random']} of {visits} steps. "
            "Draw at most all of them."
        )
    if isinstance(objective.query, dict) and max(objective.query.get("indices", [0])) >= visits:
        raise UserError(
            f"{recipe.place('objective', 'query')}: the walk has steps 0 to {visits - 1}, the query names step "
            f"{max(objective.query['indices'])}. Name existing steps."
        )


def _check_solver(recipe: Recipe, scheduler: Any) -> None:
    """The named solvers exist on the scheduler's path."""
    from diffopd.path import PATHS
    from diffopd.solver import get_solver

    student, objective = recipe.student, recipe.objective
    named = [("student", "solver", student.solver, student.noise_level)]
    named += [("objective", "substep_solver", objective.substep_solver, 0.0)] if objective.substeps > 1 else []
    for section, key, name, noise_level in named:
        if name in ("native", "auto"):
            continue
        try:
            get_solver(name, PATHS[path_name(scheduler)], noise_level)
        except ValueError as error:
            raise UserError(f"{recipe.place(section, key)}: {section}.{key} = {name!r}: {error}") from error


def _check_step_calls(recipe: Recipe, scheduler: Any, grid: Grid | None) -> None:
    """A named solver takes the place of each call of the scheduler's step, so there must be one a step."""
    student = recipe.student
    steps = student.num_inference_steps
    calls = len(grid.timesteps) if grid else steps * type(scheduler).order
    if student.solver != "native" and calls != steps:
        raise UserError(
            f"{recipe.place('student', 'solver')}: student.solver = {student.solver!r} needs one call of the "
            f"scheduler's step a step, but {type(scheduler).__name__} makes {calls} for {steps} steps. Take "
            'another scheduler (such as DDIMScheduler) or solver = "native".'
        )


def _check_noise(recipe: Recipe, scheduler: Any, visits: int) -> None:
    """An objective that divides by the std of a step needs steps that have one."""
    from diffopd.objective import OBJECTIVES
    from diffopd.solver import SOLVERS

    student, objective = recipe.student, recipe.objective
    if not OBJECTIVES[objective.name].needs_std:
        if objective.final_step is not None:
            needing = ", ".join(name for name, row in OBJECTIVES.items() if row.needs_std)
            raise UserError(
                f"{recipe.place('objective', 'final_step')}: final_step = {objective.final_step!r} has no effect on "
                f"objective {objective.name!r}, which is defined at steps without noise. Remove it, or take an "
                f"objective that compares distributions ({needing})."
            )
        return
    place = f"{recipe.place('objective', 'name')}: objective {objective.name!r}"
    if not draws_noise(recipe, scheduler):
        named = f"solver {student.solver!r} with noise_level = {student.noise_level:g}"
        what = type(scheduler).__name__ if student.solver == "native" else named
        path = path_name(scheduler)
        noisy = [name for name, row in SOLVERS.items() if row.noise and path in row.paths]
        still = [name for name in noisy if SOLVERS[name].still_at_picture]
        last = f' {" and ".join(still)} also needs final_step = "mean" or "skip".' if still else ""
        raise UserError(
            f"{place} compares distributions, but {what} draws no noise (std 0). Take objective "
            f'"mean", or student.solver = {" or ".join(map(repr, noisy))} with student.noise_level above 0.{last}'
        )
    ends_still = ends_at_picture(scheduler) and (student.solver == "native" or SOLVERS[student.solver].still_at_picture)
    if ends_still and objective.final_step is None and _asks_at(objective.query, visits - 1, visits):
        raise UserError(
            f"{place} is undefined at the last step, which draws no noise (std 0). Set final_step = "
            '"mean" or "skip", or a query without the last step.'
        )


def ends_at_picture(scheduler: Any) -> bool:
    """Whether the walk ends at sigma = 0, where no step draws noise (SD 1.5's own DDIM stops just above it)."""
    ends_above = getattr(scheduler.config, "final_sigmas_type", "zero") == "sigma_min"
    return not ends_above and float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0


def draws_noise(recipe: Recipe, scheduler: Any) -> bool:
    """Whether the steps of the student's walk draw noise."""
    from diffopd.schedulers import family_of
    from diffopd.solver import SOLVERS

    if recipe.student.solver != "native":
        row = SOLVERS[recipe.student.solver]
        return row.stochastic and bool(recipe.student.noise_level or not row.noise)
    return family_of(scheduler).draws_noise(scheduler, recipe.student.call)


def _asks_at(query: str | dict[str, Any], index: int, visits: int) -> bool:
    """Whether a query may supervise this state."""
    from diffopd.query import supervised_states

    if query == "one_low_noise" or (isinstance(query, dict) and "random" in query):
        return True
    return index in supervised_states(query, visits, seed=(0,))


def _check_first_state(recipe: Recipe, scheduler: Any, grid: Grid) -> None:
    """At sigma = 1 on the variance-preserving path alpha is 0: the noise is known, the picture is not."""
    if path_name(scheduler) == "flow" or grid.sigmas[0] < 1.0 - 1e-7:
        return
    if scheduler.config.prediction_type == "epsilon":
        raise UserError(
            f"{recipe.place('student', 'scheduler')}: the walk starts at alpha = 0 (zero SNR), where a prediction "
            "of the noise says nothing about the picture. Set rescale_betas_zero_snr = false, or take a "
            "v-prediction base."
        )


def _check_noise_objective(recipe: Recipe, scheduler: Any, grid: Grid | None, visits: int) -> None:
    """At alpha = 0 the noise is the sample whatever is predicted: its loss would be 0 there."""
    from diffopd.objective import is_pure_noise
    from diffopd.path import PATHS

    objective = recipe.objective
    if objective.name != "noise" or not _asks_at(objective.query, 0, visits):
        return
    first = grid.sigmas[0] if grid else _first_flow_sigma(recipe, scheduler)
    if first is not None and is_pure_noise(PATHS[path_name(scheduler)], first):
        raise UserError(
            f"{recipe.place('objective', 'name')}: objective 'noise' compares nothing at the first step, where "
            'alpha = 0 (pure noise). Take "velocity" or "mean", or a query without step 0.'
        )


def _first_flow_sigma(recipe: Recipe, scheduler: Any) -> float | None:
    """Where a walk on the flow path starts, as far as the recipe tells; no shift moves sigma = 1."""
    call = recipe.student.call
    if path_name(scheduler) != "flow" or call.get("timesteps"):
        return None
    if call.get("sigmas"):
        return float(call["sigmas"][0])
    return 1.0 if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" else None
