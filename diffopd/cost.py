"""What a picture costs, against ordinary fine-tuning of the same model on the same machine, timed before the run.

A few rows are walked and backed either way, without an optimizer step; nothing of it stays.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from diffopd.batches import MicroBatch
from diffopd.context import Noised
from diffopd.data import PromptRow
from diffopd.recipe import ObjectiveSettings
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch

if TYPE_CHECKING:
    from diffopd.distill import Run, Teacher

FILE = "cost.json"
ROWS = 8
TIMED = 2**31 + 64  # noise key: no update of a run ever has this number
Stages = dict[str, float]


def measure_cost(run: Run, folder: RunFolder, guidance_scale: float, num_levels: int) -> dict[str, Stages]:
    """Seconds per picture and stage of the run's own updates ("own") and of fine-tuning ("sft"); written to cost.json.

    Where prompts are kept, one of them is counted with each picture: an update has as many. guidance_scale,
    num_levels: of fine-tuning. The first pictures of the run, forward and backward. Left out is what is done once an
    update (the optimizer), which costs both the same, and once a run (pictures made latents).
    """
    given = _given(run, guidance_scale, num_levels)
    settings = ObjectiveSettings(name="velocity", states="data", query={"random": 1})
    tuned = replace(run, recipe=run.recipe.model_copy(update={"objective": settings}), teachers=[given], walks={})
    with run.student.decoding():
        own = Counter()
        for teacher in run.teachers:  # beside a picture, a prompt to keep
            own.update(_seconds(run, teacher))
        found = {"own": dict(own), "sft": _seconds(tuned, given)}
    if run.processes.is_main:
        folder.write(FILE, json.dumps(found, indent=1))
    return found


def told(found: dict[str, Stages]) -> str:
    """The cost in a sentence."""
    own, sft = (sum(found[side].values()) for side in ("own", "sft"))
    return f"A picture costs {own:.3g} s here, {own / sft:.1f} times as much as in ordinary fine-tuning ({sft:.3g} s)."


def _given(run: Run, guidance_scale: float, num_levels: int) -> Teacher:
    """The run's pictures in its teacher's place."""
    teacher = run.teachers[0]
    card = teacher.card.model_copy(update={"form": "pictures"})
    call = run.student.call.regridded(num_levels).told(guidance_scale=guidance_scale)
    return replace(teacher, card=card, call=call, context=Noised(), follow=None)


def _seconds(run: Run, teacher: Teacher) -> Stages:
    """Per picture, after one batch that is not counted: it also makes what is kept from then on."""
    from diffopd.distill import batches_of, walk_rows

    rows: list[tuple[int, PromptRow]] = list(enumerate(teacher.train_rows[:ROWS]))
    batches: list[MicroBatch] = batches_of(run, teacher, rows)
    watch = Watch(exact=True)
    for count, (numbers, batch) in enumerate([batches[0], *batches]):
        watch = watch if count != 1 else Watch(exact=True)
        walk_rows(
            run, teacher, batch, numbers, update=TIMED, slot=0, backward=lambda loss: loss.sum().backward(), watch=watch
        )
    for parameter in run.student.parameters.values():
        parameter.grad = None
    return {stage: seconds / len(rows) for stage, seconds in watch.seconds.items() if stage != "pictures"}
