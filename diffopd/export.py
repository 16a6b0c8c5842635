"""The student as others load it: every form is reloaded without us, and compared, before any counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffopd.assemble import student_arguments
from diffopd.data import read_prompts
from diffopd.drive import Call
from diffopd.errors import UserError
from diffopd.forms import ALLOWED, check_formats, deployed, write_form
from diffopd.model_card import WHERE, Exported, grid_of, licenses, model_card
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder
from diffopd.stranger import Form, ask, draw
from diffopd.teacher import TeacherCard, teacher_card

PROBES = 4
PARTIAL = ".export.partial"


def export_run(
    run_dir: Path,
    formats: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda text: None,
    where: str = WHERE,
) -> Path:
    """Write export/ of a run: pipeline/ (adapters fused and unloaded), lora/, a model card; returns the folder.

    formats: of `forms.FORMATS`; none means the folder and, for a LoRA student, its LoRA. tell: where a word for the
    user goes, the licences before anything is written. where: the export's place as the card's code names it.
    Raises UserError when a stock client that cannot import us draws other pictures from them: nothing is exported
    then. An earlier export of the same run is replaced.
    """
    folder = RunFolder.open(run_dir)
    recipe, checkpoint = folder.recipe(), folder.latest_checkpoint()
    names = check_formats(list(formats), recipe)
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    tell("Licences: " + "; ".join(f"{who} {licence}" for who, licence in licenses(recipe, cards)) + ".")
    temporary, target = folder.path / PARTIAL, folder.path / "export"
    if temporary.exists():
        tell(f"{temporary}: left by an export that was interrupted; removed.")
        shutil.rmtree(temporary)
    student = deployed(folder.path, recipe, checkpoint)
    temporary.mkdir()
    forms = [write_form(name, student, temporary) for name in names]
    arguments = probe_arguments(student.pipeline, recipe, cards)
    checks = compare(student.pipeline, arguments, forms, temporary / "probe")
    exported = Exported(
        recipe, cards, folder, type(student.pipeline), forms, checks, grid_of(student.pipeline.scheduler), where,
        is_video=is_video(type(student.pipeline)),
    )  # fmt: skip
    _write_card(model_card(exported), temporary)
    (temporary / "checks.json").write_text(json.dumps(checks, indent=1))
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return target


def probe_arguments(pipeline: Any, recipe: Recipe, cards: list[TeacherCard]) -> dict[str, Any]:
    """The student's deployment call for a few held-out prompts, without latents and output type."""
    told = {key: value for key, value in student_arguments(recipe).items() if key != "output_type"}
    prompts = [row.prompt for card in cards for row in read_prompts(card.prompts.test)[:PROBES]][:PROBES]
    return dict(Call(pipeline, told).prompted(prompts).arguments)


def compare(pipeline: Any, arguments: dict[str, Any], forms: list[Form], folder: Path) -> dict[str, float]:
    """Form -> largest difference of a pixel (in [0, 1]) between the student here and a stranger's reload.

    The call draws its own latents from a seed, so this holds for every family, whatever its latents look like.
    Raises UserError above what `forms.ALLOWED` has for a form.
    """
    wanted = draw(pipeline, arguments)
    differences = {}
    for name, found in ask(forms, arguments, folder).items():
        differences[name] = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
        if not differences[name] <= ALLOWED[name]:
            raise UserError(
                f"The exported {name} draws other pictures than the student when stock diffusers reloads it "
                f"(largest difference {differences[name]:.2g}, allowed {ALLOWED[name]:g}). Nothing was exported; "
                "please report this."
            )
    return differences


def is_video(pipeline_class: type) -> bool:
    """Whether the pipeline returns frames instead of images: its call's documented choice of their number."""
    import inspect

    return "num_frames" in inspect.signature(pipeline_class.__call__).parameters


def _write_card(card: str, folder: Path) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")
    if (folder / "pipeline").is_dir():
        (folder / "pipeline" / "README.md").write_text(card, encoding="utf-8")
