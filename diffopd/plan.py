"""What `--dry-run` prints: what is trained, on which grid, at which cost; no weights are loaded."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffopd.blueprint import BYTES, num_values
from diffopd.grid import Grid, make_scheduler, side_arguments
from diffopd.preflight import Parts, lora_size
from diffopd.recipe import Recipe
from diffopd.teacher import TeacherCard, weight_files

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from torch import nn

QUERY_DRAWS = 256  # draws over which the cost of a random query is averaged


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher: its guidance, denoiser evaluations per picture of a walk, prompts, share."""

    name: str
    form: str
    guidance_scale: float
    evaluations: float
    train_prompts: int
    test_prompts: int
    share: float


@dataclass(frozen=True)
class Plan:
    """The resolved plan. Evaluations are denoiser forwards per picture of one walk; guidance may count double.

    memory: bytes per item; its graph entry is absent for pipelines that cannot be rehearsed.
    """

    recipe: Recipe
    pipeline_class: str
    scheduler: str
    grid: Grid | None
    num_trained: int
    num_parameters: int
    student_rows: float
    student_evaluations: float
    teachers: tuple[TeacherPlan, ...]
    pictures_per_update: int
    memory: dict[str, int]

    @property
    def evaluations_per_update(self) -> tuple[float, float]:
        """Denoiser evaluations (pictures x forwards) of student and teachers in one update."""
        teachers = sum(teacher.share * teacher.evaluations for teacher in self.teachers)
        return self.pictures_per_update * self.student_evaluations, self.pictures_per_update * teachers


def make_plan(parts: Parts) -> Plan:
    """The plan of a checked recipe."""
    recipe, base = parts.recipe, parts.base
    visits = len(parts.grid.timesteps) if parts.grid else recipe.student.num_inference_steps
    walked, asked = visited(recipe, visits)
    total = sum(teacher.weight for teacher in recipe.teachers)
    teachers = []
    rows = forwards(parts, side_arguments(recipe.student, recipe.student.num_inference_steps))
    student = 0.0
    for settings, card in zip(recipe.teachers, parts.cards, strict=True):
        guidance = card.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        is_given = card.form == "pictures"
        calls = forwards(parts, side_arguments(settings, visits * recipe.objective.substeps, guidance))
        prompts = len(parts.train_rows[card.name]), len(parts.test_rows[card.name])
        cost = 0.0 if is_given else asked * recipe.objective.substeps * calls
        student += settings.weight / total * (asked * calls if is_given else walked * rows)
        teachers.append(TeacherPlan(card.name, card.form, guidance, cost, *prompts, settings.weight / total))
    train = recipe.train
    tasks = {"all": len(recipe.teachers), "round_robin": 1}.get(train.tasks_per_update, train.tasks_per_update)
    trained, memory = _sizes(parts)
    return Plan(
        recipe=recipe,
        pipeline_class=base.pipeline_class,
        scheduler=recipe.student.scheduler.get("class", base.configs["scheduler"]["_class_name"]),
        grid=parts.grid,
        num_trained=trained,
        num_parameters=base.num_parameters(),
        student_rows=rows,
        student_evaluations=student,
        teachers=tuple(teachers),
        pictures_per_update=tasks * train.batch_size * train.gradient_accumulation_steps,
        memory=memory,
    )


def forwards(parts: Parts, arguments: dict[str, Any]) -> float:
    """Denoiser rows per picture and state of a call with `arguments`, counted on the pipeline's own code.

    Guidance costs a second row in one call, a second call, or nothing, as the family has it. For a pipeline that
    cannot be rehearsed it is taken to cost a second row above a guidance_scale of 1.
    """
    from diffopd.rehearsal import can_rehearse, rehearse

    if not can_rehearse(parts.base, arguments):
        return 2 if arguments["guidance_scale"] > 1 else 1
    rows = rehearse(parts.base, make_scheduler(parts.recipe, parts.base), arguments).rows
    return sum(rows) / len(rows)


