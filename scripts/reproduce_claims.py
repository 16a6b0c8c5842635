"""The claims, one function each: runs, scores, and the page they make (docs/results/README.md says what is claimed)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import reproduce_gradients as gradients
import reproduce_texts as texts
from reproduce_pages import BESIDE, Page, Plot, Table, lines, sheet, spread
from reproduce_runs import (
    Cost,
    Setup,
    adapter_within,
    costs,
    distill,
    kept,
    last_adapter,
    side_by_side,
    teach,
    updates_of,
)
from reproduce_scores import DEPLOYED, NATIVE, TASKS, Scorer, Scores, apart, drawn_by_teachers, mean_of
from reproduce_tuning import fewer_steps, fine_tuning

from diffopd.recipe import read_recipe
from diffopd.teach_log import fall_of
from diffopd.teach_recipe import read_teach_recipe

SHOWN = 10  # pictures of a row
Way = tuple[str, list[str]]  # a teaching's file and its changed settings
BLOCK = 10  # updates of a point of a reward's curve
# What the shipped teachers took to make, on one core (docs/world.md).
TEACHER_SECONDS = {"composition": 600.0, "text": 420.0, "style": 2520.0}
CASCADE = ("composition", "text", "style")
CARDS = (20, 2.0)  # steps and guidance of the three teachers' cards
OTHERS = 50  # held-out prompts of a task that was not taught
ETA = "student.noise_level=0.7"
AS_DEPLOYED = ["student.num_inference_steps=4", "student.guidance_scale=1.0"]
Runs = dict[str, dict[int, list[Path]]]  # method -> seed -> its runs, one after the other


def methods(setup: Setup, scorer: Scorer) -> Page | None:
    """Claim 1: several teachers into one student, against what else makes one model of several rewards."""
    runs, extra = method_runs(setup, scorer)
    if setup.listing:
        return None
    totals = {
        name: {s: _total(held) + extra.get((name, s), Cost()) for s, held in by.items()} for name, by in runs.items()
    }
    least = min(cost.calls for by in totals.values() for cost in by.values())
    rows, equal, first = [], [], None
    for name, by_seed in runs.items():
        found = [scorer.adapter(last_adapter(held[-1])) for held in by_seed.values()]
        first = first or found
        own = [totals[name][seed] for seed in by_seed]
        less = "-" if found is first else apart(found, first, scorer.tasks)
        rows.append([name, *_score_cells(map(mean_of, found)), less, *_cost_cells(own), *_with_teachers(name, own)])
        equal.append(_at_equal_calls(name, by_seed, least, extra, scorer))
    for label, model, at in _references():
        found = scorer.reference(model, at)
        less = apart([found] * len(first), first, scorer.tasks)
        needs = sum(TEACHER_SECONDS.values()) if model == "average" else 0
        made = [round(max(TEACHER_SECONDS.values())), round(needs)] if needs else ["-", "-"]
        rows.append([label, *_score_cells([mean_of(found)]), less, "-", "-", "-", *made])
    held_out = f"{setup.held_out} held-out prompts a task, 4 steps without guidance unless said otherwise"
    head = ["method", *TASKS, "average"]
    costs_of = [*COST_HEAD, "seconds with teachers made in parallel", "one after another"]
    drawn = "what drawing the teachers' pictures took is in the seconds and calls of SFT and off-policy distillation"
    least_of = f"At most {least:,} network calls of training, those of the teachers' pictures included"
    tables = [
        Table(f"{trained_for(setup)}; {drawn}. {held_out}.", [*head, LESS, *costs_of], rows),
        Table(f"{least_of}; the last checkpoint within.", [*head, "network calls"], equal),
    ]
    text = texts.METHODS + texts.ranges(setup.held_out, len(setup.seeds), differences=True)
    trained = [folder for by_seed in runs.values() for held in by_seed.values() for folder in held]
    return Page("1-methods", "One model from several tasks", text, tables, [], _data(rows), trained)


def trained_for(setup: Setup) -> str:
    """How long every method was trained, as a caption says it."""
    return "Trained as long as is said" if setup.any_seconds else f"{setup.seconds:g} s of training each"


def method_runs(setup: Setup, scorer: Scorer) -> tuple[Runs, dict[tuple[str, int], Cost]]:
    """method -> seed -> runs, and what a method cost beside its runs."""
    trainings: dict[tuple[str, int], Callable[[], list[Path]]] = {}
    extra: dict[tuple[str, int], Cost] = {}
    for seed in setup.seeds:

        def by(name: str, how: Callable[..., Path], *told: Any, seed: int = seed) -> None:
            trainings[name, seed] = lambda: [how(setup, told[0], seed, *told[1:])]

        by("DiffusionOPD", distill, "opd")
        by("DiffusionOPD, m = 1", distill, "opd-m1", ["objective.substeps=1"])
        by("DiffusionOPD from the base", distill, "opd-base", ['student.begin_from="base"'])
        by("joint NFT", teach, "joint-nft", "unmade/joint/nft.toml")
        by("joint GRPO-Guard", teach, "joint-grpo", "unmade/joint/grpo.toml")
        trainings["cascade NFT", seed] = partial(cascade, setup, seed)
        count = 2 if setup.quick else 512
        folder, cost = (Path("SAMPLES"), Cost()) if setup.listing else drawn_by_teachers(scorer, count, seed)
        by("SFT on teacher samples", teach, "sft", str(folder / "joint" / "supervised.toml"))
        copies = [f'teachers.{place}.name="{(folder / task).absolute()}"' for place, task in enumerate(TASKS)]
        by("off-policy distillation", distill, "off-policy", [*copies, 'objective.states="data"'])
        extra["SFT on teacher samples", seed] = extra["off-policy distillation", seed] = cost
    runs: Runs = {}
    for (name, seed), held in side_by_side(setup, trainings).items():
        runs.setdefault(name, {})[seed] = held
    return runs, extra


def cascade(setup: Setup, seed: int) -> list[Path]:
    """One task after the other by NFT, each from the last one's weights, with a third of the time each."""
    held: list[Path] = []
    for task in CASCADE:
        begin = [f'student.init_weights="{last_adapter(held[-1]).absolute()}"'] if held else []
        name = f"cascade-{len(held) + 1}-{task}"
        settings = [*AS_DEPLOYED, "rewards=[]", *(begin or [f"student.target_modules={json.dumps(same_layers())}"])]
        held.append(teach(setup, name, seed, f"{task}/nft.toml", settings, share=1 / len(CASCADE)))
    return held


