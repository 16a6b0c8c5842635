"""What `--dry-run` prints: what is trained, on which grid, at which cost; no weights are loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffopd.footprint import Footprint, footprint
from diffopd.grid import Grid, make_scheduler, side_arguments
from diffopd.preflight import Parts
from diffopd.recipe import Recipe, TeacherSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from diffopd.data import PromptRow
    from diffopd.teacher import TeacherCard

UNCOUNTED = (  # measured: docs/memory.md
    "not in the sum: workspace of kernels, gradients of activations, what teachers compute with; in a measured run the "
    "peak was a third higher, so leave that much room"
)
QUERY_DRAWS = 256  # draws over which the cost of a random query is averaged


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher: its guidance, denoiser evaluations per picture of a walk, prompts, share of the loss.

    turns: its share of an update's pictures, which is not that of the loss where every teacher is asked in each round.
    """

    name: str
    form: str
    guidance_scale: float
    evaluations: float
    train_prompts: int
    test_prompts: int
    share: float
    turns: float
    held_out: str


@dataclass(frozen=True)
class Plan:
    """The resolved plan. Evaluations are denoiser forwards per picture of one walk; guidance may count double."""

    recipe: Recipe
    pipeline_class: str
    scheduler: str
    grid: Grid | None
    num_parameters: int
    student_rows: float
    student_evaluations: float
    teachers: tuple[TeacherPlan, ...]
    pictures_per_update: int
    held: Footprint
    processes: int = 1

    @property
    def visits(self) -> int:
        """States that a walk visits, which some schedulers make more than its steps."""
        return num_visits(self.recipe, self.grid)

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return self.held.trained

    @property
    def memory(self) -> dict[str, int]:
        """Item -> bytes; without an entry for the graph of a pipeline that cannot be rehearsed."""
        return self.held.memory

    @property
    def evaluations_per_update(self) -> tuple[float, float]:
        """Denoiser evaluations (pictures x forwards) of student and teachers in one update."""
        teachers = sum(teacher.turns * teacher.evaluations for teacher in self.teachers)
        return self.pictures_per_update * self.student_evaluations, self.pictures_per_update * teachers


def make_plan(parts: Parts, processes: int = 1) -> Plan:
    """The plan of a checked recipe, trained in so many processes."""
    from diffopd.rehearsal import forwards

    recipe, base = parts.recipe, parts.base
    visits = num_visits(recipe, parts.grid)
    walked, asked = visited(recipe, visits)
    total, number = sum(teacher.weight for teacher in recipe.teachers), len(recipe.teachers)
    draws = {"all": number, "round_robin": 1}.get(recipe.train.tasks_per_update)  # None: as many as it says, by weight
    teachers = []
    told = side_arguments(recipe.student, recipe.student.num_inference_steps)
    rows = forwards(base, make_scheduler(recipe, base), told)
    student = 0.0
    for settings, card in zip(recipe.teachers, parts.cards, strict=True):
        guidance = card.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        is_given = card.form == "pictures"
        told = side_arguments(settings, visits * recipe.objective.substeps, guidance)
        calls = forwards(base, make_scheduler(recipe, base), told)
        prompts = len(parts.train_rows[card.name]), len(parts.test_rows[card.name])
        cost = 0.0 if is_given else asked * recipe.objective.substeps * calls
        share = settings.weight / total
        turns = 1 / number if draws else share
        student += turns * (asked * calls if is_given else walked * rows)
        checked = _held_out(settings, card, parts.test_rows[card.name])
        acting = settings.call.get("true_cfg_scale", guidance)  # as `Call.guidance` has it
        teachers.append(TeacherPlan(card.name, card.form, acting, cost, *prompts, share, turns, checked))
    train = recipe.train
    tasks = draws or train.tasks_per_update
    return Plan(
        recipe=recipe,
        pipeline_class=base.pipeline_class,
        scheduler=recipe.student.scheduler.get("class", base.configs["scheduler"]["_class_name"]),
        grid=parts.grid,
        num_parameters=base.num_parameters(),
        student_rows=rows,
        student_evaluations=student,
        teachers=tuple(teachers),
        pictures_per_update=tasks * train.batch_size * train.gradient_accumulation_steps,
        held=footprint(parts),
        processes=processes,
    )


def num_visits(recipe: Recipe, grid: Grid | None) -> int:
    """States that the student's walk visits; its steps, where only the pipeline knows them."""
    return len(grid.timesteps) if grid else recipe.student.num_inference_steps


def visited(recipe: Recipe, visits: int) -> tuple[float, float]:
    """(states the student is evaluated at, states the teacher is asked at) per walk, means over draws."""
    from diffopd.query import supervised_states

    draws = [
        tuple(supervised_states(recipe.objective.query, visits, seed=(recipe.seed, update, 0)))
        for update in range(QUERY_DRAWS)
    ]
    walked = sum(max(indices) + 1 for indices in draws) / len(draws)
    return walked, sum(map(len, draws)) / len(draws)


