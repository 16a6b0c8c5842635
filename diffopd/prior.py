"""Pictures of a class or of prompts, drawn once by the untouched model as it is deployed: what is to be kept."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffopd.data import PromptRow
from diffopd.recipe import Recipe
from diffopd.tune import Tuning, prior_files

NOISE = "class pictures"  # key of their noise: no picture of an evaluation has it


def draw_prior(tuning: Tuning, tell: Callable[[str], Any] = print) -> None:
    """Draw what [prior] names into the task's folder, all or none; those that are there stay.

    DreamBooth learns from them; under D-OPSD they are what the evaluation compares with.

    The model is drawn with on this process's GPU and let go: other processes may train there next.

    Raises UserError for whatever is wrong with the run, before anything is drawn.
    """
    asked = tuning.asked
    if not asked.prior.is_given:
        return
    files = prior_files(tuning.folder, asked.prior.num_pictures)
    if all(file.is_file() for file in files):
        return
    import torch

    from diffopd.preflight import check
    from diffopd.processes import take_gpu

    check(tuning.recipe)
    tell(f"Drawing {len(files)} pictures of {asked.prior.subject} with the untouched model.")
    take_gpu()
    _draw(tuning, files)
    gc.collect()  # a pipeline may hold itself in a circle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _draw(tuning: Tuning, files: list[Path]) -> None:
    from diffopd.evaluate import pictures, student_contender

    contender = student_contender(tuning.recipe, _untouched(tuning.recipe))
    rows = [PromptRow(prompt) for prompt in tuning.asked.prior.all_prompts()]
    partial = files[0].parent.with_name(f".pictures.{os.getpid()}")  # several processes may draw the same
    partial.mkdir(parents=True, exist_ok=True)
    left = iter(files)
    for images in pictures(contender, rows, NOISE, tuning.recipe.seed, tuning.recipe.evaluate.batch_size):
        for image in images:
            image.save(partial / next(left).name)
    _put(partial, files[0].parent)


def _put(partial: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _untouched(recipe: Recipe) -> Any:
    from diffopd.adapters import STUDENT, freeze
    from diffopd.assemble import with_scheduler
    from diffopd.load import load_lora, load_pipeline
    from diffopd.processes import default_device
    from diffopd.teacher import lora_file

    pipeline = with_scheduler(load_pipeline(recipe.student.pretrained_model_name_or_path), recipe)
    if recipe.student.init_weights:
        file = lora_file(recipe.student.init_weights, Path.cwd(), recipe.place("student", "init_weights"))
        load_lora(pipeline, str(file), adapter_name=STUDENT)
    freeze(pipeline)
    return pipeline.to(default_device())