def same_layers() -> list[str]:
    """The layers that DiffusionOPD's adapter has: every method of claim 1 has them."""
    return read_recipe("together").student.target_modules


def _references() -> list[tuple[str, str, tuple[int, float]]]:
    found = [
        ("weight average of the teachers", "average", DEPLOYED),
        ("weight average, guidance 2", "average", (4, 2.0)),
    ]
    found += [(f"{task} teacher, its own 20 steps, guidance 2", f"teacher:{task}", CARDS) for task in TASKS]
    found += [(f"{task} teacher", f"teacher:{task}", DEPLOYED) for task in TASKS]
    return [*found, ("base", "base", DEPLOYED), ("base, 20 steps, guidance 4", "base", (20, 4.0))]


def _total(held: Sequence[Path]) -> Cost:
    whole = Cost()
    for folder in held:
        whole += costs(folder)[-1]
    return whole


def _score_cells(scores: Iterable[dict[str, float]]) -> list[str]:
    scores = list(scores)
    return [spread([one[key] for one in scores]) for key in (*TASKS, "average")]


def _cost_cells(own: Sequence[Cost]) -> list[Any]:
    mean = [sum(values) / len(own) for values in zip(*(cost.values() for cost in own), strict=True)]
    return [round(mean[0]), round(mean[1]), round(mean[3])]


def _with_teachers(name: str, own: Sequence[Cost]) -> list[Any]:
    """Seconds with the teachers' own, made side by side and one after another; RL needs none."""
    seconds = sum(cost.seconds for cost in own) / len(own)
    needs = "NFT" not in name and "GRPO" not in name
    longest, together = max(TEACHER_SECONDS.values()), sum(TEACHER_SECONDS.values())
    return [round(seconds + needs * longest), round(seconds + needs * together)]


