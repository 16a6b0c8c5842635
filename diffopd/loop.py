"""From the first update to a reason to stop: what distillation, tuning and teaching have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffopd.adapters import Average
from diffopd.checkpoint import Progress, Trained, averaged, save_checkpoint
from diffopd.errors import UserError
from diffopd.interrupt import deferred_interrupt
from diffopd.log import TrainingLog
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch

if TYPE_CHECKING:
    from diffopd.distill import Run
    from diffopd.teach_run import TeachRun

    Runnable = Run | TeachRun

INTERRUPTED = "Ctrl-C; the same command goes on from here"
STOPPING = "\nCtrl-C: this update is finished and saved first. Once more stops at once, without saving.\n"


def new_trained(run: Runnable) -> Trained:
    """What is trained, before the first update: the student, AdamW, and the averages that the recipe keeps."""
    train, student = run.recipe.train, run.student
    optimizer = torch.optim.AdamW(
        student.parameters.values(),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )
    average = Average(student.parameters, train.ema_decay) if train.ema_decay else None
    followed = [teacher.follow[0] for teacher in run.teachers if teacher.follow]
    return Trained(student.pipeline, student.parameters, optimizer, average, *followed[:1], is_lora=student.is_lora)


def one_fold(run: Runnable, watch: Watch) -> AbstractContextManager[None]:
    """Open it where no weight changes, around forwards and backwards: a fused student folds its adapter once in it."""
    return run.fold.once(watch("backward")) if run.fold else nullcontext()


def run_updates(
    run: Runnable,
    trained: Trained,
    folder: RunFolder,
    log: TrainingLog,
    one_update: Callable[[Any, Trained, Watch], Any],
    validate: Callable[[Any, Trained], Any],
) -> str:
    """Train until a reason to stop; returns it. Ctrl-C, in any process, saves and stops after the update in hand.

    one_update, validate: what the run is for; what they return is the log's.
    """
    progress, train = trained.progress, run.recipe.train
    began = time.monotonic() - progress.seconds
    reason = _finished(run, progress)
    with deferred_interrupt(STOPPING if run.processes.is_main else "") as interrupt:
        while reason is None:
            watch = Watch()
            losses = one_update(run, trained, watch)
            watch.evaluations = run.processes.sum_counts(watch.evaluations)
            progress.update += 1
            progress.seconds = run.processes.of_main(time.monotonic() - began)  # schedules must not differ
            log.update(losses, trained.optimizer.param_groups[0]["lr"], watch)
            if train.validate_every and progress.update % train.validate_every == 0:
                log.validation(validate(run, trained))
            is_looked_at = bool(run.looks) and progress.update % run.looks.every == 0
            if is_looked_at:
                _look(run, trained, log)
            reason = INTERRUPTED if run.processes.agree(interrupt.asked) else _finished(run, progress)
            if run.looks and not is_looked_at and reason not in (None, INTERRUPTED):  # at what is deployed
                _look(run, trained, log)
                reason = run.looks.reason or reason
            if reason is None and progress.update % train.checkpointing_steps == 0:
                _save(run, trained, folder)
        _save(run, trained, folder)
        return INTERRUPTED if run.processes.agree(interrupt.asked) else reason


def refuse_non_finite_norm(norm: Tensor, teachers: list[str], update: int) -> None:
    """Raise UserError for a gradient that is not finite; call it before the optimizer moves."""
    if not bool(torch.isfinite(norm)):
        names = ", ".join(dict.fromkeys(map(repr, teachers)))
        raise UserError(
            f"The gradient is not finite at update {update} (teachers {names}), though every loss is. The student's "
            "weights have not moved and nothing was written after the last checkpoint. Lower learning_rate or use "
            "mixed_precision = 'no'."
        )


def _finished(run: Runnable, progress: Progress) -> str | None:
    train = run.recipe.train
    if train.max_train_steps and progress.update >= train.max_train_steps:
        return f"reached max_train_steps = {train.max_train_steps}"
    late = bool(train.max_train_seconds) and progress.seconds >= train.max_train_seconds
    if run.processes.agree(late):
        return f"reached max_train_seconds = {train.max_train_seconds:g}"
    why = run.looks.reason if run.looks else None
    if run.processes.agree(bool(why)):
        return why or "another process saw a collapse"
    tired = bool(train.patience) and progress.checks_since_best >= train.patience
    if run.processes.agree(tired):
        return f"the held-out loss has not fallen for {train.patience} checks"
    return None


def _look(run: Runnable, trained: Trained, log: TrainingLog) -> None:
    with averaged(trained):
        log.look(run.looks.look(run, trained.progress.update))


def _save(run: Runnable, trained: Trained, folder: RunFolder) -> None:
    if run.processes.is_main:
        save_checkpoint(folder.path / f"checkpoint-{trained.progress.update}", trained)
    run.processes.wait()