def visited(recipe: Recipe, visits: int) -> tuple[float, float]:
    """(states the student is evaluated at, states the teacher is asked at) per walk, means over draws."""
    from diffopd.query import supervised_states

    draws = [
        tuple(supervised_states(recipe.objective.query, visits, seed=(recipe.seed, update, 0)))
        for update in range(QUERY_DRAWS)
    ]
    walked = sum(max(indices) + 1 for indices in draws) / len(draws)
    return walked, sum(map(len, draws)) / len(draws)


def _sizes(parts: Parts) -> tuple[int, dict[str, int]]:
    """(trained parameters, bytes per item of memory while the loop runs)."""
    import torch

    from diffopd.precision import DTYPES, answer_in_float32

    recipe, base = parts.recipe, parts.base
    train, frozen = recipe.train, DTYPES[recipe.train.frozen_dtype]
    denoiser = copy.deepcopy(base.meta_denoiser)
    if recipe.student.train == "full":
        trained = base.num_parameters()
        denoiser.requires_grad_(True)
    else:
        denoiser.to(frozen)
        trained = lora_size(recipe, denoiser)
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    averages = int(train.ema_decay > 0) + sum(card.form == "ema" for card in parts.cards)
    memory = {f"base {name}": size * _bytes_of(name, frozen) for name, size in _resident(parts).items()}
    memory |= {
        "teachers": _teachers(parts, trained, frozen),
        "trained weights": BYTES * trained,
        "gradients and AdamW": 3 * BYTES * trained,
        "averages": BYTES * trained * averages,
    }
    if frozen is not torch.float32:
        answer_in_float32(denoiser, frozen)
    graph = _graph(parts, denoiser)
    memory |= {"graph of one state": graph} if graph is not None else {}
    return trained, {name: size for name, size in memory.items() if size}


def _resident(parts: Parts) -> dict[str, int]:
    """component -> its numbers, for what stays while the loop runs: released encoders and VAE do not."""
    train, held = parts.recipe.train, parts.base.component_sizes()
    if train.text_encoders != "released":
        return held
    gone = ("text_encoder",) if parts.recipe.objective.states == "data" else ("text_encoder", "vae")
    return {name: size for name, size in held.items() if not name.startswith(gone)}


def _bytes_of(component: str, frozen: torch.dtype) -> int:
    return BYTES if component == "vae" else frozen.itemsize  # the VAE stays in float32


def _teachers(parts: Parts, adapter: int, frozen: torch.dtype) -> int:
    """Bytes that teachers add to the device: adapters all, own denoisers all or, offloaded, the largest alone."""
    own = [_teacher_size(parts, card, adapter) * frozen.itemsize for card in parts.cards if _has_own(parts, card)]
    adapters = [_teacher_size(parts, card, adapter) for card in parts.cards if not _has_own(parts, card)]
    return (max(own, default=0) if parts.recipe.train.offload_teachers else sum(own)) + BYTES * sum(adapters)


def _has_own(parts: Parts, card: TeacherCard) -> bool:
    return card.form == "full" or (card.form == "lora" and parts.recipe.train.fuse_teachers)


def _teacher_size(parts: Parts, card: TeacherCard, adapter: int) -> int:
    """Numbers that a teacher adds; an adapter on the hub, whose size is not known yet, is taken to be `adapter`."""
    if card.weights is None:
        return 0
    if card.hub_weights or _has_own(parts, card):
        return parts.base.num_parameters() if _has_own(parts, card) else adapter
    return sum(num_values(file) for file in weight_files(card.weights_path()))


def _graph(parts: Parts, denoiser: nn.Module) -> int | None:
    """Bytes that the backward of one state of one micro-batch needs; None for a pipeline that cannot be rehearsed."""
    from diffopd.rehearsal import can_rehearse, rehearse

    base, recipe = parts.base, parts.recipe
    arguments = side_arguments(recipe.student, recipe.student.num_inference_steps)
    if not can_rehearse(base, arguments):
        return None
    if recipe.train.gradient_checkpointing:
        denoiser.train()
        denoiser.enable_gradient_checkpointing()
    scheduler = make_scheduler(recipe, base)
    # Under train.mixed_precision activations are smaller than this: it is counted without autocast.
    return rehearse(base, scheduler, arguments, batch_size=recipe.train.batch_size, trained=denoiser).graph_bytes


