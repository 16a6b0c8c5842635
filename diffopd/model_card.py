"""README.md of an export: what it is, how to use it, whom it learned from, under which licences, what it scores."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffopd import __version__
from diffopd.assemble import student_arguments
from diffopd.data import read_prompts
from diffopd.dialects import ranks_said, read_layers
from diffopd.errors import UserError
from diffopd.hub import LICENSES
from diffopd.load import LORA_FILE
from diffopd.locate import HubId, find_pipeline, is_path, parse_hub_id
from diffopd.parts import completed
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder
from diffopd.stranger import Form
from diffopd.teacher import TeacherCard

UNKNOWN = "not stated"
WHERE = "PATH/TO/export"
IMPORT = "from diffusers import DiffusionPipeline"
TITLES = {
    "diffusers": "As a pipeline:",
    "lora": "As a LoRA on the base:",
    "kohya": "As a LoRA for ComfyUI and other readers of kohya's files, here read by diffusers:",
    "single-file": "As one checkpoint file:",
}


@dataclass(frozen=True)
class Exported:
    """What a card speaks of. grid: timesteps and sigmas of the call; where: the export's place as its code names it."""

    recipe: Recipe
    cards: list[TeacherCard]
    folder: RunFolder
    pipeline_class: type
    forms: list[Form] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    grid: dict[str, list[float]] = field(default_factory=dict)
    where: str = WHERE
    is_video: bool = False


def model_card(exported: Exported) -> str:
    """The card as Markdown with the hub's front matter; each block of code runs as it stands, paths replaced."""
    recipe, cards = exported.recipe, exported.cards
    student, steps = recipe.student, recipe.student.num_inference_steps
    named = [licence for _, licence in licenses(recipe, cards) if licence != UNKNOWN]
    each = {name.lower(): name for name in named}  # Apache-2.0 is apache-2.0
    is_one = len(each) == 1 and len(named) == len(cards) + 1
    metadata = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {hub_base(recipe).repo}"] if hub_base(recipe) else []),
        *_license_lines(next(iter(each)) if is_one else "other"),
        f"tags: [{'text-to-video' if exported.is_video else 'text-to-image'}, distillation, few-step]",
        "---",
    ]
    body = [
        f"# {recipe.name}",
        "",
        f"A {steps}-step student of {len(cards)} teacher{'s' * (len(cards) > 1)}, {_how(recipe)} with "
        f"diffopd {__version__}. It is made for {steps} steps at guidance_scale {student.guidance_scale:g}"
        f"{_default_guidance(exported)}.{_other_steps(recipe)}",
        "",
        *(line for form in exported.forms for line in usage(exported, form)),
        "| teacher | form | guidance | weights (sha256) | license |",
        "|---|---|---|---|---|",
        *_teachers(recipe, cards),
        "",
        *_training(exported),
        "",
        f"Base: `{base_name(recipe)}`, license {base_license(recipe)}. Licenses inherited from base and teachers: "
        f"{', '.join(sorted(each.values(), key=str.lower)) or UNKNOWN}.",
        "",
        *_scores(exported.folder),
        "",
        "Reloaded by stock diffusers in a process without diffopd; largest pixel difference to the student (of 1): "
        + ", ".join(f"{name} {value:.1g}" for name, value in exported.checks.items())
        + ".",
    ]
    return "\n".join([*metadata, "", *body]) + "\n"


def _license_lines(name: str) -> list[str]:
    """What the card's head says of a licence: the hub takes the ids that it knows, and a name beside `other`."""
    if name in LICENSES:
        return [f"license: {name}"]
    slug = re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")
    return ["license: other", *([f"license_name: {slug}"] if slug not in ("", "other") else [])]


def usage(exported: Exported, form: Form) -> list[str]:
    """How to load one form and draw with it, as the lines of a block of code."""
    call = f"pipeline({_example_prompt(exported.cards)!r}, {_told(exported)})"
    lines = [*_loading(exported, form), *_scheduler_lines(form)]
    if exported.is_video:
        lines.insert(1, "from diffusers.utils import export_to_video")
        lines.append(f'export_to_video({call}.frames[0], "film.mp4")')
    else:
        lines.append(f'{call}.images[0].save("picture.png")')
    return [TITLES[form.name], "", "```python", *lines, "```", ""]