def _at_equal_calls(
    name: str, by_seed: dict[int, list[Path]], least: int, extra: dict[tuple[str, int], Cost], scorer: Scorer
) -> list[Any]:
    scores, calls = [], []
    for seed, held in by_seed.items():
        spent, found = extra.get((name, seed), Cost()).calls, None
        for folder in held:
            within = adapter_within(folder, least - spent)
            found = (within[0], spent + within[1].calls) if within else found
            spent += costs(folder)[-1].calls
        if found:
            scores.append(mean_of(scorer.adapter(found[0])))
            calls.append(found[1])
    if not scores:
        return [name, *["no checkpoint within"] * (len(TASKS) + 1), "-"]
    return [name, *_score_cells(scores), round(sum(calls) / len(calls))]


def gradient(setup: Setup, scorer: Scorer) -> Page | None:
    """Claim 2: the closed form of the KL's gradient against its score-function estimate; and learning by each."""
    return None if setup.listing else _gradients(setup, scorer, ("closed form", *gradients.ESTIMATORS))


def variance(setup: Setup, scorer: Scorer) -> Page | None:
    """Claim 2 without its learning curves."""
    return None if setup.listing else _gradients(setup, scorer, ())


def _gradients(setup: Setup, scorer: Scorer, learners: Sequence[str]) -> Page:
    size = {"steps": 6, "pictures": 12, "draws": 2, "updates": 60, "batch": 4, "every": 10}
    size = {"steps": 3, "pictures": 2, "draws": 1, "updates": 2, "batch": 2, "every": 1} if setup.quick else size
    ratios: dict[str, dict[float, list[float]]] = {name: {} for name in gradients.ESTIMATORS}
    curves: dict[str, dict[int, list[float]]] = {}
    base = [card.digest() for card in scorer.cards]
    for seed in setup.seeds:
        key = ["variance", seed, size["steps"], size["pictures"], size["draws"], base]
        for name, sigma, ratio in kept(setup, "gradients", key, partial(_ratios, seed, size)):
            ratios[name].setdefault(sigma, []).append(ratio)
    for name, seed in product(learners, setup.seeds):
        key = ["curve", name, seed, size["updates"], size["batch"], size["every"], base]
        for update, loss in kept(setup, "gradients", key, partial(_curve, name, seed, size)):
            curves.setdefault(name, {}).setdefault(update, []).append(loss)
    return _gradient_page(ratios, curves, size)


def _ratios(seed: int, size: dict[str, int]) -> list[tuple[str, float, float]]:
    """(estimator, sigma, variance ratio) of every teacher and state."""
    run = gradients.ready(seed, [f"student.num_inference_steps={size['steps']}", ETA])
    found = gradients.variances(run, pictures=size["pictures"], draws=size["draws"])
    return [
        (name, round(one.sigma, 4), one.ratio)
        for by_estimator in found.values()
        for name, moments in by_estimator.items()
        for one in moments
    ]


def _curve(name: str, seed: int, size: dict[str, int]) -> list[tuple[int, float]]:
    told = {key: size[key] for key in ("updates", "batch", "every")}
    return gradients.curve(gradients.ready(seed, [*AS_DEPLOYED, ETA]), name, **told)