def render(plan: Plan) -> RenderableType:
    """The plan as a person reads it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in _facts(plan):
        facts.add_row(name, value)
    teachers = Table("teacher", "form", "guidance", "evaluations", "prompts (train, test)", "share", box=None)
    for teacher in plan.teachers:
        prompts = f"{teacher.train_prompts}, {teacher.test_prompts}"
        row = (f"{teacher.guidance_scale:g}", f"{teacher.evaluations:g}", prompts, f"{teacher.share:.2f}")
        teachers.add_row(teacher.name, teacher.form, *row)
    memory = Table(box=None, show_header=False, pad_edge=False)
    for name, size in plan.memory.items():
        memory.add_row(name, readable(size))
    memory.add_row("sum", readable(sum(plan.memory.values())), style="bold")
    title = f"Plan of {plan.recipe.name} ({plan.recipe.path})"
    heading = f"Memory while training, frozen weights in {plan.recipe.train.frozen_dtype}"
    heading += "" if "graph of one state" in plan.memory else ", without activations"
    heading += "" if plan.recipe.student.quantization == "none" else "; quantization would make less of the base"
    return Group(Text(title, "bold"), facts, Text(""), teachers, Text(""), Text(heading, "bold"), memory)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    student, objective, train = plan.recipe.student, plan.recipe.objective, plan.recipe.train
    of_student, of_teachers = plan.evaluations_per_update
    what = f"LoRA, rank {student.rank}, alpha {student.lora_alpha}" if student.train == "lora" else "all weights"
    if student.init_weights:
        what = f"LoRA that starts as {student.init_weights}"
    if student.begin_from == "teacher_average":
        what += ", beginning as the average of its teachers"
    guidance = f"guidance {student.guidance_scale:g}"
    guidance += f" ({plan.student_rows:g} {'row' if plan.student_rows == 1 else 'rows'} of the network a picture)"
    substeps = f", teacher in {objective.substeps} substeps" if objective.substeps > 1 else ""
    ends = [f"{train.max_train_steps} updates"] if train.max_train_steps else []
    ends += [f"{train.max_train_seconds:g} s"] if train.max_train_seconds else []
    ends += [f"{train.patience} checks without improvement"] if train.patience else []
    return [
        ("trained", f"{what}: {plan.num_trained:,} of {plan.num_parameters:,} denoiser parameters"),
        ("base", f"{student.pretrained_model_name_or_path} ({plan.pipeline_class})"),
        ("walk", f"{student.num_inference_steps} steps of {_solver(plan)}, {guidance}"),
        *([("deployed", _deployed(plan))] if student.solver != "native" else []),
        ("timesteps", _numbers(plan.grid.timesteps if plan.grid else None, "g")),
        ("sigmas", _numbers(plan.grid.sigmas if plan.grid else None, ".3f")),
        ("objective", f"{objective.name}, query {objective.query}{substeps}, {objective.states} states"),
        ("update", f"{plan.pictures_per_update} pictures a process, learning rate {train.learning_rate:g}"),
        (
            "evaluations",
            f"student {of_student:g}, teachers {of_teachers:g} an update (student with backward)",
        ),
        ("ends after", " or ".join(ends)),
        ("output_dir", plan.recipe.output_dir),
    ]


def _solver(plan: Plan) -> str:
    student = plan.recipe.student
    noise = f" (noise {student.noise_level:g})" if student.noise_level else ""
    return plan.scheduler if student.solver == "native" else f"{student.solver}{noise} on the grid of {plan.scheduler}"


def _deployed(plan: Plan) -> str:
    solver = plan.recipe.student.solver
    return f"with {plan.scheduler}'s own step, in evaluation and export: stock pipelines do not know {solver}"


def _numbers(values: tuple[float, ...] | None, form: str) -> str:
    return "decided by the pipeline when it runs" if values is None else " ".join(f"{v:{form}}" for v in values)


def readable(size: int) -> str:
    """Bytes with a unit."""
    power = min(4, int(math.log(max(size, 1), 1024)))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