def _loading(exported: Exported, form: Form) -> list[str]:
    """The lines that load a form: from a local export, or from the hub once it lies there."""
    recipe, kind = exported.recipe, exported.pipeline_class
    on_hub = exported.where != WHERE
    name = f"{form.name}/{Path(form.lora or form.file or '').name}"
    if form.name == "diffusers":
        folder = exported.where if on_hub else f"{WHERE}/pipeline"
        return [IMPORT, f'pipeline = DiffusionPipeline.from_pretrained("{folder}")']
    found, base = _base(recipe, weights=form.file is None)
    if form.file:
        file = f"https://huggingface.co/{exported.where}/blob/main/{name}" if on_hub else f"{WHERE}/{name}"
        load = f'{kind.__name__}.from_single_file("{file}", config={base})'
        return [f"from diffusers import {kind.__name__}", *found, f"pipeline = {load}"]
    weights = f'"{exported.where}", weight_name="{name}"' if on_hub else f'"{WHERE}/{name}"'
    load = f"pipeline = DiffusionPipeline.from_pretrained({base})"
    return [IMPORT, *found, load, f"pipeline.load_lora_weights({weights})"]


def _base(recipe: Recipe, *, weights: bool) -> tuple[list[str], str]:
    """Lines that find the base (`weights`: or only its configs), and the arguments by which diffusers then takes it.

    diffusers loads no pipeline from a repository's subfolder, and `from_single_file` takes its `revision` for the
    file's repository as well: there the base is downloaded first.
    """
    hub = hub_base(recipe)
    if hub is None:
        return [], f'"PATH/TO/{base_name(recipe)}"'
    revision = f', revision="{hub.revision}"' if hub.revision else ""
    if not hub.subfolder and (weights or not revision):
        return [], f'"{hub.repo}"{revision}'
    ends = ["safetensors", "json", "txt", "model"][0 if weights else 1 :]
    wanted = [f"{hub.subfolder}/*.{end}".lstrip("/") for end in ends]
    folder = f' + "/{hub.subfolder}"' if hub.subfolder else ""
    load = f'base = snapshot_download("{hub.repo}"{revision}, allow_patterns={wanted}){folder}'
    return ["from huggingface_hub import snapshot_download", load], "base"


def _scheduler_lines(form: Form) -> list[str]:
    """The recipe's scheduler is not in a LoRA or in one file: the client sets it."""
    override = dict(form.scheduler or {})
    if not override:
        return []
    kind = override.pop("class", None)
    lines = [f"from diffusers import {kind}"] if kind else []
    options = "".join(f", {key}={value!r}" for key, value in override.items())
    made = kind or "type(pipeline.scheduler)"
    return [*lines, f"pipeline.scheduler = {made}.from_config(pipeline.scheduler.config{options})"]


def _told(exported: Exported) -> str:
    told = completed(exported.pipeline_class, student_arguments(exported.recipe))
    told.pop("output_type", None)
    return ", ".join(f"{key}={value!r}" for key, value in told.items())


def _default_guidance(exported: Exported) -> str:
    """A warning where the pipeline's own defaults would guide a student otherwise than it was trained."""
    told, parameters = (
        student_arguments(exported.recipe),
        inspect.signature(exported.pipeline_class.__call__).parameters,
    )
    other = []
    for name in ("guidance_scale", "true_cfg_scale"):
        default = parameters[name].default if name in parameters else None
        if isinstance(default, (int, float)) and name in told and default != told[name]:
            other.append(f"{name} {default:g}")
    if not other:
        return ""
    return (
        "; guidance is an argument of the call and cannot be stored with the weights, and the default of "
        f"{exported.pipeline_class.__name__} ({', '.join(other)}) would draw worse"
    )


def _other_steps(recipe: Recipe) -> str:
    if recipe.scored_steps == recipe.student.num_inference_steps:
        return ""
    return f" Its scores below are those of {recipe.scored_steps} steps: call it with that many to have them."


def hub_base(recipe: Recipe) -> HubId | None:
    """The hub id that the base is, None for one of the shelf or a folder."""
    name = recipe.student.pretrained_model_name_or_path
    return parse_hub_id(name) if is_path(name) and not Path(name).exists() else None


def base_name(recipe: Recipe) -> str:
    """The base as a card names it: its hub id with subfolder and revision, or its folder's name."""
    name = recipe.student.pretrained_model_name_or_path
    return name if hub_base(recipe) else Path(name).name


def _how(recipe: Recipe) -> str:
    return "trained on noised pictures" if recipe.objective.states == "data" else "distilled on its own trajectory"


def licenses(recipe: Recipe, cards: list[TeacherCard]) -> list[tuple[str, str]]:
    """(who, licence) of the base and of every teacher: what an export inherits."""
    teachers = [(f"teacher {card.name}", card.license) for card in cards]
    return [(f"base {base_name(recipe)}", base_license(recipe)), *teachers]


def base_license(recipe: Recipe) -> str:
    """The licence in the front matter of the base's own card, 'not stated' without one."""
    try:
        readme = find_pipeline(recipe.student.pretrained_model_name_or_path) / "README.md"
        lines = readme.read_text(encoding="utf-8").splitlines()[:40]
    except (UserError, FileNotFoundError):
        return UNKNOWN
    stated = dict(line.split(":", 1) for line in lines if line.startswith(("license:", "license_name:")))
    name = stated.get("license_name") or stated.get("license") or UNKNOWN
    return name.strip().strip("\"'") or UNKNOWN


