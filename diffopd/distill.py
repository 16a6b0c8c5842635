"""THE loop: every published method is a row of choices in the recipe; nothing here knows a method's name.

One update: for each task its prompts -> the student walks -> its teacher is held at the student's states -> each
state is compared and backed at once -> one reduction, one optimizer step. To resume, give the same command again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffopd import noise
from diffopd.adapters import Fold, autocast_forward, fused_forward
from diffopd.assemble import Student, Teacher, assemble
from diffopd.attention import proof_of_use
from diffopd.batches import MicroBatch, Size, micro_batches
from diffopd.checkpoint import Progress, Trained, averaged, load_checkpoint
from diffopd.data import PromptRow
from diffopd.data_states import as_states, encode_pictures, next_place, noised
from diffopd.drive import Call, Survey, denoiser_of, survey
from diffopd.errors import UserError
from diffopd.log import TrainingLog
from diffopd.loop import INTERRUPTED, new_trained, one_fold, refuse_non_finite_norm, run_updates
from diffopd.objective import OBJECTIVES, get_objective
from diffopd.processes import Processes, default_device, join_processes
from diffopd.query import supervised_states
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Manner, NonFiniteLoss, StateLoss, Watch, supervise
from diffopd.trajectory import save_trajectory

if TYPE_CHECKING:
    from diffopd.looks import Looks

VALIDATION = 2**31  # noise keys of held-out batches: no update of a run ever has this number
INITIAL = 0  # solver-step key of the initial latents; the step from state i draws with key i + 1


@dataclass
class Run:
    """What one update needs: the cast, the manner of walking, and where rows and noise come from."""

    recipe: Recipe
    student: Student
    teachers: list[Teacher]
    walk: Survey
    processes: Processes
    device: str
    walks: dict[tuple[Size | None, str | None], Survey] = field(default_factory=dict)
    looks: Looks | None = None
    fold: Fold | None = None
    latents: dict[tuple[str, Size | None], Tensor] = field(default_factory=dict)

    def walk_at(self, size: Size | None, teacher: Teacher | None = None) -> Survey:
        """The student's walk over pictures of (width, height), as deployed or as a teacher has it (`side`).

        size None is the pipeline's own.
        """
        key = size, teacher.name if teacher and teacher.is_given else None
        if key == (None, None):
            return self.walk
        if key not in self.walks:
            call = (self.side(teacher) if teacher else self.student.call).told(**told_size(size))
            self.walks[key] = survey(call.prompted([self.teachers[0].train_rows[0].prompt]))
        return self.walks[key]

    def side(self, teacher: Teacher) -> Call:
        """The student's call while this teacher teaches: as deployed, but at noised pictures."""
        return teacher.call if teacher.is_given else self.student.call

    @property
    def rows_per_task(self) -> int:
        """Pictures of a task's turn in one update, over all micro-batches and processes."""
        train = self.recipe.train
        return train.batch_size * train.gradient_accumulation_steps * self.processes.world


def distill(recipe: Recipe, folder: RunFolder, begin: Callable[[Run, bool], None] | None = None) -> bool:
    """Run or resume a recipe in its folder: train, log, checkpoint; ends with a checkpoint and sample pictures.

    begin(run, is_new): called once before the first update, with whether nothing has been trained yet.

    Returns whether the run came to its end (False after Ctrl-C).

    Raises UserError for anything wrong with the recipe's parts, a teacher whose first predictions are not finite or
    whose grid does not nest, and for a loss that stops being finite (the last checkpoint stays).
    """
    processes = join_processes()
    device = default_device()
    student, teachers = assemble(recipe, device, processes)
    run = Run(recipe, student, teachers, _survey(student, teachers), processes, device)
    trained = new_trained(run)
    latest = folder.latest_checkpoint() if recipe.train.resume_from_checkpoint == "latest" else None
    if latest:
        load_checkpoint(latest, trained)
        _follow(run, trained, moved=False)
    with ExitStack() as stack:
        dtype = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else None
        denoisers = {id(d): d for d in (denoiser_of(s.call.pipeline) for s in (student, *teachers))}.values()
        for denoiser in denoisers:
            stack.enter_context(autocast_forward(denoiser, dtype))
        if recipe.train.fuse_student:
            run.fold = stack.enter_context(fused_forward(denoiser_of(student.pipeline)))
        with proof_of_use(recipe.train.attention_backend, *denoisers):
            preflight(run)
        if begin:
            begin(run, latest is None)
        log = stack.enter_context(TrainingLog(folder, recipe, trained.progress, is_main=processes.is_main))
        if latest is None and student.left_out is not None:
            log.begins(student.left_out)
        reason = run_updates(run, trained, folder, log, one_update, _validate)
        log.stop(reason)
        if processes.is_main and reason != INTERRUPTED:
            with averaged(trained), student.decoding():
                save_trajectory(run, folder)
    processes.wait()
    return reason != INTERRUPTED


