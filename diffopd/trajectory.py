"""Pictures of what both sides think along the student's walk: `denoised` of student and teacher at each state."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from diffopd.drive import decode
from diffopd.prediction import Proposal, Step
from diffopd.run_folder import RunFolder

if TYPE_CHECKING:
    from diffopd.distill import Run

PROMPTS_PER_TEACHER = 3


def save_trajectory(run: Run, folder: RunFolder) -> None:
    """Write samples/trajectory.json and one picture per teacher, held-out prompt, side and state."""
    from diffopd.distill import VALIDATION, walk_rows

    target = folder.path / "samples" / "trajectory"
    target.mkdir(parents=True, exist_ok=True)
    entries = []
    for slot, teacher in enumerate(run.teachers):
        rows = teacher.test_rows[:PROMPTS_PER_TEACHER]
        seen: list[tuple[Step, Proposal, Proposal]] = []

        def observe(step: Step, said: Proposal, taught: Proposal, seen: list = seen) -> None:
            seen.append((step, said, taught))

        numbers = list(range(len(rows)))
        walk_rows(run, teacher, rows, numbers, update=VALIDATION, slot=slot, backward=None, observe=observe)
        call = run.student.call.prompted([row.prompt for row in rows])
        for step, said, taught in seen:
            for side, proposal in (("student", said), ("teacher", taught)):
                with torch.no_grad():
                    images = decode(call, proposal.prediction.denoised)
                for number, (row, image) in enumerate(zip(rows, images, strict=True)):
                    name = f"{teacher.name}-{number}-{side}-{step.index}.png"
                    image.save(target / name)
                    entries.append(
                        {
                            "teacher": teacher.name,
                            "prompt": row.prompt,
                            "side": side,
                            "step": step.index,
                            "sigma": round(step.sigma, 4),
                            "file": f"trajectory/{name}",
                        }
                    )
    (folder.path / "samples" / "trajectory.json").write_text(json.dumps(entries, indent=1))
