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
FORGOTTEN = 100  # held-out prompts of each of the world's tasks, in the deployed steps
START = 100  # first of them: those before it, and their noise, are what the recipe's settings were chosen by
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
LAST_OF_2 = ("objective.query={indices=[1]}",)


@dataclass(frozen=True)
class Ground:
    """What is tuned on what: a set of world_tune_data.py and a model that draws in so many steps, and how.

    many: steps in which the chosen ways are drawn as well, the first training or all, on so many prompts a task.
    """

    data: str
    ways: dict[str, Way]
    model: str = "emoji-4-steps"
    steps: int = 4
    many: int = 50
    many_prompts: int = 20
    all_in_many: bool = False

    def settings(self, way: Way) -> list[str]:
        """Of a run: the way's, and the number of steps where the recipe has another."""
        return [*way.settings, *([] if self.steps == 4 else [f"student.num_inference_steps={self.steps}"])]


# The manner is the main set, of which the recipe's settings are.
GROUNDS: dict[str, Ground] = {
    "manner": Ground(
        "manner",
        {
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
    ),
    "manner, 2 steps": Ground(
        "manner",
        {
            "D-OPSD, the last state": Way("d-opsd", "last", LAST_OF_2, is_drawn_in_many=True),
            "D-OPSD, all states": Way("d-opsd", "all", ALL_STATES, all_seeds=False),
            "DreamBooth": Way("dreambooth", is_drawn_in_many=True),
            "SFT": Way("sft", is_drawn_in_many=True),
        },
        model="emoji-2-steps",
        steps=2,
        many=20,
        many_prompts=60,
        all_in_many=True,
    ),
    "word": Ground(
        "word", {"D-OPSD, all states": Way("d-opsd", "all", ALL_STATES), "SFT": Way("sft", all_seeds=False)}
    ),
    "object": Ground(
        "object",
        {
            "D-OPSD, all states": Way("d-opsd", "all", ALL_STATES, all_seeds=False),
            "SFT": Way("sft", all_seeds=False),
        },
    ),
}


def fine_tuning(setup: Setup, scorer: Any) -> Page | None:
    """Claim 4: D-OPSD against SFT, DreamBooth, frozen and live teachers: what is learnt, kept, and how sharp."""
    return _page(setup, "4-tuning", "New pictures for a few-step model", ("manner", "word", "object"))


def fewer_steps(setup: Setup, scorer: Any) -> Page | None:
    """Claim 4 where few steps are hard: a model of 2, in which its base draws much less than in 20."""
    return _page(setup, "4-tuning-2-steps", "New pictures for a model of two steps", ("manner, 2 steps",))


def _page(setup: Setup, name: str, title: str, grounds: tuple[str, ...]) -> Page | None:
    for ground in (GROUNDS[of] for of in grounds):
        if not setup.listing and not _sets(setup, ground).is_dir():
            world_tune_data.main(_sets(setup, ground), pipeline=ground.model, pictures=30, seed=0)
        for way in ground.ways.values():
            _run(setup, ground, way)
    if setup.listing:
        return None
    found = {of: _scored(setup, GROUNDS[of]) for of in grounds}
    tables = [_table(of, found[of]) for of in grounds]
    points = _points(setup, GROUNDS[grounds[0]])
    plot = Plot("kept", "Each training: what is new against what is kept.", dots(points, "kept", "in the new manner"))
    text = texts.TUNING if name == "4-tuning" else texts.TUNING_2
    return Page(name, title, text, tables, [plot], found)


def _of(ground: Ground) -> str:
    return "" if ground.steps == 4 else f"-{ground.steps}-steps"


def _sets(setup: Setup, ground: Ground) -> Path:
    return setup.output / f"sets{_of(ground)}"


def _runs(setup: Setup, ground: Ground) -> Path:
    return setup.output / f"tune-{ground.data}{_of(ground)}"


def _run(setup: Setup, ground: Ground, way: Way) -> None:
    data = _sets(setup, ground) / ground.data
    told = {"rate": [way.rate], "seed": list(setup.seeds if way.all_seeds else setup.seeds[:1])}
    settings = [*ground.settings(way), *(_quick_for(way) if setup.quick else [])]
    if setup.listing:
        options = [f"--method {way.method} --rate {way.rate:g} --updates {way.length(setup)}"]
        options += [f"--seed {seed}" for seed in told["seed"]] + [f"--label {way.label}"] * bool(way.label)
        options += [f"--without {way.without}"] * bool(way.without)
        options += [f"--set {shlex.quote(setting)}" for setting in settings]
        print(f"python scripts/world_tune.py run --data {data} --output {_runs(setup, ground)} {' '.join(options)}")
        return
    told |= {"updates": way.length(setup), "label": way.label, "settings": settings, "without": way.without}
    world_tune.run(data, _runs(setup, ground), [way.method], processes=1, **told)


def _quick_for(way: Way) -> list[str]:
    return [one for one in QUICK if not one.startswith("prior.") or not (way.method == "sft" or way.without)]


def _scored(setup: Setup, ground: Ground) -> list[dict[str, Any]]:
    """A row for each way and number of steps, seeds together; the untouched model first."""
    few, many = (2, 2) if setup.quick else (FORGOTTEN, ground.many_prompts)
    output, data, ways = _runs(setup, ground), _sets(setup, ground) / ground.data, ground.ways
    with contextlib.redirect_stdout(sys.stderr):
        world_tune.score_all(data, output, steps=[ground.steps], prompts=few, start=START)
        for way in ways.values():
            for seed in setup.seeds[: None if ground.all_in_many else 1] if way.is_drawn_in_many else ():
                only = f"{way.run(setup)}-seed{seed}"
                world_tune.score_all(data, output, steps=[ground.many], prompts=many, only=only, start=START)
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


def _points(setup: Setup, ground: Ground) -> dict[str, list[tuple[float, float]]]:
    """Of each way and training in the deployed steps: (kept, subject)."""
    rows = world_tune.collected(_runs(setup, ground), pool=False, start=START)
    by_run = {row["model"]: row for row in rows if row["steps"] == ground.steps}
    points: dict[str, list[tuple[float, float]]] = {}
    for name, way in ground.ways.items():
        found = [by_run.get(f"{way.run(setup)}-seed{seed}") for seed in setup.seeds]
        points[name] = [(row["kept"][0], row["subject"][0]) for row in found if row]
    return points