def render(plan: Plan) -> RenderableType:
    """The plan as a person reads it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in _facts(plan):
        facts.add_row(name, Text(value))  # a path may have brackets
    teachers = Table(box=None)
    teachers.add_column("teacher", no_wrap=True)
    for name in ("form", "guidance", "evaluations", "prompts", "held out", "share"):
        teachers.add_column(name)
    for teacher in plan.teachers:
        row = (f"{teacher.guidance_scale:g}", f"{teacher.evaluations:g}")
        row += (str(teacher.train_prompts), str(teacher.test_prompts), f"{teacher.share:.2f}")
        teachers.add_row(teacher.name, teacher.form, *row)
    memory = memory_table(plan.memory)
    if plan.held.encoding:
        memory.add_row("before: encoders, until prompts are stored", readable(plan.held.encoding))
    memory.add_row(f"after: evaluation in {plan.recipe.evaluate.dtype}", readable(plan.held.evaluating))
    title = f"Plan of {plan.recipe.name} ({plan.recipe.path})"
    heading = memory_heading(plan)
    unsure = [Text(f"  {sentence}") for sentence in (*plan.held.unsure, UNCOUNTED)]
    return Group(Text(title, "bold"), facts, Text(""), teachers, Text(""), Text(heading, "bold"), memory, *unsure)


def memory_heading(plan: Plan) -> str:
    """What the table of memory is of."""
    heading = f"Memory while training, frozen weights in {plan.recipe.train.frozen_dtype}"
    return heading + ("" if "graph of one state" in plan.memory else ", without activations")


def memory_table(sizes: dict[str, int]) -> Table:
    """A row for each item, and their sum."""
    from rich.table import Table

    memory = Table(box=None, show_header=False, pad_edge=False)
    for name, size in sizes.items():
        memory.add_row(name, readable(size))
    memory.add_row("sum", readable(sum(sizes.values())), style="bold")
    return memory


def _facts(plan: Plan) -> list[tuple[str, str]]:
    student, objective, train = plan.recipe.student, plan.recipe.objective, plan.recipe.train
    of_student, of_teachers = plan.evaluations_per_update
    what = f"LoRA, rank {student.rank}, alpha {student.lora_alpha}" if student.train == "lora" else "all weights"
    if student.init_weights:
        rank = f", {plan.held.adapter}" if plan.held.adapter else ""
        what = f"LoRA that starts as {student.init_weights}{rank}"
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
        *([("scored", f"at {plan.recipe.scored_steps} steps")] if plan.recipe.evaluate.student_steps else []),
        *levels(plan.grid),
        ("objective", f"{objective.name}, query {objective.query}{substeps}, {objective.states} states"),
        ("update", f"{plan.pictures_per_update} pictures a process, learning rate {train.learning_rate:g}"),
        (
            "evaluations",
            f"student {of_student:g}, teachers {of_teachers:g} an update (student with backward)",
        ),
        *([("held-out loss", _validated(plan))] if train.validate_every else []),
        ("ends after", " or ".join(ends)),
        *process_facts(plan.processes),
        ("output_dir", plan.recipe.output_dir),
    ]


def process_facts(processes: int) -> list[tuple[str, str]]:
    """How many processes train, and a remark where the cores of this machine are fewer; nothing of a single one."""
    from diffopd.processes import default_device

    if processes == 1:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes <= cores or default_device() != "cpu":
        return [("processes", str(processes))]
    slow = f"{processes} on {cores} core{'s' * (cores != 1)}: they slow each other down, take at most {cores} here"
    return [("processes", slow)]


def _solver(plan: Plan) -> str:
    student = plan.recipe.student
    noise = f" (noise {student.noise_level:g})" if student.noise_level else ""
    return plan.scheduler if student.solver == "native" else f"{student.solver}{noise} on the grid of {plan.scheduler}"


def _deployed(plan: Plan) -> str:
    solver = plan.recipe.student.solver
    return f"with {plan.scheduler}'s own step, in evaluation and export: stock pipelines do not know {solver}"


HELD_OUT = {
    "test": "test prompts",
    "train": "training rows, as its test rows lack what its context shows,",
    "pictures": "training pictures",
}


def _held_out(settings: TeacherSettings, card: TeacherCard, rows: Sequence[PromptRow]) -> str:
    """Which of `HELD_OUT` a teacher's held-out loss is of, as `Teacher.watched_rows` decides it."""
    from diffopd.context import covers

    if card.form == "pictures":
        return "pictures"
    shows = settings.context.kind if settings.context else None
    return "train" if shows and not all(covers(shows, row) for row in rows) else "test"


def _validated(plan: Plan) -> str:
    train, scored = plan.recipe.train, plan.recipe.evaluate.num_prompts
    checked = [teacher for teacher in plan.teachers if teacher.held_out == "test"]
    few = [f"{t.name} has {t.test_prompts}" for t in checked if t.test_prompts < train.batch_size + scored]
    if len(checked) == len(plan.teachers):
        rows = f"{HELD_OUT['test']} of each teacher"
    else:
        rows = ", ".join(f"{HELD_OUT[teacher.held_out]} of {teacher.name}" for teacher in plan.teachers)
    told = f"every {train.validate_every} updates, on the last {train.batch_size} {rows}"
    return told + (f"; some are scored by evaluation, too, as {', '.join(few)} in all" if few else "")


def levels(grid: Grid | None) -> list[tuple[str, str]]:
    """The timesteps and noise levels of a walk."""
    return [
        ("timesteps", _numbers(grid.timesteps if grid else None, "g")),
        ("sigmas", _numbers(grid.sigmas if grid else None, ".3f")),
    ]


def _numbers(values: tuple[float, ...] | None, form: str) -> str:
    return "decided by the pipeline when it runs" if values is None else " ".join(f"{v:{form}}" for v in values)


def readable(size: int) -> str:
    """Bytes with a unit."""
    power = min(4, int(math.log(max(size, 1), 1024)))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