def preflight(run: Run) -> dict[str, float]:
    """One walk per teacher without gradients: grids nest, predictions are finite. Returns the first loss of each.

    Raises UserError naming the teacher and what is wrong.
    """
    first = {}
    for slot, teacher in enumerate(run.teachers):
        rows = teacher.train_rows[: run.recipe.train.batch_size]
        try:
            first[teacher.name] = loss_without_training(run, teacher, rows, update=VALIDATION + 1, slot=slot)
        except ValueError as error:
            raise UserError(f"Teacher {teacher.name!r} cannot teach this student: {error}") from error
    return first


def one_update(run: Run, trained: Trained, watch: Watch) -> UpdateLosses:
    """All tasks of one round, gradients accumulated; one reduction, one clip, one optimizer step.

    The loss is the mean over rows and over a row's supervised states, and the sum over tasks by share. The paper's
    losses (Eq. 11 and 12, DiffusionOPD) sum over states: its gradient is ours times their number, which Adam does
    not see but `max_grad_norm` does.

    Raises UserError at the first loss or gradient that is not finite, before the optimizer has moved.
    """
    update, train = trained.progress.update, run.recipe.train
    trained.optimizer.zero_grad(set_to_none=True)
    tasks = route(run.recipe, run.teachers, update)
    record = UpdateLosses()
    with one_fold(run, watch):
        for slot, (teacher, share) in enumerate(tasks):
            _back_task(run, teacher, share / run.rows_per_task, record, update=update, slot=slot, watch=watch)
    with watch("optimizer"):
        run.processes.sum_gradients(trained.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters.values(), train.max_grad_norm)
        refuse_non_finite_norm(norm, [teacher.name for teacher, _ in tasks], update)
        for group in trained.optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_factor(run.recipe, trained.progress)
        trained.optimizer.step()
        _follow(run, trained, moved=True)
    record.grad_norm = float(norm)
    trained.progress.images += run.rows_per_task * len(tasks)
    return record.reduced(run.processes)


def _back_task(
    run: Run, teacher: Teacher, scale: float, record: UpdateLosses, *, update: int, slot: int, watch: Watch
) -> None:
    """All micro-batches of one task, their losses times `scale` backed and recorded."""

    def backward(loss: Tensor) -> None:
        (loss.sum() * scale).backward()

    mine = run.processes.rows(run.rows_per_task)
    picked = [(number, pick_row(run, teacher, update, slot, number)) for number in mine]
    for numbers, rows in batches_of(run, teacher, picked):
        losses = walk_rows(run, teacher, rows, numbers, update=update, slot=slot, backward=backward, watch=watch)
        record.add(teacher.name, _pooled(losses) if teacher.is_given else losses, len(rows))


def _pooled(losses: list[StateLoss]) -> list[StateLoss]:
    """Losses of rows with noise levels of their own as one of state 0: what is logged has the same states always."""
    mean = torch.stack([state.loss for state in losses]).mean(0)
    return [StateLoss(0, losses[0].sigma, mean)]