def _gradient_page(
    ratios: dict[str, dict[float, list[float]]], curves: dict[str, dict[int, list[float]]], size: dict[str, int]
) -> Page:
    sigmas = sorted(next(iter(ratios.values())), reverse=True)
    rows = [[f"{sigma:.3f}", *(_geometric(ratios[name][sigma]) for name in ratios)] for sigma in sigmas]
    caption = "Variance of the estimate over that of the closed form, by noise level; geometric mean over all runs."
    tables = [Table(caption, ["sigma", *ratios], rows)]
    shown = {name: [(sigma, _geometric(by[sigma])) for sigma in sigmas] for name, by in ratios.items()}
    plots = [
        Plot("variance", "Variance ratio by noise level.", lines(shown, "sigma", "variance ratio", log_y=True), BESIDE)
    ]
    if curves:
        updates = sorted(next(iter(curves.values())))
        learnt = [[update, *(_mean(by[update]) for by in curves.values())] for update in updates]
        caption = "KL to the teachers on held-out prompts (closed form, per dimension), mean over seeds."
        tables.append(Table(caption, ["update", *curves], learnt))
        learned = {name: [(update, _mean(by[update])) for update in updates] for name, by in curves.items()}
        drawn = lines(learned, "update", "held-out KL per dimension", log_y=True)
        plots.append(Plot("curves", "Held-out KL while training, the same updates and rate.", drawn, BESIDE))
    data = {"ratios": {n: {str(s): v for s, v in by.items()} for n, by in ratios.items()}, "curves": curves}
    text = texts.GRADIENT.format(**size)
    return Page("2-gradient", "Closed-form gradient against the score function", text, tables, plots, data)


def choices(setup: Setup, scorer: Scorer) -> Page | None:
    """Claim 3: rollouts with noise, solvers, how many states, which weighting; one change of the recipe each."""
    changed = {name: settings for group in CHOICES.values() for name, settings in group.items()}
    trainings = {
        (name, seed): partial(distill, setup, _folder(name) if settings else "opd", seed, settings)
        for (name, settings), seed in product(changed.items(), setup.seeds)
    }
    held = side_by_side(setup, trainings)
    runs = {name: [held[name, seed] for seed in setup.seeds] for name in changed}
    if setup.listing:
        return None
    tables, recipe = [walks(setup, scorer)], _scores_of(scorer, runs["all 4"])
    for title, group in CHOICES.items():
        rows = []
        for name in group:
            found = _scores_of(scorer, runs[name], (group[name][0].split('"')[1], 0.0) if title == SOLVER else NATIVE)
            less = apart(found, recipe, scorer.tasks) if group[name] else "-"
            own = _cost_cells([costs(folder)[-1] for folder in runs[name]])
            rows.append([name, *_score_cells(map(mean_of, found)), less, *own])
        tables.append(Table(f"{title}.", CHOICE_HEAD, rows))
    text = texts.CHOICES + texts.ranges(setup.held_out, len(setup.seeds), differences=True)
    rows = [_data(table.rows) for table in tables]
    return Page("3-choices", "Noise, solvers, states and weighting", text, tables, [], rows, list(held.values()))


def _scores_of(scorer: Scorer, folders: Sequence[Path], walk: tuple[str, float] = NATIVE) -> list[Scores]:
    return [scorer.adapter(last_adapter(folder), DEPLOYED, walk) for folder in folders]


def _folder(name: str) -> str:
    return f"choice-{name.replace(' ', '-')}"


def solvers(setup: Setup, scorer: Scorer) -> Page | None:
    """The part of claim 3 that needs no training: how far each solver takes a teacher in the student's few steps."""
    if setup.listing:
        return None
    table = walks(setup, scorer)
    return Page(
        "3-solvers", "How far each solver takes a teacher in 4 steps", texts.SOLVERS, [table], [], _data(table.rows)
    )


def walks(setup: Setup, scorer: Scorer) -> Table:
    """Each teacher on its own task, walked by each solver and noise level in the student's number of steps."""
    rows = []
    for label, (solver, level) in WALKS.items():
        found = {t: scorer.reference(f"teacher:{t}", (DEPLOYED[0], 2.0), (solver, level), [t])[t] for t in TASKS}
        rows.append([label, *_score_cells([mean_of(found)])])
    caption = f"Teachers on their own tasks, 4 steps, guidance 2; {setup.held_out} held-out prompts each."
    return Table(caption, ["walk", *TASKS, "average"], rows)


def reward_teachers(setup: Setup, scorer: Scorer) -> Page | None:
    """Claim 5: NFT and GRPO(-Guard) from the base by reward alone."""
    text = texts.REWARDS, "Goal: .90 on two of three tasks."
    return _by_rewards(setup, scorer, REWARD_WAYS, "5-rewards", "Teachers from their reward alone", *text)


