"""Claim 4: new pictures for a few-step model, by D-OPSD and by others; trained and scored by world_tune.py."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reproduce_texts as texts
import world_tune
import world_tune_data
from reproduce_pages import Page, Plot, Table, dots
from reproduce_runs import Setup

QUICK = ["prior.num_pictures=2", "look.num_prompts=2", "evaluate.num_prompts=2", "train.batch_size=2"]
FORGOTTEN = 100, 20  # held-out prompts of each of the world's tasks, in the deployed steps and in many
START = 100  # first of them: those before it, and their noise, are what the recipe's settings were chosen by
DEPLOYED = 4
MANY = 50  # steps in which one training of each method is drawn as well
CELLS = (
    "subject",
    "subject_shown",
    "subject_new",
    "subject_close",
    *world_tune.world.TASKS,
    "kept",
    "sharpness",
    "subject_sharpness",
)


@dataclass(frozen=True)
class Way:
    """How a model is tuned: one run of `world_tune.py run` for each seed, or for the first alone."""

    method: str
    label: str = ""
    settings: tuple[str, ...] = ()
    rate: float = 1e-3
    all_seeds: bool = True
    is_drawn_in_many: bool = False
    updates: int = 300
    without: str = ""

    def length(self, setup: Setup) -> int:
        """How many updates."""
        return 2 if setup.quick else self.updates

    def run(self, setup: Setup) -> str:
        """What its runs are named, but for the seed."""
        return f"{self.method}{self.label and '-' + self.label}-lr{self.rate:g}-{self.length(setup)}updates"


ALL_STATES = ("objective.query=all",)
# By set of world_tune_data.py: the manner is its main one, of which the recipe's settings are.
WAYS: dict[str, dict[str, Way]] = {
    "manner": {
        "D-OPSD (the recipe `emoji`)": Way("d-opsd", is_drawn_in_many=True),
        "D-OPSD, no prompts kept": Way("d-opsd", "alone", without="prior", all_seeds=False),
        "D-OPSD, 2e-3": Way("d-opsd", rate=2e-3),
        "D-OPSD, 500 updates": Way("d-opsd", updates=500, all_seeds=False),
        "D-OPSD, frozen teacher": Way("d-opsd", "frozen", ("teacher.weights=frozen",), all_seeds=False),
        "D-OPSD, live teacher": Way("d-opsd", "live", ("teacher.weights=live",), all_seeds=False),
        "D-OPSD, teacher's decay .99": Way("d-opsd", "decay0.99", ("teacher.ema_decay=0.99",), all_seeds=False),
        "D-OPSD, denoised": Way("d-opsd", "denoised", ("objective.name=denoised",), all_seeds=False),
        "DreamBooth": Way("dreambooth", is_drawn_in_many=True),
        "SFT": Way("sft", is_drawn_in_many=True),
        "SFT, 100 updates": Way("sft", updates=100, all_seeds=False),
        "SFT, 3e-4": Way("sft", rate=3e-4, all_seeds=False),
        "SFT, 3e-3": Way("sft", rate=3e-3, all_seeds=False),
    },
    "word": {"D-OPSD, all states": Way("d-opsd", "all", ALL_STATES), "SFT": Way("sft", all_seeds=False)},
    "object": {
        "D-OPSD, all states": Way("d-opsd", "all", ALL_STATES, all_seeds=False),
        "SFT": Way("sft", all_seeds=False),
    },
}


def fine_tuning(setup: Setup, scorer: Any) -> Page | None:
    """Claim 4: D-OPSD against SFT, DreamBooth, frozen and live teachers: what is learnt, kept, and how sharp."""
    sets = setup.output / "sets"
    if not setup.listing and not sets.is_dir():
        world_tune_data.main(sets, pipeline="emoji-4-steps", pictures=30, seed=0)
    for name, ways in WAYS.items():
        for way in ways.values():
            _run(setup, sets / name, way)
    if setup.listing:
        return None
    found = {name: _scored(setup, sets / name, ways) for name, ways in WAYS.items()}
    tables = [_table(name, found[name]) for name in WAYS]
    points = _points(setup, WAYS["manner"])
    plot = Plot("kept", "Each training: what is new against what is kept.", dots(points, "kept", "in the new manner"))
    return Page("4-tuning", "New pictures for a few-step model", texts.TUNING, tables, [plot], found)


def _runs(setup: Setup, data: Path) -> Path:
    return setup.output / f"tune-{data.name}"


def _run(setup: Setup, data: Path, way: Way) -> None:
    told = {"rate": [way.rate], "seed": list(setup.seeds if way.all_seeds else setup.seeds[:1])}
    settings = [*way.settings, *(_quick_for(way) if setup.quick else [])]
    if setup.listing:
        options = [f"--method {way.method} --rate {way.rate:g} --updates {way.length(setup)}"]
        options += [f"--seed {seed}" for seed in told["seed"]] + [f"--label {way.label}"] * bool(way.label)
        options += [f"--without {way.without}"] * bool(way.without)
        options += [f"--set {shlex.quote(setting)}" for setting in settings]
        print(f"python scripts/world_tune.py run --data {data} --output {_runs(setup, data)} {' '.join(options)}")
        return
    told |= {"updates": way.length(setup), "label": way.label, "settings": settings, "without": way.without}
    world_tune.run(data, _runs(setup, data), [way.method], processes=1, **told)


def _quick_for(way: Way) -> list[str]:
    return [one for one in QUICK if not one.startswith("prior.") or not (way.method == "sft" or way.without)]


def _scored(setup: Setup, data: Path, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """A row for each way and number of steps, seeds together; the untouched model first."""
    few, many = (2, 2) if setup.quick else FORGOTTEN
    output = _runs(setup, data)
    with contextlib.redirect_stdout(sys.stderr):
        world_tune.score_all(data, output, steps=[DEPLOYED], prompts=few, start=START)
        for way in ways.values():
            if way.is_drawn_in_many:
                only = f"{way.run(setup)}-seed{setup.seeds[0]}"
                world_tune.score_all(data, output, steps=[MANY], prompts=many, only=only, start=START)
    names = {way.run(setup): name for name, way in ways.items()} | {world_tune.UNTOUCHED: "untouched"}
    names[world_tune.TOLD] = world_tune.TOLD
    rows = [row | {"name": names[row["model"]]} for row in world_tune.collected(output, pool=True, start=START)]
    order = list(names.values())
    return sorted(rows, key=lambda row: (row["steps"], row["name"] not in order[-2:], order.index(row["name"])))


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    head = ["", "steps", "trainings", *CELLS]
    cells = [[row["name"], row["steps"], row["trainings"], *(_cell(row[cell]) for cell in CELLS)] for row in rows]
    return Table(f"{texts.SETS[name]} Updates of batch 4, 300 where not said otherwise.", head, cells)


def _cell(value: tuple[float, float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def _points(setup: Setup, ways: dict[str, Way]) -> dict[str, list[tuple[float, float]]]:
    """Of each way and training in the deployed steps: (kept, subject)."""
    rows = world_tune.collected(setup.output / "tune-manner", pool=False, start=START)
    by_run = {row["model"]: row for row in rows if row["steps"] == DEPLOYED}
    points: dict[str, list[tuple[float, float]]] = {}
    for name, way in ways.items():
        found = [by_run.get(f"{way.run(setup)}-seed{seed}") for seed in setup.seeds]
        points[name] = [(row["kept"][0], row["subject"][0]) for row in found if row]
    return points
