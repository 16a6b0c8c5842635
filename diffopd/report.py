"""report.html of a run: what was run, scores, losses, pictures and timing on one self-contained page.

It reads the run folder only (and the teachers' cards where they are still there); no torch, no weights.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from diffopd import charts
from diffopd.charts import Series
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.recipe import Recipe, TeacherSettings
from diffopd.run_folder import RunFolder
from diffopd.teacher import TeacherCard, teacher_card

NUM_COLORS = 6  # --c0 .. --c5 of the template
LARGEST_CELL = 192  # of a grid, so that many rows leave each picture to be seen
LARGEST_PICTURE = 256  # pixels; larger ones are reduced, for the page carries every picture
STAGES = ("teacher", "student", "objective", "backward", "optimizer")
Row = dict[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from what the run folder holds so far and return its path.

    Parts that are not there yet (no evaluation, no trajectory) are named on the page. Raises UserError for a
    folder that holds no run.
    """
    folder = RunFolder.open(run_dir)
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"duration": duration, "score": "{:.3f}".format, "percent": lambda x: f"{100 * x:.1f}"}
    return folder.write("report.html", pages.get_template("report.html.j2").render(page_context(folder)))


def page_context(folder: RunFolder) -> dict[str, Any]:
    """Everything the template shows."""
    recipe, metrics = folder.recipe(), folder.metrics()
    updates = [row for row in metrics if row["kind"] == "update"]
    file = folder.path / "evaluation" / "scores.json"
    scored = read_json(file) or {}
    scores = scored.get("rows", [])
    teachers = [_teacher(settings, recipe, scores, folder.hashes()) for settings in recipe.teachers]
    colors = {teacher["name"]: f"var(--c{i % NUM_COLORS})" for i, teacher in enumerate(teachers)}
    checks = [row for row in metrics if row["kind"] == "validation"]
    return {
        "recipe": recipe,
        "recipe_text": (folder.path / "recipe.toml").read_text(encoding="utf-8"),
        "resolved": json.dumps(recipe.resolved(), indent=2),
        "versions": folder.versions(),
        "hashes": folder.hashes(),
        "teachers": teachers,
        "colors": colors,
        "stop": next((row["reason"] for row in reversed(metrics) if row["kind"] == "stop"), None),
        "last": updates[-1] if updates else None,
        "ratios": student_ratios(scores, list(colors)),
        "table": score_table(scores, list(colors)),
        "has_damaged_scores": file.is_file() and not scored,
        "scored_before": scored_before(folder, scored),
        "update": update_words(recipe),
        "losses": charts.line_chart(loss_lines(updates, colors)),
        "state_losses": {name: charts.line_chart(lines, ends=True) for name, lines in state_lines(updates, colors)},
        "held_out": charts.line_chart(loss_lines(checks, colors), smooth=False, dots=True),
        "grid": picture_grid(folder.path),
        "drawn_at": {task: drawn_at(scored, task) for task in colors},
        "looks": looks(folder.path, metrics),
        "cost": cost(folder.path),
        "trajectories": trajectories(folder.path),
        "timing": timing(updates),
        "interval_bar": charts.interval_bar,
    }


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def duration(seconds: float) -> str:
    """'0.25 s', '48 s', '10 min 3 s', '2 h 5 min', with spaces that do not break."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 10:
        text = f"{seconds:.3g} s"
    elif minutes == 0:
        text = f"{rest} s"
    elif minutes < 60:
        text = f"{minutes} min {rest} s" if rest else f"{minutes} min"
    else:
        text = f"{minutes // 60} h {minutes % 60} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


# What was run.


def _teacher(settings: TeacherSettings, recipe: Recipe, scores: list[Row], hashes: dict[str, str]) -> Row:
    """A teacher as it taught: the recipe's settings first, then its card's, then what the evaluation used."""
    try:
        card: TeacherCard | None = teacher_card(settings.name, recipe.path)
    except UserError:  # the teacher has moved since; the run folder still knows most of it
        card = None
    name = card.name if card else Path(settings.name).name
    own = next((r for r in scores if r["model"] == f"teacher:{name}" and r.get("is_reference")), {})
    row = {"name": name, "share": share(settings, recipe), "form": card.form if card else None}
    for key in ("guidance_scale", "num_inference_steps"):
        asked = getattr(settings, key)
        row[key] = asked if asked is not None else getattr(card, key) if card else own.get(key)
    row["is_asked_the_same"] = card is not None and _is_asked_the_same(card)
    row["hash"] = next((digest for file, digest in hashes.items() if file.startswith(f"{name}/")), None)
    return row


def share(settings: TeacherSettings, recipe: Recipe) -> float | None:
    """A teacher's share of the loss, or of the draws; None where teachers take turns and weights mean nothing."""
    if recipe.train.tasks_per_update == "round_robin":
        return None
    return settings.weight / sum(teacher.weight for teacher in recipe.teachers)