def steps_or_kl(setup: Setup, scorer: Scorer) -> Page | None:
    """Beside claim 5: GRPO's one optimizer step and its KL, each changed alone and both, to see which keeps it up."""
    text = texts.STEPS_OR_KL, "Both estimators, with and without each."
    return _by_rewards(setup, scorer, STEPS_OR_KL, "5-kl", "GRPO's optimizer steps and its KL, one at a time", *text)


def _by_rewards(
    setup: Setup, scorer: Scorer, ways: Mapping[str, Way], slug: str, title: str, text: str, caption: str
) -> Page | None:
    trainings = {
        (task, name, seed): partial(teach, setup, f"{task}-{_slug(name)}", seed, f"{task}/{file}", settings)
        for task, (name, (file, settings)), seed in product(TASKS, ways.items(), setup.seeds)
    }
    done = side_by_side(setup, trainings)
    if setup.listing:
        return None
    runs: dict[tuple[str, str], list[Path]] = {}
    for (task, name, _), folder in done.items():
        runs.setdefault((task, name), []).append(folder)
    rows, curves, each = [], {}, {}
    for (task, name), held in runs.items():
        scores = [mean_of(scorer.adapter(last_adapter(folder), CARDS, tasks=[task]))[task] for folder in held]
        other = _of_others(scorer, last_adapter(held[0]), task)
        own = [costs(folder)[-1] for folder in held]
        seen = ", ".join(f"{cost.images:,}" for cost in own)
        file, settings = ways[name]
        recipe = read_teach_recipe(f"{task}/{file}", settings)
        how = [recipe.sampling.optimizer_steps, f"{recipe.estimator.reference_weight:g}"]
        updates = [updates_of(folder) for folder in held]
        fell = sum(fall_of(update) is not None for update in updates)
        rows.append([task, name, len(held), fell, spread(scores), *other, seen, *how, *_cost_cells(own)])
        curves.setdefault(task, {})[name] = _reward_curve(updates)
        each.setdefault(task, {})[name] = [_reward_curve([update]) for update in updates]
    for task in TASKS:
        score = mean_of(scorer.reference("base", CARDS, tasks=[task]))[task]
        rows.append([task, "the base", "-", "-", spread([score]), *_of_others(scorer, None, task), *["-"] * 6])
    others = [f"{task} (first training)" for task in TASKS]
    head = ["task", "by", "trainings", "that fell", "held out, 20 steps, guidance 2", *others]
    head += ["images seen (each training)", "optimizer steps an update", "kl_weight", *COST_HEAD]
    drawn = {
        f"{task}: {name}": scorer.drawn(file, CARDS, task, min(SHOWN, setup.held_out))
        for task in TASKS
        for name, file in {"base": None, **{n: last_adapter(h[0]) for (t, n), h in runs.items() if t == task}}.items()
    }
    what = f": reward of the sampled pictures, mean of {BLOCK} updates"
    what += " and of the trainings, as far as all go; thin: each training." if len(setup.seeds) > 1 else "."
    plots = []
    for task, by_name in curves.items():
        drawing = lines(by_name, "images seen", f"reward, {task}", each=each[task])
        plots.append(Plot(task, task.capitalize() + what, drawing, BESIDE))
    asked = "The first held-out prompts, drawn by the base and the first training of each kind, from the same noise."
    plots.append(Plot("drawn", asked, sheet(drawn), size=(9.0, 0.72 * len(drawn))))
    text += texts.ranges(setup.held_out, len(setup.seeds), differences=False)
    data = {"curves": curves, "each": each}
    return Page(slug, title, text, [Table(caption, head, rows)], plots, data, list(done.values()))


def _grpo(*changes: str) -> dict[str, Way]:
    """Both of GRPO's estimators under each of these changes."""
    kinds = {"GRPO": ['estimator.name="grpo"'], "GRPO-Guard": []}
    return {
        f"{kind}{change}": ("grpo.toml", [*kinds[kind], *GRPO_CHANGES[change]]) for change in changes for kind in kinds
    }


