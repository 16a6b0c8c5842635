"""The student as others load it: every form is reloaded without us, and compared, before any counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffopd.assemble import student_arguments
from diffopd.blueprint import is_video
from diffopd.checkpoint import share
from diffopd.data import read_prompts
from diffopd.drive import Call
from diffopd.errors import UserError
from diffopd.forms import ALLOWED, FOLDERS, Deployed, check_formats, deployed, form_of, write_form
from diffopd.hub import push
from diffopd.model_card import Exported, latest_grid, licenses, model_card
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder, atomic_write
from diffopd.stranger import Form, ask, draw
from diffopd.teacher import TeacherCard, teacher_card

PROBES = 4
PARTIAL = ".export.partial"
CHECKS = "checks.json"  # form -> largest difference of a pixel; a form that is not in it does not count
WEIGHTS = "weights.json"  # form -> sha256 of the student's weights that it was made of


def export_run(
    run_dir: Path,
    formats: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda text: None,
    push_to: str | None = None,
) -> Path:
    """Write forms into export/ of a run, each in a folder of its own, and a model card; returns export/.

    formats: of `forms.FORMATS`; none means the folder and, for a LoRA student, its LoRA. Forms that are there already
    stay; those that were made of other weights than the latest checkpoint's are made again, which is told.
    tell: where a word for the user goes, the licences before anything is written. push_to: a repository on the hub that
    gets the formats asked for, or all that is in export/ where none was.
    Raises UserError when a stock client that cannot import us draws other pictures from them: export/ is as it was
    then; and as `hub.push`.
    """
    folder = RunFolder.open(run_dir)
    recipe = folder.recipe()
    asked = check_formats(list(formats), recipe)
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    tell("Licences: " + "; ".join(f"{who} {licence}" for who, licence in licenses(recipe, cards)) + ".")
    temporary, target = folder.path / PARTIAL, folder.path / "export"
    if temporary.exists():
        tell(f"{temporary}: left by an export that was interrupted; removed.")
        shutil.rmtree(temporary)
    student = deployed(folder.path, recipe, folder.latest_checkpoint())
    digest = student.digest()
    old = outdated(target, digest, besides=asked)
    for name in old:
        tell(f"{target / FOLDERS[name]}: was not made of the weights of {student.checkpoint.name}; it is made again.")
    temporary.mkdir()
    forms = [write_form(name, student, temporary) for name in (*asked, *old)]
    share(temporary)
    arguments = probe_arguments(student.pipeline, recipe, cards)
    install(temporary, target, compare(student.pipeline, arguments, forms, temporary / "probe"), digest)
    exported = Exported(
        recipe, cards, folder, type(student.pipeline), grid=latest_grid(student.pipeline.scheduler),
        is_video=is_video(type(student.pipeline)),
    )  # fmt: skip
    _write_card(_card(exported, student, target, stored(target, CHECKS)), target)
    tell(f"{target}: {', '.join(stored(target, CHECKS))}; stock diffusers reloads each to the student's pictures.")
    if push_to:
        names = asked if formats else list(stored(target, CHECKS))
        card = _card(replace(exported, where=push_to), student, target, names)
        tell(f"Uploaded {', '.join(names)} to {push(target, push_to, [FOLDERS[name] for name in names], card)}.")
    return target


def outdated(target: Path, digest: str, *, besides: Sequence[str]) -> list[str]:
    """Forms in an export's folder, `besides` aside, that were made of weights of another digest, or never checked."""
    made, counted = stored(target, WEIGHTS), stored(target, CHECKS)
    there = [name for name, folder in FOLDERS.items() if (target / folder).exists() and name not in besides]
    return [name for name in there if name not in counted or made.get(name) != digest]


def install(temporary: Path, target: Path, checks: dict[str, float], digest: str) -> None:
    """Move checked forms from `temporary`, which is removed, to an export's folder, beside or over those there.

    An interruption leaves no form counted that is not whole: those under way are off the list meanwhile.
    """
    target.mkdir(exist_ok=True)
    there = {name: value for name, value in stored(target, CHECKS).items() if (target / FOLDERS[name]).is_dir()}
    others = {name: value for name, value in there.items() if name not in checks}
    made = {name: value for name, value in stored(target, WEIGHTS).items() if name in others}
    atomic_write(target / CHECKS, json.dumps(others, indent=1))
    for name in checks:
        if (target / FOLDERS[name]).exists():
            shutil.rmtree(target / FOLDERS[name])
        (temporary / FOLDERS[name]).rename(target / FOLDERS[name])
    shutil.rmtree(temporary)
    atomic_write(target / WEIGHTS, json.dumps(made | dict.fromkeys(checks, digest), indent=1))
    atomic_write(target / CHECKS, json.dumps(others | checks, indent=1))


def stored(target: Path, name: str) -> dict[str, Any]:
    """One of the lists beside the forms of an export, empty where there is none."""
    file = target / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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


def _card(exported: Exported, student: Deployed, target: Path, names: Collection[str]) -> str:
    """The card that speaks of these forms."""
    checks = stored(target, CHECKS)
    forms = [form_of(name, student, target) for name in names]
    return model_card(replace(exported, forms=forms, checks={name: checks[name] for name in names}))


def _write_card(card: str, folder: Path) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")
    if (folder / "pipeline").is_dir():
        (folder / "pipeline" / "README.md").write_text(card, encoding="utf-8")