def scored_before(folder: RunFolder, scored: Row) -> str | None:
    """The checkpoint that the scores are of, where the run has gone on since; None where they are of its latest."""
    latest, of = folder.latest_checkpoint(), scored.get("checkpoint")
    return of if of and latest and of != latest.name else None


def update_words(recipe: Recipe) -> str:
    """What one update is made of."""
    train, draws = recipe.train, recipe.train.tasks_per_update
    pictures = f"{train.batch_size * train.gradient_accumulation_steps} pictures a process"
    if draws == "round_robin" and len(recipe.teachers) > 1:
        return f"{pictures} an update, teachers in turn"
    if draws == "all" or draws == "round_robin":
        return f"{pictures} and teacher an update"
    if draws == 1:
        return f"{pictures} an update, of one teacher drawn"
    return f"{pictures} for each of the {draws} teachers drawn an update"


def _is_asked_the_same(card: TeacherCard) -> bool:
    """Whether every held-out prompt of a task is a training prompt as well: its scores then show fitting only."""
    try:
        train, test = ({row.prompt for row in read_prompts(path)} for path in (card.prompts.train, card.prompts.test))
    except UserError:  # files that have moved since
        return False
    return test <= train


# Scores.


@dataclass(frozen=True)
class ScoreRow:
    """One model at one setting: its result per task, where it was scored."""

    model: str
    steps: int
    guidance: float
    cells: dict[str, Row]

    @property
    def kind(self) -> str:
        """'base', 'teacher', 'average' or 'student'."""
        return self.model.partition(":")[0]

    @property
    def name(self) -> str:
        """The teacher's name, or 'base', 'student'."""
        return self.model.partition(":")[2] or self.model


def score_table(rows: list[Row], teachers: list[str]) -> dict[str, Any] | None:
    """Tasks (columns) and ScoreRows (base, teachers, student; their cells), None without any score."""
    if not rows:
        return None
    order = {"base": -1, **{f"teacher:{name}": i for i, name in enumerate(teachers)}, "student": len(teachers) + 1}
    found: dict[tuple[str, int, float], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["model"], row["num_inference_steps"], row["guidance_scale"]][row["task"]] = row
    table = [ScoreRow(*key, cells) for key, cells in found.items()]
    table.sort(key=lambda row: (order.get(row.model, len(teachers)), -row.steps, row.guidance))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    of_base = [[row for row in rows if row["model"] == "base" and row["task"] == task] for task in tasks]
    best = [max(group, key=lambda row: row["score"]) for group in of_base if len(group) > 1]
    return {
        "tasks": sorted(tasks, key=lambda task: order.get(f"teacher:{task}", len(teachers))),
        "rows": table,
        "best_of": lambda cell: any(cell is row for row in best),
        "num_prompts": sorted({row["num_prompts"] for row in rows}),
        "num_asked": sorted({row["num_asked"] for row in rows if "num_asked" in row}),
        "seeds": sorted({seed for row in rows for seed in row["seeds"]}),
        "has_cards": any(row.get("source") == "card" for row in rows),
    }


