"""What a run says while it trains: a progress bar for the person, rows of metrics.jsonl for everything else."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diffopd.checkpoint import Progress
from diffopd.errors import UserError
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch

if TYPE_CHECKING:
    from diffopd.distill import UpdateLosses

BESIDE_LOSSES = 66  # columns that the rest of the bar takes


class TrainingLog:
    """Open while a run trains. Only the main process shows and writes anything.

    Without a terminal there is no bar, and each held-out check prints a line.
    """

    title = "distill"

    def __init__(self, folder: RunFolder, recipe: Recipe, progress: Progress, *, is_main: bool) -> None:
        self._folder, self._progress, self._is_main = folder, progress, is_main
        self._train = train = recipe.train
        self._by_time = not train.max_train_steps
        self._total = (
            train.max_train_seconds if self._by_time else train.max_train_steps
        ) or None  # None: no end is known
        self._last = time.monotonic()
        self._smooth: dict[str, float] = {}
        self._rate: float | None = None
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
        )
        self._trackers = start_trackers(train.report_to, recipe, folder) if is_main else []
        self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not is_main)
        self._task = self._bar.add_task(self.title, total=self._total, completed=self._done(), note="")

    def __enter__(self) -> TrainingLog:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        for tracker in self._trackers:
            tracker.finish()

    def begins(self, left_out: float) -> None:
        """The student starts as the average of its teachers, but for what its rank leaves out (relative error)."""
        self._write(kind="begin", update=0, begin_from="teacher_average", left_out=left_out)
        if self._is_main:
            text = f"The student begins as its teachers' average, but for {left_out:.1%} that its rank cannot hold."
            self._bar.console.print(text)

    def update(self, losses: UpdateLosses, learning_rate: float, watch: Watch) -> None:
        """One finished update: a row in metrics.jsonl, the bar moves."""
        per_teacher, per_step = losses.per_teacher(), losses.per_step()
        self._write(
            kind="update",
            update=self._progress.update,
            seconds=round(self._progress.seconds, 3),
            loss=losses.mean(),
            loss_per_teacher=per_teacher,
            loss_per_step={teacher: list(states.values()) for teacher, states in per_step.items()},
            steps={teacher: list(states) for teacher, states in per_step.items()},
            grad_norm=losses.grad_norm,
            learning_rate=learning_rate,
            images=self._progress.images,
            network_calls=dict(watch.evaluations),
            stage_seconds={stage: round(value, 4) for stage, value in watch.seconds.items()},
        )
        self._show(per_teacher)

    def validation(self, per_teacher: dict[str, float]) -> None:
        """The held-out distillation loss."""
        mean = sum(per_teacher.values()) / len(per_teacher)
        place = {"update": self._progress.update, "seconds": round(self._progress.seconds, 3)}
        self._write(kind="validation", **place, loss=mean, loss_per_teacher=per_teacher)
        self._say(f"held-out {mean:.4f}")

    def look(self, values: dict[str, float]) -> None:
        """What pictures drawn at this moment say."""
        place = {"update": self._progress.update, "seconds": round(self._progress.seconds, 3)}
        self._write(kind="look", **place, **{name: round(value, 6) for name, value in values.items()})

    def stop(self, reason: str) -> None:
        """Why the run ended."""
        self._write(kind="stop", update=self._progress.update, seconds=round(self._progress.seconds, 3), reason=reason)
        if self._is_main:
            count = self._progress.update
            self._bar.console.print(f"Stopped after {count} update{'s' * (count != 1)}: {reason}.")

    def _write(self, **row: Any) -> None:
        if self._is_main:
            self._folder.append_metrics(row)
        for tracker in self._trackers:
            tracker.log(scalars(row), step=row["update"])

    def _done(self) -> float:
        return self._progress.seconds if self._by_time else self._progress.update

    def _say(self, measured: str) -> None:
        """One plain line, where no terminal shows the bar."""
        if not self._is_main or self._bar.console.is_terminal:
            return
        left = self._seconds_left()
        parts = [f"{self.title} update {self._progress.update}", self._losses(), measured]
        parts += [f"about {timedelta(seconds=round(left))} left"] if left is not None else []
        self._bar.console.print(" | ".join(filter(None, parts)), soft_wrap=True, highlight=False)

    def _seconds_left(self) -> float | None:
        """Of training until the first bound of the recipe; None where none is known yet."""
        train, progress = self._train, self._progress
        left = [train.max_train_seconds - progress.seconds] if train.max_train_seconds else []
        if train.max_train_steps and progress.update:
            left.append((train.max_train_steps - progress.update) * progress.seconds / progress.update)
        return max(0.0, min(left)) if left else None

    def _losses(self) -> str:
        return " ".join(f"{name} {value:.4f}" for name, value in self._smooth.items())

    def _show(self, per_teacher: dict[str, float]) -> None:
        now = time.monotonic()
        rate = 1.0 / max(now - self._last, 1e-9)
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        self._last = now
        for name, value in per_teacher.items():
            self._smooth[name] = 0.9 * self._smooth.get(name, value) + 0.1 * value
        shown = self._losses()
        is_cut = len(shown) > self._bar.console.width - BESIDE_LOSSES  # columns that do not fit are, the clock first
        if is_cut and len(self._smooth) > 1:
            shown = f"mean {sum(self._smooth.values()) / len(self._smooth):.4f}"
        note = f"{self._progress.update} | {shown} | {self._rate:.2f}/s"
        self._bar.update(self._task, completed=self._done(), note=note)


def start_trackers(names: list[str], recipe: Recipe, folder: RunFolder) -> list[Any]:
    """accelerate's trackers by name. Raises UserError for one whose package is not installed."""
    if not names:
        return []
    from accelerate import PartialState, tracking

    PartialState()  # its trackers ask it which process they are in
    kinds = {
        "tensorboard": lambda: tracking.TensorBoardTracker(recipe.name, logging_dir=folder.path / "tensorboard"),
        "wandb": lambda: tracking.WandBTracker(recipe.name),
        "trackio": lambda: tracking.TrackioTracker(recipe.name),
    }
    started = []
    for name in names:
        try:
            tracker = kinds[name]()
            tracker.start()
        except ImportError as error:
            raise UserError(f"train.report_to names {name!r}: pip install 'diffopd[{name}]' or remove it.") from error
        started.append(tracker)
    return started


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row under flat names, "update/loss_per_teacher/text"."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{row['kind']}/{key}/{k}": float(v) for k, v in value.items() if isinstance(v, (int, float))}
        elif isinstance(value, (int, float)) and key != "update":
            flat[f"{row['kind']}/{key}"] = float(value)
    return flat
