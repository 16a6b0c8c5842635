"""Tune: a few-step model learns from a folder of pictures and keeps its few steps (D-OPSD, arXiv:2605.05204).

Nothing here trains. The pictures become a task folder (a teacher's card, prompts that name pictures), and the run a
recipe of the one loop: the student's own call on text, taught by its average under a richer context.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffopd import closeness
from diffopd.blueprint import Blueprint, read_blueprint
from diffopd.buckets import Size, bucket_sizes, bucket_step, native_resolution, nearest_bucket
from diffopd.context import ContextSettings
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.images import Picture, read_pictures
from diffopd.recipe import Recipe, from_resolved
from diffopd.tune_recipe import TuneRecipe

TASK = "task"  # the folder inside a run's that holds its task
ITSELF = "itself"


@dataclass(frozen=True)
class Tuning:
    """A checked tuning run. task: file name -> text of the task's folder; recipe: what the loop runs."""

    asked: TuneRecipe
    recipe: Recipe
    pictures: list[Picture]
    buckets: list[Size]
    context: ContextSettings
    task: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where the task lies."""
        return Path(self.recipe.teachers[0].name)


def prepare(asked: TuneRecipe, task_folder: Path | None = None) -> Tuning:
    """Read the pictures and make the loop's recipe; nothing is written.

    task_folder: where the task will lie (default: in the output folder). Raises UserError for any mistake in the
    pictures, a context that the pipeline cannot take, or settings that do not fit.
    """
    name = asked.student.pretrained_model_name_or_path
    try:
        base = read_blueprint(name)
    except UserError as error:
        raise UserError(f"{asked.place('student', 'pretrained_model_name_or_path')}: {error}") from error
    pictures = read_pictures(asked.images.folder, asked.images.instance_prompt)
    context = asked.context_for(base.pipeline_class, is_enhanced=all(p.enhanced for p in pictures))
    buckets = _buckets(asked, base, pictures)
    folder = task_folder or Path(asked.output_dir).absolute() / TASK
    recipe = from_resolved(_resolved(asked, base, context, folder), asked.source)
    return Tuning(asked, recipe, pictures, buckets, context, _task(asked, base, pictures, buckets))


def write_task(tuning: Tuning) -> bool:
    """Write the task's folder, whole or not at all; returns whether it is new.

    Raises UserError when a run has begun with other pictures or captions, or something else lies there.
    """
    folder = tuning.folder
    before = {file: path.read_text(encoding="utf-8") for file in tuning.task if (path := folder / file).is_file()}
    if before == tuning.task:
        return False
    if (folder.parent / "recipe.json").is_file():
        changed = next(file for file in tuning.task if before.get(file) != tuning.task[file])
        raise UserError(
            f"output_dir {folder.parent} holds a run that began with other pictures, captions or teacher "
            f"({TASK}/{changed} differs). Nothing was written; restore them, or give another --output-dir."
        )
    _refuse_foreign(folder, set(tuning.task))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file, text in tuning.task.items():
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        (partial / file).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def _refuse_foreign(folder: Path, own: set[str]) -> None:
    held = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    foreign = next((path for path in held if path.as_posix() not in own and path.parent.name != "__pycache__"), None)
    if foreign:
        raise UserError(
            f"{folder / foreign}: the task of a tuning run belongs where this file is. Nothing was written; give "
            "another --output-dir."
        )


@contextmanager
def task_written(tuning: Tuning) -> Iterator[None]:
    """The task lies in its folder; one that is new goes again if an error comes before its run has begun."""
    is_new = write_task(tuning)
    try:
        yield
    except BaseException:
        if is_new and not (tuning.folder.parent / "recipe.json").is_file():
            shutil.rmtree(tuning.folder)
            if not any(tuning.folder.parent.iterdir()):
                tuning.folder.parent.rmdir()
        raise


def facts(tuning: Tuning) -> list[tuple[str, str]]:
    """What a person should know before the run: pictures, sizes, who teaches, and with what."""
    asked, pictures = tuning.asked, tuning.pictures
    sizes = Counter(tuning.buckets)
    shapes = ", ".join(f"{w} x {h}: {count}" for (w, h), count in sizes.most_common())
    enlarged = sum(p.size[0] < w or p.size[1] < h for p, (w, h) in zip(pictures, tuning.buckets, strict=True))
    transparent = sum(picture.is_transparent for picture in pictures)
    notes = [f"{enlarged} smaller than that and enlarged"] if enlarged else []
    notes += [f"{transparent} transparent and laid over white"] if transparent else []
    return [
        ("pictures", f"{len(pictures)} from {asked.images.folder}"),
        ("sizes", "; ".join([shapes, *notes])),
        ("teacher", _who(asked)),
        ("its context", tuning.context.kind.replace("_", " ")),
        ("objective", WEIGHTS.get(asked.objective.name, asked.objective.name)),
    ]


WEIGHTS = {
    "denoised": "denoised (sigma^2 times the velocity's: high noise weighs most; D-OPSD's released code)",
    "velocity": "velocity (every state alike; D-OPSD's paper)",
}


def _who(asked: TuneRecipe) -> str:
    if asked.teacher.weights == "ema":
        return f"the average of the student's trained weights, decay {asked.ema_decay:.8g} an update"
    return {"frozen": "the untouched model", "live": "the student as it is now"}[asked.teacher.weights]


def _buckets(asked: TuneRecipe, base: Blueprint, pictures: list[Picture]) -> list[Size]:
    resolution, step = asked.images.resolution or native_resolution(base), bucket_step(base)
    if resolution < step:
        raise UserError(
            f"{asked.place('images', 'resolution')}: resolution = {resolution} is below {step}, the smallest size that "
            "this model can draw. Give a multiple of it."
        )
    sizes = bucket_sizes(resolution, step)
    sizes = sizes if asked.images.aspect_buckets else sizes[:1]
    return [nearest_bucket(picture.size, sizes) for picture in pictures]


def _resolved(asked: TuneRecipe, base: Blueprint, context: ContextSettings, folder: Path) -> dict[str, Any]:
    """The loop's recipe as a dict. A resolution that was asked for is the deployment's, too."""
    teacher, size = asked.teacher, asked.images.resolution
    whole = asked.model_dump(mode="json", exclude={"images", "teacher", "context", "look"}, exclude_unset=True)
    call = asked.student.call
    if size:
        side = size // bucket_step(base) * bucket_step(base)
        whole["student"]["call"] = call = {"width": side, "height": side} | call
    own = asked.student.guidance_scale
    whole.setdefault("evaluate", {}).setdefault("guidance_scales", [own])
    taught = {
        "name": str(folder),
        "guidance_scale": own if teacher.guidance_scale is None else teacher.guidance_scale,
        "call": call | teacher.call,
        "context": context.model_dump(exclude_unset=True),
    }
    if teacher.weights != "frozen":
        taught["ema_decay"] = asked.ema_decay
    return whole | {"teachers": [taught]}


def _task(asked: TuneRecipe, base: Blueprint, pictures: list[Picture], buckets: list[Size]) -> dict[str, str]:
    rows = []
    for picture, bucket in zip(pictures, buckets, strict=True):
        row = {"prompt": picture.caption, "file_name": str(picture.path), "bucket": list(bucket)}
        row |= {"enhanced_prompt": picture.enhanced} if picture.enhanced else {}
        rows.append(row | {"pixels": picture.pixels})
    if asked.images.held_out:
        held_out = [row.prompt for row in read_prompts(asked.images.held_out)]
    else:
        held_out = list(dict.fromkeys(picture.caption for picture in pictures))
    return {
        "teacher.toml": _card(asked),
        "prompts/train.jsonl": _lines(rows),
        "prompts/test.jsonl": _lines([{"prompt": prompt} for prompt in held_out]),
        "closeness.py": Path(closeness.__file__).read_text(encoding="utf-8"),
    }


def _card(asked: TuneRecipe) -> str:
    student = asked.student
    settings = {
        "name": ITSELF,
        "base": student.pretrained_model_name_or_path,
        "form": "base" if asked.teacher.weights == "frozen" else "ema",
        "guidance_scale": student.guidance_scale,
        "num_inference_steps": student.num_inference_steps,
        "reward": "closeness.py:closeness",
        "license": asked.images.license,
    }
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    prompts = ["", "[prompts]", 'train = "prompts/train.jsonl"', 'test = "prompts/test.jsonl"']
    return "\n".join([*lines, *prompts]) + "\n"


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