def student_ratios(rows: list[Row], teachers: list[str]) -> list[Row]:
    """Per teacher: the student's score on its task as a share of the teacher's own at the teacher's own steps."""
    found = []
    for name in teachers:
        on_task = [row for row in rows if row["task"] == name]
        student = next((row for row in on_task if row["model"] == "student"), None)
        teacher = next((row for row in on_task if row.get("is_reference")), None)
        if student and teacher:
            found.append({"name": name, "student": student, "teacher": teacher, **student["ratio"]})
    return found


# Losses.


def loss_lines(rows: list[Row], colors: dict[str, str]) -> list[Series]:
    """One line per teacher over updates."""
    return [
        Series(name, [(r["update"], r["loss_per_teacher"][name]) for r in rows if name in r["loss_per_teacher"]], color)
        for name, color in colors.items()
    ]


def state_lines(rows: list[Row], colors: dict[str, str]) -> list[tuple[str, list[Series]]]:
    """Per teacher one line per state of the student's walk; later states fade."""
    found = []
    for name, color in colors.items():
        points: dict[int, list[charts.Point]] = defaultdict(list)
        for row in rows:
            values = row.get("loss_per_step", {}).get(name, [])
            states = row.get("steps", {}).get(name, range(len(values)))
            for state, value in zip(states, values, strict=True):
                points[state].append((row["update"], value))
        shades = {state: round(100 - 52 * i / max(len(points) - 1, 1)) for i, state in enumerate(sorted(points))}
        mixed = "color-mix(in oklab, {} {}%, var(--paper))".format
        lines = [Series(str(state), points[state], mixed(color, shade)) for state, shade in shades.items()]
        if lines:
            found.append((name, lines))
    return found


# Pictures.


