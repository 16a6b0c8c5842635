"""Tune: a few-step model learns from a folder of pictures and keeps its few steps (D-OPSD, arXiv:2605.05204).

Nothing here trains. The pictures become a task folder (a teacher's card, prompts that name pictures), and the run a
recipe of the one loop: the student's own call on text, taught by its average under a richer context. The baselines
are recipes of the same loop, in which pictures teach: noised, without a network.
"""

from __future__ import annotations

import json
import shutil
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
from diffopd.locate import nearest_sibling, parse_hub_id
from diffopd.recipe import Recipe, from_resolved
from diffopd.run_folder import has_begun
from diffopd.tune_recipe import TuneRecipe

TASK = "task"  # the folder inside a run's that holds its task
ITSELF = "itself"
GIVEN = "pictures"
PRIOR = "prior"  # the teacher of the second task, and its folder inside the task's


@dataclass(frozen=True)
class Tuning:
    """A checked tuning run. task: file name -> text of the task's folder; recipe: what the loop runs.

    context: what the teacher sees, None where pictures teach.
    """

    asked: TuneRecipe
    recipe: Recipe
    pictures: list[Picture]
    buckets: list[Size]
    context: ContextSettings | None
    task: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where the task lies."""
        return Path(self.recipe.teachers[0].name)


def prepare(asked: TuneRecipe, task_folder: Path | None = None, *, shipped: bool = False) -> Tuning:
    """Read the pictures and make the loop's recipe; nothing is written.

    task_folder: where the task will lie (default: in the output folder). shipped: of a base on the hub take the configs
    that come with diffopd, which are enough for a plan. Raises UserError for any mistake in the
    pictures, a context that the pipeline cannot take, or settings that do not fit.
    """
    name = asked.student.pretrained_model_name_or_path
    try:
        base = read_blueprint(name, shipped=shipped)
    except UserError as error:
        raise UserError(f"{asked.place('student', 'pretrained_model_name_or_path')}: {error}") from error
    pictures = read_pictures(asked.images.folder, asked.images.instance_prompt)
    context = None
    if not asked.is_given:
        context = asked.context_for(
            base.pipeline_class, is_enhanced=all(p.enhanced for p in pictures), folder=base.folder
        )
        _refuse_missing_files(asked, context)
    if asked.look.unrelated:
        read_prompts(asked.look.unrelated)
    asked = _with_guidance(asked, base)
    buckets = _buckets(asked, base, pictures)
    folder = task_folder or Path(asked.output_dir).absolute() / TASK
    recipe = from_resolved(_resolved(asked, base, context, folder), asked.source)
    return Tuning(asked, recipe, pictures, buckets, context, _task(asked, folder, pictures, buckets))


def _refuse_missing_files(asked: TuneRecipe, context: ContextSettings) -> None:
    """What a context names on this machine is there; what it names on the hub is asked for later."""
    for key in ("ip_adapter", "image_encoder", "vision_language"):
        name = getattr(context, key)
        if name and not (Path(name).exists() or parse_hub_id(name)):
            near = nearest_sibling(Path(name))
            raise UserError(f"{asked.place('context', key)}: {key}: there is no file or folder {name}.{near}")


def write_task(tuning: Tuning) -> bool:
    """Write the task's folder, whole or not at all; returns whether it is new.

    Raises UserError when a run has begun with other pictures or captions, or something else lies there.
    """
    folder = tuning.folder
    before = {file: path.read_text(encoding="utf-8") for file in tuning.task if (path := folder / file).is_file()}
    if before == tuning.task:
        return False
    if has_begun(folder.parent):
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
    held = [path for path in held if not path.is_relative_to(f"{PRIOR}/pictures")]
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


def _resolved(asked: TuneRecipe, base: Blueprint, context: ContextSettings | None, folder: Path) -> dict[str, Any]:
    """The loop's recipe as a dict. A resolution that was asked for is the deployment's, too."""
    size, call = asked.images.resolution, asked.student.call
    whole = asked.model_dump(
        mode="json", exclude=set(TuneRecipe.model_fields) - set(Recipe.model_fields), exclude_unset=True
    )
    if size:
        side = size // bucket_step(base) * bucket_step(base)
        whole["student"]["call"] = call = {"width": side, "height": side} | call
    own = asked.student.guidance_scale
    whole.setdefault("evaluate", {}).setdefault("guidance_scales", [own])
    if context is None:
        whole["objective"].setdefault("name", _own_loss(asked, base))
        return whole | {"teachers": _given(asked, base, call, folder)}
    teacher = asked.teacher
    taught = {
        "name": str(folder),
        "guidance_scale": own if teacher.guidance_scale is None else teacher.guidance_scale,
        "call": call | teacher.call,
        "context": context.model_dump(exclude_unset=True),
    }
    if teacher.weights != "frozen":
        taught["ema_decay"] = asked.ema_decay
    kept = {"name": str(folder / PRIOR), "weight": asked.prior.weight, "guidance_scale": own, "call": call}
    return whole | {"teachers": [taught, *([kept] if asked.prior.is_given else [])]}


def _given(asked: TuneRecipe, base: Blueprint, call: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The pictures as teachers: the user's own, and under dreambooth those that the untouched model draws."""
    shared = {
        "guidance_scale": unguided(asked, base)
        if asked.noising.guidance_scale is None
        else asked.noising.guidance_scale,
        "num_inference_steps": asked.noising.num_levels,
        "call": call,
    }
    prior = {"name": str(folder / PRIOR), "weight": asked.prior.weight, **shared}
    return [{"name": str(folder), **shared}, *([prior] if asked.prior.is_given else [])]


