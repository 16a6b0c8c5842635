"""Pictures of what both sides think along the student's walk: `denoised` of student and teacher at each state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffopd.data import PromptRow
from diffopd.drive import decode
from diffopd.prediction import Proposal, Step
from diffopd.run_folder import RunFolder

if TYPE_CHECKING:
    from diffopd.distill import Run

PROMPTS_PER_TEACHER = 3


def save_trajectory(run: Run, folder: RunFolder) -> None:
    """Write samples/trajectory.json and one picture per teacher, watched prompt, side and state."""
    from diffopd.distill import batches_of

    target = folder.path / "samples" / "trajectory"
    target.mkdir(parents=True, exist_ok=True)
    entries = []
    for slot, teacher in enumerate(run.teachers):
        if teacher.is_given:  # no walk to look at
            continue
        rows = teacher.watched_rows[:PROMPTS_PER_TEACHER]
        for numbers, batch in batches_of(run, teacher, list(enumerate(rows))):
            entries += _save_batch(run, slot, numbers, batch, target)
    (folder.path / "samples" / "trajectory.json").write_text(json.dumps(entries, indent=1))


def _save_batch(run: Run, slot: int, numbers: list[int], rows: list[PromptRow], target: Path) -> list[dict[str, Any]]:
    from diffopd.distill import VALIDATION, told_size, walk_rows

    teacher = run.teachers[slot]
    seen: list[tuple[Step, Proposal, Proposal]] = []

    def observe(step: Step, said: Proposal, taught: Proposal) -> None:
        seen.append((step, said, taught))

    walk_rows(run, teacher, rows, numbers, update=VALIDATION, slot=slot, backward=None, observe=observe)
    call = run.student.call.prompted([row.prompt for row in rows], **told_size(rows[0].bucket))
    entries = []
    for step, said, taught in seen:
        for side, proposal in (("student", said), ("teacher", taught)):
            with torch.no_grad():
                images = decode(call, proposal.prediction.denoised)
            for number, row, image in zip(numbers, rows, images, strict=True):
                name = f"{teacher.name}-{number}-{side}-{step.index}.png"
                image.save(target / name)
                place = {"step": step.index, "sigma": round(step.sigma, 4), "file": f"trajectory/{name}"}
                entries.append({"teacher": teacher.name, "prompt": row.prompt, "side": side, **place})
    return entries
