"""Runs of the claims: started once, kept when finished, resumed when not; what each cost, and which weights it left."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from diffopd.errors import UserError
from diffopd.load import LORA_FILE
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder, atomic_write, differences
from diffopd.teach_recipe import OF_ESTIMATOR, EstimatorSettings, TeachRecipe, read_teach_recipe

UNWATCHED = "train.validate_every=0"  # looks while training would take their seconds from it, of RL the most
SECONDS = "train.max_train_seconds="
QUICK = [f"{SECONDS}0.0", "train.max_train_steps=2", "train.lr_warmup_steps=0"]
QUICK += ["train.checkpointing_steps=1", "train.batch_size=2", "evaluate.num_prompts=2", "evaluate.batch_size=2"]

Key, Run = TypeVar("Key", bound=Hashable), TypeVar("Run")


@dataclass(frozen=True)
class Setup:
    """What was asked for. quick: two updates of two pictures instead of `seconds` of training, to see that all runs.

    listing: commands are printed, nothing is run. jobs: trainings at a time. any_seconds: a finished run counts
    however long it was trained.
    """

    output: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 600.0
    prompts: int = 150
    quick: bool = False
    listing: bool = False
    jobs: int = 1
    any_seconds: bool = False

    @property
    def held_out(self) -> int:
        """Held-out prompts of a task that a score is of."""
        return 2 if self.quick else self.prompts


@dataclass(frozen=True)
class Cost:
    """What training took up to some update. calls: rows that networks computed, of all sides, guidance twice."""

    updates: int = 0
    seconds: float = 0.0
    images: int = 0
    calls: int = 0

    def __add__(self, other: Cost) -> Cost:
        both = zip(self.values(), other.values(), strict=True)
        return Cost(*(one + two for one, two in both))

    def values(self) -> tuple[int, float, int, int]:
        """In the order of the fields."""
        return self.updates, self.seconds, self.images, self.calls


def start(setup: Setup, name: str, command: list[str]) -> Path:
    """Run `diffopd COMMAND` into output/name unless it is finished; returns the run's folder.

    A run that was broken off goes on where it was. Raises CalledProcessError where it fails, UserError for one that
    was finished when the same command meant other settings.
    """
    folder = setup.output / name
    whole = [*command, "--output-dir", str(folder)]
    if setup.listing:
        print(f"diffopd {shlex.join(whole)}")
        return folder
    done = setup.output / f"{name}.json"
    if done.is_file() and same(setup, json.loads(done.read_text())["command"], whole):
        if found := changes(setup, folder, command):
            raise UserError(
                f"{folder}: was made by other settings than {command[1]} has now: {'; '.join(found[:3])}. "
                "Move it away, or name another --output."
            )
        print(f"{name}: finished already")
        return folder
    print(f"{name} ...", flush=True)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}  # budgets are seconds of one
    subprocess.run([sys.executable, "-m", "diffopd.cli", *whole], check=True, env=one_core)
    done.write_text(json.dumps({"command": whole}, indent=1))
    return folder


def changes(setup: Setup, folder: Path, command: list[str]) -> list[str]:
    """'key was X, is Y' of what the command means now and did not when it made the run, defaults as well.

    An estimator's settings count where it reads them.
    """
    overrides = [value for flag, value in pairwise(command) if flag == "--set"]
    recipe = (read_teach_recipe if command[0] == "teach" else read_recipe)(command[1], overrides)
    free = {"output_dir"} | ({SECONDS.rstrip("=")} if setup.any_seconds else set())
    if isinstance(recipe, TeachRecipe):
        read = OF_ESTIMATOR[recipe.estimator.name]
        free |= {f"estimator.{key}" for key in EstimatorSettings.model_fields if key not in read}
    return differences(RunFolder(folder).resolved(), recipe.resolved(), free)


def same(setup: Setup, one: list[str], other: list[str]) -> bool:
    """Whether two commands make the same run, as far as was asked for."""
    if setup.any_seconds:
        one, other = ([part for part in parts if not part.startswith(SECONDS)] for parts in (one, other))
    return one == other


def side_by_side(setup: Setup, trainings: dict[Key, Callable[[], Run]]) -> dict[Key, Run]:
    """What the trainings return, by key; setup.jobs of them run at a time."""
    with ThreadPoolExecutor(setup.jobs) as pool:
        return dict(zip(trainings, pool.map(lambda training: training(), trainings.values()), strict=True))


def distill(setup: Setup, name: str, seed: int, settings: Iterable[str] = (), recipe: str = "together") -> Path:
    """A distillation under `seed`; its learning rate is constant, so that a checkpoint may stand for less training."""
    budget = [f"{SECONDS}{setup.seconds}", "train.checkpointing_steps=10"]
    budget = QUICK if setup.quick else budget
    fixed = [f"seed={seed}", 'train.lr_scheduler="constant"', UNWATCHED]
    fixed += ["evaluate.teachers=false", "evaluate.num_prompts=2"]
    return start(setup, f"{name}-seed{seed}", ["distill", recipe, *_set([*fixed, *budget, *settings])])


def teach(setup: Setup, name: str, seed: int, recipe: str, settings: Iterable[str] = (), *, share: float = 1.0) -> Path:
    """A teaching under `seed`, with `share` of the time."""
    budget = [f"{SECONDS}{share * setup.seconds}", "train.checkpointing_steps=10"]
    if setup.quick:
        budget = [*QUICK, "sampling.num_prompts=2"]
        budget += [] if "supervised" in recipe else ["sampling.group_size=2"]
    fixed = [f"seed={seed}", "watch=[]", UNWATCHED]
    return start(setup, f"{name}-seed{seed}", ["teach", recipe, *_set([*fixed, *budget, *settings])])


def kept(setup: Setup, kind: str, key: list[Any], make: Callable[[], Any]) -> Any:
    """What `make` measured under this key: read where it has been measured already."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = setup.output / kind / f"{digest}.json"
    if not file.is_file():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"of": key, "found": found}))
    return json.loads(file.read_text())["found"]


def _set(settings: Iterable[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def updates_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's updates, of what is still valid after resumes."""
    return [row for row in RunFolder(folder).metrics() if row["kind"] == "update"]


def costs(folder: Path) -> list[Cost]:
    """What a run had cost after each of its updates."""
    found, calls = [], Counter()
    for row in updates_of(folder):
        calls.update(row["network_calls"])
        found.append(Cost(row["update"], row["seconds"], row["images"], sum(calls.values())))
    return found


def last_adapter(folder: Path) -> Path:
    """The adapter of a run's last checkpoint (before it has run: a name that says so)."""
    last = RunFolder(folder).latest_checkpoint() if folder.is_dir() else None
    return (last or folder / "checkpoint-LAST") / LORA_FILE


def adapter_within(folder: Path, calls: int) -> tuple[Path, Cost] | None:
    """The last checkpoint's adapter that had cost at most `calls` network calls, with its cost; None where none had."""
    found = None
    for cost in costs(folder):
        file = folder / f"checkpoint-{cost.updates}" / LORA_FILE
        if cost.calls <= calls and file.is_file():
            found = file, cost
    return found
