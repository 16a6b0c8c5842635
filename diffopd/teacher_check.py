"""Before a student is tuned: does its richer self draw the pictures better than the student does from text alone?

A teacher that cannot draw them with the picture before its eyes has nothing to teach, and a biased one is copied within
ten updates. Measured by distance, shown as a grid.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffopd.closeness import distance
from diffopd.data import PromptRow
from diffopd.drawing import draw, embeddings, grid, mean, sharpness
from diffopd.errors import UserError
from diffopd.features import Features
from diffopd.image_file import picture
from diffopd.run_folder import RunFolder

if TYPE_CHECKING:
    from diffopd.distill import Run

ROWS = 8
MORE_STEPS = 4  # times the student's own
FEW_STEP_SHARPNESS = 0.7  # of its own pictures in more steps: below, a model is hardly made for so few
GRID = "teacher-check.png"
NO_FEATURES = Features()


@dataclass(frozen=True)
class Verdict:
    """Mean distances of drawings to their pictures.

    measure: 1 - cosine in "DINO" or the IP-Adapter's "image encoder", or "pixels" (thumbnails). closer: share of the
    pictures that the context brings nearer. few_step_sharpness: the student's at its own steps as a share of that in
    four times as many, of prompts to keep where there are some (a new word is drawn dully in any number of steps), None
    where its call fixes the grid.
    """

    measure: str
    with_context: float
    without_context: float
    closer: float
    pixels_with_context: float
    pixels_without_context: float
    few_step_sharpness: float | None

    @property
    def passed(self) -> bool:
        """Whether the teacher with its context comes nearer, on the mean and for most of the pictures."""
        return self.with_context < self.without_context and self.closer > 0.5


@dataclass(frozen=True)
class _Drawn:
    target: Image.Image
    without: Image.Image
    with_context: Image.Image


def check_teacher(run: Run, folder: RunFolder, features: Features = NO_FEATURES, *, force: bool = False) -> Verdict:
    """Draw up to eight training pictures with and without the context, all else as the teacher is called.

    Writes teacher-check.png and .json.

    Raises UserError with the numbers and the grid where the context does not help, unless forced.
    """
    from diffopd.distill import batches_of

    teacher, drawn = run.teachers[0], []
    for numbers, rows in batches_of(run, teacher, list(enumerate(teacher.train_rows[:ROWS]))):
        drawn += _draw_both(run, rows, numbers)
    verdict = _judge(run, drawn, features)
    if run.processes.is_main:
        page = grid([(d.target, d.without, d.with_context) for d in drawn], ["picture", "text", "context"])
        page.save(folder.path / GRID)
        folder.write("teacher-check.json", json.dumps(asdict(verdict) | {"passed": verdict.passed}, indent=1))
    if not (verdict.passed or force):
        raise UserError(
            f"The teacher does not draw the pictures better with its context ({verdict.with_context:.3f} by "
            f"{verdict.measure}) than from text alone ({verdict.without_context:.3f}; nearer in "
            f"{100 * verdict.closer:.0f} % of {len(drawn)}): it has nothing to teach. Look at {folder.path / GRID}. "
            "Try another context (context.kind, context.scale, richer captions) or model; --force trains anyway."
        )
    return verdict


def told_verdict(verdict: Verdict, folder: RunFolder) -> str:
    """What the check found, in one line."""
    return (
        f"The teacher's drawings are {verdict.with_context:.3f} from the pictures with its context and "
        f"{verdict.without_context:.3f} from text alone ({verdict.measure}): {folder.path / GRID}."
    )


def not_step_distilled(verdict: Verdict, num_inference_steps: int) -> str | None:
    """A warning for a model whose few-step pictures are much duller than its many-step ones, None for others."""
    if verdict.few_step_sharpness is None or verdict.few_step_sharpness >= FEW_STEP_SHARPNESS:
        return None
    return (
        f"In {num_inference_steps} steps this model draws with {100 * verdict.few_step_sharpness:.0f} % of the "
        f"sharpness that it has in {MORE_STEPS * num_inference_steps}: it is hardly distilled to so few. Tuning keeps "
        "the steps that a model has and gives it none. Set student.num_inference_steps to those it is made for, or "
        "distil it first."
    )


def _draw_both(run: Run, rows: list[PromptRow], numbers: list[int]) -> list[_Drawn]:
    teacher, size = run.teachers[0], rows[0].bucket
    told = teacher.call.told(num_inference_steps=run.recipe.student.num_inference_steps)
    blind = replace(run.student.call, arguments=told.arguments)  # its guidance as well: the context alone differs
    without = draw(run, blind, [row.prompt for row in rows], numbers, size)
    seeing = told.told(**teacher.context.arguments(rows))
    richer = draw(run, seeing, teacher.context.prompts(rows), numbers, size)
    targets = [picture(row.metadata["file_name"], image.size) for row, image in zip(rows, richer, strict=True)]
    return [_Drawn(*three) for three in zip(targets, without, richer, strict=True)]


def _judge(run: Run, drawn: list[_Drawn], features: Features) -> Verdict:
    """By DINO where it is there: an IP-Adapter's own encoder is what the teacher was told the pictures by."""
    pixels = {side: [distance(getattr(d, side), d.target) for d in drawn] for side in ("without", "with_context")}
    measure, used = "pixels", pixels
    embed = features.of_dino if features.dino else partial(embeddings, run.teachers[0].call.pipeline)
    targets = embed([d.target for d in drawn])
    if targets is not None:
        measure, used = "DINO" if features.dino else "image encoder", {}
        for side in pixels:
            seen = embed([getattr(d, side) for d in drawn])
            used[side] = [float(value) for value in 1.0 - (seen * targets).sum(1)]
    nearer = np.asarray(used["with_context"]) < np.asarray(used["without"])
    return Verdict(
        measure,
        mean(used["with_context"]),
        mean(used["without"]),
        mean(nearer),
        mean(pixels["with_context"]),
        mean(pixels["without"]),
        _few_step_sharpness(run),
    )


def _few_step_sharpness(run: Run) -> float | None:
    from diffopd.distill import batches_of

    if {"sigmas", "timesteps"} & set(run.student.call.arguments):
        return None
    known = run.teachers[-1]
    numbers, rows = batches_of(run, known, list(enumerate(known.train_rows[:ROWS])))[0]
    prompts, size, call = [row.prompt for row in rows], rows[0].bucket, run.student.call
    few = mean([sharpness(image) for image in draw(run, call, prompts, numbers, size)])
    many_steps = call.told(num_inference_steps=MORE_STEPS * run.recipe.student.num_inference_steps)
    many = mean([sharpness(image) for image in draw(run, many_steps, prompts, numbers, size)])
    return few / max(many, 1e-6)