def _own_loss(asked: TuneRecipe, base: Blueprint) -> str:
    """What the base was trained with: the noise's square where it predicts the noise, else the velocity's."""
    from diffopd.grid import drivable_scheduler, path_name

    scheduler = drivable_scheduler(asked, base)
    is_noise = path_name(scheduler) == "vp" and scheduler.config.get("prediction_type", "epsilon") == "epsilon"
    return "noise" if is_noise else "velocity"


def _with_guidance(asked: TuneRecipe, base: Blueprint) -> TuneRecipe:
    """Where no guidance is asked for, none: at the default of 1, Z-Image is guided."""
    if "guidance_scale" in asked.student.model_fields_set:
        return asked
    student = asked.student.model_copy(update={"guidance_scale": unguided(asked, base)})
    return asked.model_copy(update={"student": student})


def unguided(asked: TuneRecipe, base: Blueprint) -> float:
    """The student's own guidance where it costs nothing (a network that is told it), else the scale that is none.

    Raises UserError for a call that the pipeline refuses.
    """
    from diffopd.grid import make_scheduler
    from diffopd.rehearsal import can_rehearse, rehearse

    own = asked.student.guidance_scale
    if not can_rehearse(base, asked.student.call):
        return min(own, 1.0)
    call = {key: value for key, value in asked.student.call.items() if key not in ("timesteps", "sigmas")}
    for scale in dict.fromkeys((own, 1.0, 0.0)):
        told = {"num_inference_steps": 2, "guidance_scale": scale, **call}
        try:
            rows = rehearse(base, make_scheduler(asked, base), told).rows
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{asked.place('student', 'call')}: {base.pipeline_class} cannot be called like this: {error} Correct "
                "student.call, or student.scheduler."
            ) from error
        if rows[0] == 1:
            return scale
    return min(own, 1.0)


def _task(asked: TuneRecipe, folder: Path, pictures: list[Picture], buckets: list[Size]) -> dict[str, str]:
    rows = []
    for picture, bucket in zip(pictures, buckets, strict=True):
        row = {"prompt": picture.caption, "file_name": str(picture.path), "bucket": list(bucket)}
        row |= {"enhanced_prompt": picture.enhanced} if picture.enhanced else {}
        rows.append(row | {"pixels": picture.pixels})
    if asked.images.held_out:
        held_out = [row.prompt for row in read_prompts(asked.images.held_out)]
    else:
        held_out = list(dict.fromkeys(picture.caption for picture in pictures))
    form = "pictures" if asked.is_given else "base" if asked.teacher.weights == "frozen" else "ema"
    name = GIVEN if asked.is_given else ITSELF
    task = _one_task(_card(asked, name, form), rows, held_out)
    if asked.prior.is_given:
        prompts, files = asked.prior.all_prompts(), prior_files(folder, asked.prior.num_pictures)
        rows = [{"prompt": p, "file_name": str(f), "is_drawn": True} for p, f in zip(prompts, files, strict=True)]
        card = _card(asked, PRIOR, form if asked.is_given else "base")
        prior = _one_task(card, rows, list(dict.fromkeys(prompts)))
        task |= {f"{PRIOR}/{file}": text for file, text in prior.items()}
    return task


def prior_files(folder: Path, num_pictures: int) -> list[Path]:
    """Where the pictures lie that the untouched model draws; folder: the task's."""
    return [folder / PRIOR / "pictures" / f"{number:04d}.png" for number in range(num_pictures)]


def _one_task(card: str, rows: list[dict[str, Any]], held_out: list[str]) -> dict[str, str]:
    return {
        "teacher.toml": card,
        "prompts/train.jsonl": _lines(rows),
        "prompts/test.jsonl": _lines([{"prompt": prompt} for prompt in held_out]),
        "closeness.py": Path(closeness.__file__).read_text(encoding="utf-8"),
    }


def _card(asked: TuneRecipe, name: str, form: str) -> str:
    student = asked.student
    settings = {
        "name": name,
        "base": student.pretrained_model_name_or_path,
        "form": form,
        "guidance_scale": student.guidance_scale,
        "num_inference_steps": student.num_inference_steps,
        "reward": "closeness.py:closeness",
        "license": "that of the base" if name == PRIOR else asked.images.license,
    }
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    prompts = ["", "[prompts]", 'train = "prompts/train.jsonl"', 'test = "prompts/test.jsonl"']
    return "\n".join([*lines, *prompts]) + "\n"


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