def picture(root: Path, file: str, widest: int = LARGEST_PICTURE, tallest: int = LARGEST_PICTURE) -> Row | None:
    """A picture below `root` as a data URI with its size, None where there is none that can be read."""
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()):
        return None
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError):
        return None
    image.thumbnail((widest, tallest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"uri": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", "width": image.width}


def picture_grid(run: Path) -> dict[str, list[Row]]:
    """task -> prompts, each with the pictures of base, teachers and student."""
    entries = read_json(run / "evaluation" / "grid" / "index.json") or []
    order = {"base": 0, "student": 2}
    found: dict[str, list[Row]] = defaultdict(list)
    for entry in entries:
        models = sorted(entry["models"].items(), key=lambda item: order.get(item[0], 1))
        shown = [
            {"model": name.removeprefix("teacher-"), "is_teacher": name.startswith("teacher-"), "score": said["score"]}
            | {"picture": picture(run / "evaluation", said["file"])}
            for name, said in models
        ]
        found[entry["task"]].append({"prompt": entry["prompt"], "models": shown})
    return dict(found)


def drawn_at(scored: Row, task: str) -> str:
    """At how many steps and which guidance the grid's pictures of a task were drawn, as far as the scores know."""
    rows = [row for row in scored.get("rows", []) if row["task"] == task]
    first = scored.get("settings", {}).get("guidance_scales", [None])[0]  # the one that the base is drawn at
    shown = {
        "base": [row for row in rows if row["model"] == "base" and row["guidance_scale"] == first],
        "teacher": [row for row in rows if row["model"] == f"teacher:{task}"],
        "student": [row for row in rows if row["model"] == "student"],
    }
    words = []
    for name, found in shown.items():
        for row in sorted(found, key=lambda row: not row.get("is_reference"))[:1]:
            words.append(f"{name}: {row['num_inference_steps']} steps, guidance {row['guidance_scale']:g}")
    return "; ".join(words)


def looks(run: Path, metrics: list[Row]) -> Row | None:
    """What a tuning run was seen to do: its teacher's check and its drawings, None for other runs."""
    rows, check = [row for row in metrics if row["kind"] == "look"], read_json(run / "teacher-check.json")
    if not rows and check is None:
        return None
    names = ("distance", "drift", "sharpness", "diversity")
    lines = [Series(n, [(r["update"], r[n]) for r in rows], f"var(--c{i})") for i, n in enumerate(names)]
    last = f"looks/{rows[-1]['update']:06d}.png" if rows else ""
    shown = {
        "check_picture": grid_picture(run, "teacher-check.png", 3) if check is not None else None,
        "picture": grid_picture(run, last, 2) if rows else None,
    }
    return {"chart": charts.line_chart(lines, smooth=False, dots=True), "rows": rows, "check": check, **shown}


def grid_picture(run: Path, file: str, columns: int) -> Row | None:
    """A grid of pictures as `picture`, however many rows it has."""
    return picture(run, file, columns * LARGEST_CELL, 10**6)


def cost(run: Path) -> Row | None:
    """Seconds per picture and stage of a tuning run and of ordinary fine-tuning, None where they were not timed."""
    found = read_json(run / "cost.json")
    if found is None:
        return None
    sides = [found["own"], found["sft"]]
    stages = [stage for stage in dict.fromkeys([*STAGES, *sides[0], *sides[1]]) if any(stage in side for side in sides)]
    sums = [sum(side.values()) for side in sides]
    return {
        "rows": [(stage, *(side.get(stage) for side in sides)) for stage in stages],
        "sums": sums,
        "times": sums[0] / sums[1] if sums[1] else None,
    }


def trajectories(run: Path) -> dict[str, list[Row]]:
    """teacher -> prompts, each with its sides' pictures by step: student first, then teacher."""
    entries = read_json(run / "samples" / "trajectory.json") or []
    found: dict[tuple[str, str, int], dict[str, list[Row]]] = defaultdict(lambda: {"student": [], "teacher": []})
    seen: Counter[tuple] = Counter()
    for entry in sorted(entries, key=lambda entry: entry["step"]):
        place = tuple(entry[key] for key in ("teacher", "prompt", "side", "step"))
        sides = found[entry["teacher"], entry["prompt"], seen[place]]  # the same prompt may be there twice
        sides[entry["side"]].append(entry | {"picture": picture(run / "samples", entry["file"])})
        seen[place] += 1
    by_teacher: dict[str, list[Row]] = defaultdict(list)
    for (teacher, prompt, _), sides in found.items():
        told = {side: steps for side, steps in sides.items() if steps}
        by_teacher[teacher].append({"prompt": prompt, "sides": told})
    return dict(by_teacher)


# Timing.


def timing(updates: list[Row]) -> dict[str, Any] | None:
    """Seconds per stage, the rest of the wall clock, network calls per picture and rates; None without updates."""
    if not updates:
        return None
    seconds, images = updates[-1]["seconds"], updates[-1]["images"]
    add = partial(_sum_of, updates)
    stages, calls = add("stage_seconds"), add("network_calls")
    named = {name: stages.pop(name) for name in STAGES if name in stages} | stages
    rest = seconds - sum(named.values())
    parts = named | ({"the rest": rest} if rest > 0.005 * seconds else {})
    shades = [f"color-mix(in oklab, var(--accent) {max(92 - 17 * i, 10)}%, var(--paper))" for i in range(len(parts))]
    rows = [(name, value, shade) for (name, value), shade in zip(parts.items(), shades, strict=True)]
    return {
        "bar": charts.stacked_bar(rows),
        "rows": rows,
        "total": sum(parts.values()) or 1.0,
        "updates": len(updates),
        "calls": {side: count / images for side, count in calls.items()} if images else {},
        "images": images,
        "images_per_second": images / seconds if seconds else 0.0,
    }


def _sum_of(rows: list[Row], key: str) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.get(key, {}).items():
            total[name] += value
    return dict(total)