class UpdateLosses:
    """Losses of one update: per teacher, and per teacher and state, means over rows."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], float] = {}
        self.rows: dict[tuple[str, int], int] = {}
        self.grad_norm = 0.0

    def add(self, teacher: str, losses: list[StateLoss], rows: int) -> None:
        """Add one micro-batch."""
        for state in losses:
            key = teacher, state.index
            self.sums[key] = self.sums.get(key, 0.0) + float(state.loss.double().sum())
            self.rows[key] = self.rows.get(key, 0) + rows

    def per_step(self) -> dict[str, dict[int, float]]:
        """teacher -> state index -> mean loss."""
        found: dict[str, dict[int, float]] = {teacher: {} for teacher, _ in self.sums}
        for (teacher, index), value in sorted(self.sums.items(), key=lambda item: item[0][1]):
            found[teacher][index] = value / self.rows[teacher, index]
        return found

    def per_teacher(self) -> dict[str, float]:
        """teacher -> mean over its supervised states."""
        return {t: sum(s.values()) / len(s) for t, s in self.per_step().items()}

    def mean(self) -> float:
        """Mean over teachers."""
        values = self.per_teacher().values()
        return sum(values) / len(values)

    def reduced(self, processes: Processes) -> UpdateLosses:
        """Summed over processes (every process walks the same tasks)."""
        if processes.world > 1:
            keys = list(self.sums)
            flat = torch.tensor([*self.sums.values(), *map(float, self.rows.values())], dtype=torch.float64)
            flat = processes.sum(flat).tolist()
            self.sums = dict(zip(keys, flat, strict=False))
            self.rows = dict(zip(keys, map(int, flat[len(keys) :]), strict=True))
        return self


def route(recipe: Recipe, teachers: list[Teacher], update: int) -> list[tuple[Teacher, float]]:
    """The tasks of a round with their shares of the loss: a pure function of (seed, update), never of a counter.

    "all": every teacher, weight = its share. "round_robin": one teacher, each once in every len(teachers) updates,
    in another order each time. A number: that many draws with probabilities by weight.
    """
    total = sum(t.weight for t in teachers)
    draws = recipe.train.tasks_per_update
    if draws == "all":
        return [(t, t.weight / total) for t in teachers]
    if draws == "round_robin":
        cycle, turn = divmod(update, len(teachers))
        return [(teachers[noise.permuted(turn, len(teachers), recipe.seed, "round_robin", cycle)], 1.0)]
    weights = [t.weight for t in teachers]
    chosen = [noise.choose(weights, recipe.seed, update, slot) for slot in range(draws)]
    return [(teachers[index], 1.0 / draws) for index in chosen]


def pick_row(run: Run, teacher: Teacher, update: int, slot: int, number: int) -> PromptRow:
    """The prompt of one row, a function of integers: every pass over the file is a fresh permutation.

    A teacher whose turn comes in every round ("all", "round_robin") meets each prompt once a pass. Where tasks are
    drawn by weight, the pass goes on in the rounds in which a teacher is not drawn, and it misses those prompts.
    """
    draws, rows = run.recipe.train.tasks_per_update, teacher.train_rows
    turns = {"all": update, "round_robin": update // len(run.teachers)}
    rounds = turns[draws] if draws in turns else update * draws + slot  # a task may be drawn twice in one update
    epoch, place = divmod(rounds * run.rows_per_task + number, len(rows))
    return rows[noise.permuted(place, len(rows), run.recipe.seed, epoch, teacher.name)]


def walk_rows(
    run: Run,
    teacher: Teacher,
    rows: list[PromptRow],
    numbers: list[int],
    *,
    update: int,
    slot: int,
    backward: Callable[[Tensor], None] | None,
    watch: Watch | None = None,
    **options: object,
) -> list[StateLoss]:
    """One micro-batch (rows of one size) under a teacher: `supervise`, with noise that is a function of integers."""
    recipe, size, watch = run.recipe, rows[0].bucket, watch or Watch()
    walk, told = run.walk_at(size, teacher), told_size(size)
    samples = [slot * run.rows_per_task + number for number in numbers]

    def drawn(solver_step: int, shape: tuple[int, ...] = walk.shape) -> Tensor:
        keys = {"run_seed": recipe.seed, "update": update, "solver_step": solver_step, "sample_indices": samples}
        return noise.draw(shape, **keys).to(run.device)

    latents, options = drawn(INITIAL, walk.latents_shape), dict(options)
    prompts, context, keys = [row.prompt for row in rows], teacher.context, numbers if teacher.is_given else ()
    pictures = None
    if teacher.is_given or recipe.objective.states == "data":
        with watch("pictures"):
            encoded = _encoded(run, teacher, rows)
        latents = noised(encoded, latents, walk.place)
        pictures = as_states(run.student.pipeline, encoded)
        options["data_states"] = lambda visit: noised(pictures, drawn(visit.index + 1), next_place(visit))
    told |= {"latents": latents}
    held = teacher.call.prompted(context.prompts(rows), **told, **context.arguments(rows))
    try:
        return supervise(
            run.side(teacher).prompted(prompts, **told),
            pictures if teacher.is_given else held,
            manner=manner_of(recipe, walk.num_visits, update, slot, *keys),
            noise=lambda index: drawn(index + 1),
            backward=backward,
            watch=watch,
            **options,
        )
    except NonFiniteLoss as error:
        raise _non_finite(error, teacher.name, update) from error


def _encoded(run: Run, teacher: Teacher, rows: list[PromptRow]) -> Tensor:
    """Latents (B, ...) of the rows' pictures; of pictures that teach, which are few, they are made once a run."""
    if not teacher.is_given:
        return encode_pictures(run.student.pipeline, rows)
    keys = [(row.metadata["file_name"], row.bucket) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        if key not in run.latents:
            run.latents[key] = encode_pictures(run.student.pipeline, [row])
    return torch.cat([run.latents[key] for key in keys])


def loss_without_training(run: Run, teacher: Teacher, rows: list[PromptRow], *, update: int, slot: int) -> float:
    """Mean loss over rows and their supervised states, without gradients; update and slot key the noise."""
    total = 0.0
    for numbers, batch in batches_of(run, teacher, list(enumerate(rows))):
        total += len(batch) * _mean(walk_rows(run, teacher, batch, numbers, update=update, slot=slot, backward=None))
    return total / len(rows)


def batches_of(run: Run, teacher: Teacher, rows: list[tuple[int, PromptRow]]) -> list[MicroBatch]:
    """Numbered rows as the calls of this teacher and this run can take them."""
    most = min(run.recipe.train.batch_size, teacher.context.rows_per_call or run.recipe.train.batch_size)
    return micro_batches(rows, most)


def told_size(size: Size | None) -> dict[str, int]:
    """A picture's (width, height) as arguments of a call, none for the pipeline's own size."""
    return {"width": size[0], "height": size[1]} if size else {}


def manner_of(
    recipe: Recipe, num_visits: int, update: int, slot: int, *rows: int, among: Sequence[int] | None = None
) -> Manner:
    """How this micro-batch walks and is compared.

    Queries are drawn from (seed, update, slot): all micro-batches and processes of a task's turn supervise the same
    states, so that a gradient does not depend on how its batch is split. rows: further integers to draw from, where
    each row of a batch has states of its own. among: states that a random query draws from, else all.
    """
    objective = recipe.objective
    return Manner(
        objective=get_objective(objective.name, objective.final_step, recipe.student.solver),
        indices=supervised_states(objective.query, num_visits, seed=(recipe.seed, update, slot, *rows), among=among),
        solver=recipe.student.solver,
        noise_level=recipe.student.noise_level,
        substeps=objective.substeps,
        substep_solver=objective.substep_solver,
        step_weights=objective.step_weights,
        two_pass=recipe.train.mode == "two_pass",
        needs_branches=OBJECTIVES[objective.name].needs_branches,
    )


def learning_rate_factor(recipe: Recipe, progress: Progress) -> float:
    """Warm-up times schedule, in (0, 1]; cosine falls over updates or seconds, whichever ends the run first."""
    train = recipe.train
    warm = min(1.0, (progress.update + 1) / train.lr_warmup_steps) if train.lr_warmup_steps else 1.0
    if train.lr_scheduler == "constant":
        return warm
    done = [progress.update / train.max_train_steps] if train.max_train_steps else []
    done += [progress.seconds / train.max_train_seconds] if train.max_train_seconds else []
    return warm * max(0.5 * (1 + math.cos(math.pi * min(1.0, max(done)))), 1e-3)


def _survey(student: Student, teachers: list[Teacher]) -> Survey:
    return survey(student.call.prompted([teachers[0].train_rows[0].prompt]))


def _follow(run: Run, trained: Trained, *, moved: bool) -> None:
    """Averages and self-teachers follow the student (after an update), or are only written out (after a resume)."""
    if moved and trained.average:
        trained.average.update(trained.parameters)
    for teacher in run.teachers:
        if teacher.follow:
            average, written = teacher.follow
            if moved:
                average.update(trained.parameters)
            average.copy_to(written)


def _validate(run: Run, trained: Trained) -> dict[str, float]:
    """Held-out distillation loss per teacher: the same test prompts and noise every time, averaged weights if kept.

    A best loss of other prompts, as in checkpoints of earlier versions, is none: the count begins anew.
    """
    losses, asked = {}, []
    with averaged(trained):
        for slot, teacher in enumerate(run.teachers):
            rows = teacher.validation_rows(run.recipe.train.batch_size)
            losses[teacher.name] = loss_without_training(run, teacher, rows, update=VALIDATION, slot=slot)
            asked += [teacher.name, *(row.prompt for row in rows)]
    progress, mean, validated = trained.progress, sum(losses.values()) / len(losses), noise.hash_of(*asked)
    if progress.best_validation is None or progress.validated != validated or mean < progress.best_validation:
        progress.best_validation, progress.checks_since_best, progress.validated = mean, 0, validated
    else:
        progress.checks_since_best += 1
    return losses


def _non_finite(error: NonFiniteLoss, teacher: str, update: int) -> UserError:
    when = f"update {update}" if update < VALIDATION else "a check without training"
    return UserError(
        f"The loss against teacher {teacher!r} is not finite at {when}, step {error.index} (sigma {error.sigma:.4f}). "
        "Nothing was written after the last checkpoint. Lower learning_rate or use mixed_precision = 'no'; if it "
        "happens before the first update, the teacher itself is broken."
    )


def _mean(losses: list[StateLoss]) -> float:
    return sum(float(state.loss.double().mean()) for state in losses) / len(losses)


__all__ = ["Call", "Run", "UpdateLosses", "distill", "one_update", "preflight", "route"]
