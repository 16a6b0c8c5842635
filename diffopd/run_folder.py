"""The folder of one run: what was asked (recipe.toml, recipe.json), what happened (metrics.jsonl), weights.

A folder belongs to one recipe: another recipe, or another teacher behind the same name, is refused.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffopd import __version__
from diffopd.disk import DiskError, reason, writing
from diffopd.errors import UserError
from diffopd.recipe import Recipe, from_resolved
from diffopd.settings import Source

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Settings that a resumed run may change: they say when to stop, save or score, not what an update computes (but see
# SCHEDULE).
FREE_TO_CHANGE = {
    "output_dir",
    "evaluate",
    "train.max_train_steps",
    "train.max_train_seconds",
    "train.checkpointing_steps",
    "train.validate_every",
    "train.patience",
    "train.resume_from_checkpoint",
    "train.mode",
    "train.report_to",
    "train.attention_backend",
}
LOCK = ".lock"  # of the process at work here; one that was killed leaves it behind, unlocked
# What may lie in the folder before its run: a task made from pictures, and what is found out before the first update.
PREPARED = {LOCK, "task", "teacher-check.png", "teacher-check.json", "cost.json"}
BEGUN = ("recipe.toml", "recipe.json")
# What a start besides leaves that failed in its first update: made anew by the next one.
STARTED = (*BEGUN, "metrics.jsonl", "looks", "tensorboard")
NOTHING = "Nothing was written."
SCHEDULE = {"train.max_train_steps", "train.max_train_seconds"}  # fixed where a recipe's `fixed_length` says why


@dataclass(frozen=True)
class RunFolder:
    """`path` exists and holds recipe.toml and recipe.json once made by `create`."""

    path: Path

    @classmethod
    def at(cls, path: Path | str) -> RunFolder:
        """The folder at a path that holds a run or nothing yet. Raises UserError for a file or other files."""
        folder = cls(Path(path))
        if folder.path.is_file():
            raise UserError(
                f"output_dir {folder.path} is a file. Nothing was written; name a folder with --output-dir."
            )
        if folder.path.exists() and not (folder.path / "recipe.json").is_file() and not _is_free(folder.path):
            raise UserError(
                f"output_dir {folder.path} is not empty and holds no run. Nothing was written; "
                "name a new folder with --output-dir."
            )
        return folder

    @classmethod
    def check(cls, path: Path | str, recipe: Recipe, hashes: dict[str, str], processes: int = 1) -> RunFolder:
        """The folder of a run, not yet made or begun by this recipe; nothing is written.

        hashes: file -> sha256 of all that the run begins with. processes: how many train, each with its own batch.
        Raises UserError for a folder that holds anything else: other files, another recipe's run, a run with other
        weights or prompts, a run of another number of processes.
        """
        folder = cls.at(path)
        if has_begun(folder.path):
            folder._refuse_another_run(recipe, hashes, processes)
        return folder

    @classmethod
    def create(cls, path: Path | str, recipe: Recipe, hashes: dict[str, str], processes: int = 1) -> RunFolder:
        """Make the folder of a run, or take up the one that this recipe began. Raises UserError as `check`."""
        folder = cls.check(path, recipe, hashes, processes)
        stored = {"recipe": recipe.resolved(), "source": str(recipe.path), "hashes": hashes, "processes": processes}
        try:
            if (folder.path / "recipe.json").is_file():
                folder._forget_rows_after(folder.latest_checkpoint())
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write("recipe.toml", recipe.source_text)
            folder.write("recipe.json", json.dumps(stored | {"versions": versions()}, indent=2) + "\n")
        except (OSError, DiskError) as error:
            why = reason(error.__cause__ or error)
            raise UserError(
                f"output_dir {folder.path} cannot be written ({why}). Name another with --output-dir."
            ) from error
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of an existing run. Raises UserError for one that holds none; its methods do for broken files."""
        folder = cls(Path(path))
        if not (folder.path / "recipe.json").is_file():
            runs = [str(found.parent) for found in sorted(folder.path.parent.glob("*/recipe.json"))]
            known = f" Runs beside it: {', '.join(runs)}." if runs else ""
            raise UserError(
                f"{folder.path} is not a run folder, it has no recipe.json.{known} "
                "Give the output_dir of a `diffopd distill`."
            )
        return folder

    def write(self, name: str, content: str | bytes) -> Path:
        """`content` as a file of this folder, whole or not at all."""
        return atomic_write(self.path / name, content)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One more row of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with writing(path, self.kept()), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a crash cut short is left out.

        Raises UserError for another line that is no JSON.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [_json(line, f"{path}:{number}", "Remove that line") for number, line in enumerate(lines, start=1)]

    def checkpoints(self) -> dict[int, Path]:
        """update -> finished checkpoint, increasing."""
        found = [path for path in self.path.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        return {_update_of(path): path for path in sorted(found, key=_update_of)}

    def latest_checkpoint(self) -> Path | None:
        """The finished checkpoint-N with the highest N, None where there is none."""
        return next(reversed(self.checkpoints().values()), None)

    def kept(self) -> str:
        """What of a run is on the disk, a sentence for whoever sees it end before its end."""
        latest = self.latest_checkpoint()
        if latest:
            return f"{latest} is whole, and the same command goes on from it."
        return f"{self.path} has no checkpoint yet; the same command begins anew." if self.path.exists() else NOTHING

    def recipe(self) -> Recipe:
        """The recipe as it was resolved when the run was made or taken up. Raises UserError for a run of teach."""
        stored, text = self._stored(), (self.path / "recipe.toml").read_text(encoding="utf-8")
        if "estimator" in stored["recipe"]:
            raise UserError(
                f"{self.path} is a run of `diffopd teach`, which has no student to evaluate, export or report. Its "
                "weights are in its last checkpoint; name the teacher in a recipe and distill it."
            )
        return from_resolved(stored["recipe"], Source(Path(stored["source"]), text, {}))

    def refuse_untrained(self) -> None:
        """Raise UserError for a run without a student: one that has no checkpoint yet, or one of teach."""
        self.recipe()
        if self.latest_checkpoint() is None:
            raise UserError(f"{self.path}: has no checkpoint yet. Train it first: `diffopd distill` or `tune`.")

    def finish(self) -> None:
        """Note that the run, as its recipe and checkpoint stand now, is trained, evaluated, exported and reported."""
        self.write("finished.json", json.dumps(self._standing(self._stored()["recipe"]), indent=1))

    def collapsed(self) -> str | None:
        """Why the looks of a tuning run stopped it, where that was a collapse: what it left is not to be used."""
        stops = [row["reason"] for row in self.metrics() if row["kind"] == "stop"]
        return stops[-1] if stops and "collapse" in stops[-1].split(":")[0] else None

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether this very recipe was finished here (`finish`) and what it made is still there."""
        file, made = self.path / "finished.json", ("export", "evaluation/scores.json", "report.html")
        if not file.is_file() or not all((self.path / name).exists() for name in made):
            return False
        return json.loads(file.read_text(encoding="utf-8")) == self._standing(recipe.resolved())

    def _standing(self, resolved: dict[str, Any]) -> dict[str, Any]:
        checkpoint = self.latest_checkpoint()
        return {"checkpoint": checkpoint.name if checkpoint else None, "recipe": resolved}

    def resolved(self) -> dict[str, Any]:
        """The settings of this run, of any command, as they were resolved when it was made."""
        return self._stored()["recipe"]

    def hashes(self) -> dict[str, str]:
        """file -> sha256 of all that the run began with: weights, configs, prompts, rewards."""
        return self._stored()["hashes"]

    def versions(self) -> dict[str, str]:
        """library -> version of the latest start."""
        return self._stored()["versions"]

    def _stored(self) -> dict[str, Any]:
        file = self.path / "recipe.json"
        remedy = "Restore the file; without it nothing tells what this run was, so otherwise train it anew elsewhere"
        return _json(file.read_text(encoding="utf-8"), str(file), remedy)

    def _refuse_another_run(self, recipe: Recipe, hashes: dict[str, str], processes: int) -> None:
        stored = self._stored()
        fixed = SCHEDULE if recipe.fixed_length else set()
        changes = differences(stored["recipe"], recipe.resolved(), FREE_TO_CHANGE - fixed)
        why = f" ({recipe.fixed_length})" if any(change.startswith(tuple(fixed)) for change in changes[:3]) else ""
        if changes:
            raise UserError(
                f"output_dir {self.path} holds another run: {'; '.join(changes[:3])}{why}. Nothing was written; "
                "give the same recipe to resume, or another --output-dir for a new run."
            )
        count = stored.get("processes", 1)
        if count != processes:
            raise UserError(
                f"output_dir {self.path} holds a run of {count} process{'es' * (count > 1)}, and {processes} would "
                "make its updates from another number of pictures. Nothing was written; resume it with "
                f"--processes {count}, or give another --output-dir for a new run."
            )
        self.refuse_changed(hashes, "Restore the file, or give another --output-dir for a run with the new one.")
        if recipe.train.resume_from_checkpoint == "none" and self.latest_checkpoint():
            raise UserError(
                f"output_dir {self.path} holds checkpoints of this recipe, and resume_from_checkpoint = "
                '"none" would start over. Nothing was written; set it to "latest" or give another '
                "--output-dir."
            )

    def refuse_changed(self, hashes: dict[str, str], remedy: str) -> None:
        """Raise UserError for a file whose sha256 is not the one that this run began with; remedy: what to do then."""
        began = self.hashes()
        for file, digest in hashes.items():
            before = began.get(file)
            if before != digest:
                was = f"was {before[:12]}..., is {digest[:12]}..." if before else "was not there"
                raise UserError(f"{self.path}: {file} is not what this run began with (sha256 {was}). {remedy}")

    def _forget_rows_after(self, checkpoint: Path | None) -> None:
        """Drop metrics of updates that are about to be done again, and the note on why the run stopped."""
        last, rows = _update_of(checkpoint) if checkpoint else -1, self.metrics()
        kept = [row for row in rows if row.get("update", 0) <= last and row.get("kind") != "stop"]
        if (self.path / "metrics.jsonl").is_file():
            self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def _json(text: str, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is not valid JSON ({error.msg}). {remedy}.") from error


def has_begun(path: Path) -> bool:
    """Whether a folder holds a run that has finished an update; without one there is nothing to go on from."""
    if not (path / "recipe.json").is_file():
        return False
    return not _is_free(path, *STARTED) or any(row.get("update", 0) > 0 for row in RunFolder(path).metrics())


def _is_free(path: Path, *besides: str) -> bool:
    return path.is_dir() and {file.name for file in path.iterdir()} <= {*PREPARED, *besides}


def _update_of(checkpoint: Path) -> int:
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write a file under a temporary name, flush it to disk, rename it: whole or not at all.

    Raises UserError where the disk does not take it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
    except UserError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def versions() -> dict[str, str]:
    """library -> installed version, diffopd first; libraries that are absent are left out."""
    found = {"diffopd": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differences(before: Any, after: Any, free: set[str], key: str = "") -> list[str]:
    """'key was X, is Y' for every setting that makes another run, those in `free` aside."""
    if key in free or before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [
            difference
            for name in names
            for difference in differences(before.get(name), after.get(name), free, f"{key}.{name}" if key else name)
        ]
    return [f"{key} was {json.dumps(before)}, is {json.dumps(after)}"]