def _teachers(recipe: Recipe, cards: list[TeacherCard]) -> list[str]:
    """A row per teacher, as the recipe has it: its guidance may override the card's."""
    rows = []
    for settings, card in zip(recipe.teachers, cards, strict=True):
        guidance = card.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        told = "".join(f", {key} = {value!r}" for key, value in settings.call.items())
        digest = f"`{card.digest()}`" if card.weights else "none of its own"
        rows.append(f"| {card.name} | {card.form} | {guidance:g}{told} | {digest} | {card.license} |")
    return rows


def _training(exported: Exported) -> list[str]:
    """How the student was made, a row per setting that matters."""
    recipe, folder = exported.recipe, exported.folder
    student, objective, train = recipe.student, recipe.objective, recipe.train
    progress = json.loads((folder.latest_checkpoint() / "state" / "progress.json").read_text())
    begun = ", beginning as the average of its teachers" if student.begin_from == "teacher_average" else ""
    rows = {
        "trained": (_adapter(exported) if student.train == "lora" else "all weights of the denoiser") + begun,
        "objective": f"{objective.name}, query {objective.query}, {objective.states} states",
        "teacher substeps": f"{objective.substeps} ({objective.substep_solver}) between two states of the student",
        "tasks per update": train.tasks_per_update,
        "updates": f"{progress['update']} ({progress['images']} pictures)",
        "batch": f"{train.batch_size} x {train.gradient_accumulation_steps} pictures a task and process",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler}, {train.lr_warmup_steps} updates of warm-up",
        "weight average": f"decay {train.ema_decay:g}" if train.ema_decay else "none",
        "precision": _precision(recipe),
        "seed": recipe.seed,
        "negative prompt": student.negative_prompt or "none",
        **{name: ", ".join(f"{value:.4g}" for value in values) for name, values in exported.grid.items()},
    }
    lines = ["| training | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if student.solver == "native":
        return lines
    level = f" at noise_level {student.noise_level:g}" if student.noise_level else ""
    return [
        *lines,
        "",
        f"In training the student walked with the solver `{student.solver}`{level}. Stock diffusers does not know it: "
        "the scores here and this folder use the scheduler's own step on the same grid.",
    ]


def _adapter(exported: Exported) -> str:
    """The geometry of the student's LoRA as its file has it: one that it started from may have another than asked."""
    layers, config = read_layers(exported.folder.latest_checkpoint() / LORA_FILE)
    said = [f"LoRA, {ranks_said(layer.down.shape[0] for layer in layers.values())}"]
    if config:
        said.append("alpha by layer" if config.get("alpha_pattern") else f"alpha {config['lora_alpha']:g}")
    start = exported.recipe.student.init_weights
    return ", ".join([*said, *([f"starting as `{Path(start).name}`"] if start else [])])


def _precision(recipe: Recipe) -> str:
    """In which precision it was trained and scored; the export is always of float32 weights."""
    train, quantization = recipe.train, recipe.student.quantization
    said = ["bf16 autocast" if train.mixed_precision == "bf16" else "float32"]
    said += ["frozen weights in bf16"] if train.frozen_dtype == "bf16" else []
    if quantization != "none":
        name = quantization if isinstance(quantization, str) else quantization["quant_backend"]
        said.append(f"the base's denoiser quantized ({name})")
    if recipe.evaluate.dtype == "bf16":
        return ", ".join(said) + "; scored on the base in bf16, exported in float32"
    return ", ".join(said) + ("; scored and exported on the base in float32" if len(said) > 1 else "")


def _example_prompt(cards: list[TeacherCard]) -> str:
    return read_prompts(cards[0].prompts.test)[0].prompt


def _scores(folder: RunFolder) -> list[str]:
    file = folder.path / "evaluation" / "scores.json"
    if not file.is_file():
        return ["Not evaluated yet."]
    rows = [row for row in json.loads(file.read_text())["rows"] if row["model"] == "student"]
    lines = ["| task | steps | score | 95 % interval | prompts | seeds |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        counts = f"{low:.3f} to {high:.3f} | {row['num_prompts']} | {len(row['seeds'])}"
        lines.append(f"| {row['task']} | {row['num_inference_steps']} | {row['score']:.3f} | {counts} |")
    return lines


def latest_grid(scheduler: Any) -> dict[str, list[float]]:
    """Timesteps and, where it has them, sigmas that a scheduler stood at in its latest call."""
    found = {"grid (timesteps)": [float(t) for t in scheduler.timesteps]}
    sigmas = getattr(scheduler, "sigmas", None)
    return found | ({"grid (sigmas)": [float(s) for s in sigmas]} if sigmas is not None else {})