def _slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def _of_others(scorer: Scorer, file: Path | None, task: str) -> list[str]:
    """The score on each task that was not taught, "-" for the taught one; file None: the base's."""
    others, few = [other for other in TASKS if other != task], scorer.few(OTHERS)
    found = few.adapter(file, CARDS, tasks=others) if file else few.reference("base", CARDS, tasks=others)
    return [spread([mean_of(found)[other]]) if other in others else "-" for other in TASKS]


def _reward_curve(trainings: Sequence[list[dict[str, Any]]]) -> list[tuple[float, float]]:
    """(images seen, reward), a point for each BLOCK of updates that all trainings have."""
    together = list(zip(*trainings, strict=False))
    blocks = [together[end - BLOCK : end] for end in range(BLOCK, len(together) + 1, BLOCK)]
    return [(block[-1][0]["images"], _mean([row["reward"] for rows in block for row in rows])) for block in blocks]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _data(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(row) for row in rows]


WALKS = {
    "its own scheduler (DDIM)": ("native", 0.0),
    "DDIM, eta .3": ("ddim", 0.3),
    "DDIM, eta .7": ("ddim", 0.7),
    "DDIM, eta 1": ("ddim", 1.0),
    "DPM-Solver++ 1": ("dpmpp_1", 0.0),
    "DPM-Solver++ 2M": ("dpmpp_2m", 0.0),
    "LCM": ("lcm", 0.0),
}
KL = ['objective.name="kl"', 'objective.final_step="mean"']
SOLVER = "Solver of the student, in training and in deployment"
# By name: the settings that are changed; none is the recipe itself, which claim 1 trains as well.
CHOICES: dict[str, dict[str, list[str]]] = {
    "Noise of the rollouts (DDIM's eta), mean matching": {
        "eta 0": [],
        "eta 0.3": ['student.solver="ddim"', "student.noise_level=0.3"],
        "eta 0.7": ['student.solver="ddim"', "student.noise_level=0.7"],
        "eta 1": ['student.solver="ddim"', "student.noise_level=1.0"],
        "eta 0.7 with the KL": ['student.solver="ddim"', "student.noise_level=0.7", *KL],
    },
    SOLVER: {
        "DPM-Solver++ 1": ['student.solver="dpmpp_1"'],
        "DPM-Solver++ 2M": ['student.solver="dpmpp_2m"'],
        "LCM": ['student.solver="lcm"'],
    },
    "Supervised states": {
        "all 4": [],
        "3 of 4": ["objective.query={indices = [0, 1, 2]}"],
        "1 of 4": ["objective.query={random = 1}"],
        "all 4 at half the rate": ["train.learning_rate=1e-3"],
        "1 of 4 at half the rate": ["objective.query={random = 1}", "train.learning_rate=1e-3"],
    },
    "Weighting": {
        "mean matching": [],
        "velocity": ['objective.name="velocity"'],
        "denoised": ['objective.name="denoised"'],
    },
}
LESS = "average, less DiffusionOPD's"
COST_HEAD = ["updates", "seconds", "network calls"]
CHOICE_HEAD = ["choice", *TASKS, "average", "average, less the recipe's", *COST_HEAD]
# By two optimizer steps, as in nft.toml, ratio and clip act.
TWO_STEPS, NO_KL = "sampling.optimizer_steps=2", "estimator.kl_weight=0.0"
GRPO_CHANGES = {"": [], ", 2 steps": [TWO_STEPS], ", no KL": [NO_KL], ", 2 steps, no KL": [TWO_STEPS, NO_KL]}
REWARD_WAYS: dict[str, Way] = {"NFT": ("nft.toml", []), **_grpo("", ", 2 steps, no KL")}
STEPS_OR_KL = _grpo(*GRPO_CHANGES)
CLAIMS: dict[str, Callable[[Setup, Scorer], Page | None]] = {
    "1": methods,
    "2": gradient,
    "2-variance": variance,
    "3": choices,
    "3-solvers": solvers,
    "4": fine_tuning,
    "4-2-steps": fewer_steps,
    "5": reward_teachers,
    "5-kl": steps_or_kl,
}
