"""The student as others load it: a stock diffusers folder and a LoRA, reloaded without us before either counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffopd import __version__, noise
from diffopd.assemble import student_arguments
from diffopd.drive import Call, survey
from diffopd.errors import UserError
from diffopd.evaluate import tasks_of
from diffopd.load import LORA_FILE, student_pipeline
from diffopd.recipe import Recipe
from diffopd.run_folder import RunFolder
from diffopd.teacher import TeacherCard, teacher_card

EXPORT_SEED = 2**31 + 32  # noise key: no update of a run ever has this number
PROBES = 4
PROBE_SEED = 0  # of the noise that a stochastic scheduler draws, the same on both sides
ALLOWED = {"pipeline": 0.0, "lora": 1e-3}  # largest pixel difference; a LoRA unfused sums in another order
# Runs in a fresh interpreter in which this package cannot be imported.
STRANGER = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffopd":
            raise ImportError("diffopd is not to be had here")

sys.meta_path.insert(0, Refuse())
try:
    import diffopd
except ImportError:
    pass
else:
    sys.exit("diffopd could be imported")
import numpy, torch
from diffusers import DiffusionPipeline

asked = json.load(open(sys.argv[1]))
torch.set_num_threads(asked["threads"])  # another count sums in another order
latents = torch.from_numpy(numpy.load(asked["latents"]))
for form in asked["forms"]:
    pipeline = DiffusionPipeline.from_pretrained(form["folder"], dtype=torch.float32, local_files_only=True)
    if form["lora"]:
        pipeline.load_lora_weights(form["lora"])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(asked["seed"])  # for schedulers that draw noise
    images = pipeline(latents=latents, generator=generator, output_type="np", **asked["arguments"]).images
    numpy.save(form["images"], images)
"""


def export_run(run_dir: Path) -> Path:
    """Write export/ of a run: pipeline/ (adapters fused and unloaded), lora/ and a model card; returns the folder.

    Raises UserError when a stock client that cannot import us draws other pictures from them: nothing is exported
    then. An earlier export of the same run is replaced.
    """
    folder = RunFolder.open(run_dir)
    recipe, checkpoint = folder.recipe(), folder.latest_checkpoint()
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    pipeline = student_pipeline(folder.path)
    temporary, target = folder.path / ".export.partial", folder.path / "export"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary / "pipeline", safe_serialization=True)
    _keep_tokenizer_files(pipeline, temporary / "pipeline")
    is_lora = recipe.student.train == "lora"
    if is_lora:
        (temporary / "lora").mkdir()
        shutil.copy(checkpoint / LORA_FILE, temporary / "lora" / LORA_FILE)
    checks = verify(pipeline, recipe, cards, temporary)
    card = model_card(recipe, cards, folder, checks)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    (temporary / "pipeline" / "README.md").write_text(card, encoding="utf-8")
    (temporary / "checks.json").write_text(json.dumps(checks, indent=1))
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return target


def verify(pipeline: Any, recipe: Recipe, cards: list[TeacherCard], folder: Path) -> dict[str, float]:
    """Largest pixel difference (pictures in [0, 1]) between the student here and a stranger's reload, per form.

    Raises UserError above 0 for the folder (same weights, same arithmetic) and above 1e-3 for the LoRA (which is
    added to each layer's output instead of being fused into its weights).
    """
    rows = [row for task in tasks_of(cards, PROBES) for row in task.rows][:PROBES]
    call = Call(pipeline, {k: v for k, v in student_arguments(recipe).items() if k != "output_type"})
    prompts = [row.prompt for row in rows]
    shape = survey(call.prompted(prompts[:1], output_type="latent")).shape
    latents = noise.draw(
        shape, run_seed=recipe.seed, update=EXPORT_SEED, solver_step=0, sample_indices=range(len(rows))
    )
    asked = call.prompted(prompts).arguments
    generator = torch.Generator().manual_seed(PROBE_SEED)
    wanted = pipeline(latents=latents, generator=generator, output_type="np", **asked).images
    forms = {"pipeline": (str(folder / "pipeline"), None)}
    if (folder / "lora").is_dir():
        forms["lora"] = (_base_folder(recipe, folder), str(folder / "lora"))
    differences = {}
    for name, found in _ask_stranger(folder, forms, latents.numpy(), asked).items():
        differences[name], allowed = float(np.abs(found - wanted).max()), ALLOWED[name]
        if not differences[name] <= allowed:
            raise UserError(
                f"The exported {name} draws other pictures than the student when stock diffusers reloads it (largest "
                f"difference {differences[name]:.2g}, allowed {allowed:g}). Nothing was exported; please report this."
            )
    shutil.rmtree(folder / "probe-base", ignore_errors=True)
    return differences


def _base_folder(recipe: Recipe, folder: Path) -> str:
    """The base that a LoRA goes onto, with the recipe's scheduler if it overrides one."""
    from diffopd.assemble import with_scheduler
    from diffopd.load import load_pipeline
    from diffopd.locate import find_pipeline

    if not recipe.student.scheduler:
        return str(find_pipeline(recipe.student.pretrained_model_name_or_path))
    base = with_scheduler(load_pipeline(recipe.student.pretrained_model_name_or_path), recipe)
    probe = folder / "probe-base"
    base.save_pretrained(probe)
    return str(probe)


def _ask_stranger(
    folder: Path, forms: dict[str, tuple[str, str | None]], latents: np.ndarray, arguments: dict[str, Any]
) -> dict[str, np.ndarray]:
    """form -> pictures that one other process draws with it; a form is a pipeline folder and a LoRA or None."""
    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    np.save(probe / "latents.npy", latents)
    files = {name: probe.resolve() / f"{name}.npy" for name in forms}
    asked = {
        "forms": [{"folder": where, "lora": lora, "images": str(files[name])} for name, (where, lora) in forms.items()],
        "arguments": arguments,
        "seed": PROBE_SEED,
        "threads": torch.get_num_threads(),
        "latents": str((probe / "latents.npy").resolve()),
    }
    (probe / "asked.json").write_text(json.dumps(asked))
    (probe / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "-I", str(probe / "stranger.py"), str(probe / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"Stock diffusers cannot reload the export:\n{done.stderr[-1500:]}")
    images = {name: np.load(file) for name, file in files.items()}
    shutil.rmtree(probe)
    return images


def _keep_tokenizer_files(pipeline: Any, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 5 writes only the latter, clients on 4.x fail."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    target = folder / "tokenizer"
    if tokenizer is None or not target.is_dir() or (target / "vocab.json").is_file():
        return
    model = json.loads((target / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
    if model.get("type") == "BPE":
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def model_card(recipe: Recipe, cards: list[TeacherCard], folder: RunFolder, checks: dict[str, float]) -> str:
    """README.md of the export: what it is, how to use it, whom it learned from, what it scores."""
    student, steps = recipe.student, recipe.student.num_inference_steps
    named = sorted({card.license for card in cards} | base_licenses(recipe))
    licenses = list({name.lower(): name for name in reversed(named)}.values())[::-1]  # Apache-2.0 is apache-2.0
    metadata = [
        "---",
        "library_name: diffusers",
        f"base_model: {Path(student.pretrained_model_name_or_path).name}",
        f"license: {licenses[0].lower() if len(licenses) == 1 else 'other'}",
        "tags: [text-to-image, distillation, few-step]",
        "---",
    ]
    use = [
        "```python",
        "from diffusers import DiffusionPipeline",
        'pipeline = DiffusionPipeline.from_pretrained("PATH/TO/export/pipeline")',
        f'pipeline("{_example_prompt(cards)}", num_inference_steps={student.num_inference_steps}, '
        f'guidance_scale={student.guidance_scale}).images[0].save("picture.png")',
        "```",
    ]
    body = [
        f"# {recipe.name}",
        "",
        f"A {steps}-step student of {len(cards)} teacher{'s' * (len(cards) > 1)}, distilled on its own trajectory with "
        f"diffopd {__version__}. It is made for {steps} steps at guidance_scale {student.guidance_scale:g}"
        + (" (no CFG); a client's own default would draw worse." if student.guidance_scale <= 1 else "."),
        "",
        *use,
        "",
        "| teacher | form | guidance | weights (sha256) | license |",
        "|---|---|---|---|---|",
        *_teachers(recipe, cards),
        "",
        *_training(recipe, folder),
        "",
        f"Base: `{Path(student.pretrained_model_name_or_path).name}`. Licenses inherited from base and teachers: "
        f"{', '.join(licenses)}.",
        "",
        *_scores(folder),
        "",
        "Reloaded by stock diffusers in a process without diffopd; largest pixel difference to the student (of 1): "
        + ", ".join(f"{name} {value:.1g}" for name, value in checks.items())
        + ".",
    ]
    return "\n".join([*metadata, "", *body]) + "\n"


def _teachers(recipe: Recipe, cards: list[TeacherCard]) -> list[str]:
    """A row per teacher, as the recipe has it: its guidance may override the card's."""
    rows = []
    for settings, card in zip(recipe.teachers, cards, strict=True):
        guidance = card.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        told = "".join(f", {key} = {value!r}" for key, value in settings.call.items())
        digest = f"`{card.digest()}`" if card.weights else "none of its own"
        rows.append(f"| {card.name} | {card.form} | {guidance:g}{told} | {digest} | {card.license} |")
    return rows


def _training(recipe: Recipe, folder: RunFolder) -> list[str]:
    """How the student was made, a row per setting that matters."""
    student, objective, train = recipe.student, recipe.objective, recipe.train
    progress = json.loads((folder.latest_checkpoint() / "state" / "progress.json").read_text())
    lora = f"LoRA, rank {student.rank}, alpha {student.lora_alpha}" + (
        f", starting as `{Path(student.init_weights).name}`" if student.init_weights else ""
    )
    rows = {
        "trained": lora if student.train == "lora" else "all weights of the denoiser",
        "objective": f"{objective.name}, query {objective.query}, {objective.states} states",
        "teacher substeps": f"{objective.substeps} ({objective.substep_solver}) between two states of the student",
        "tasks per update": train.tasks_per_update,
        "updates": f"{progress['update']} ({progress['images']} pictures)",
        "batch": f"{train.batch_size} x {train.gradient_accumulation_steps} pictures a task and process",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler}, {train.lr_warmup_steps} updates of warm-up",
        "weight average": f"decay {train.ema_decay:g}" if train.ema_decay else "none",
        "precision": "bf16 autocast" if train.mixed_precision == "bf16" else "float32",
        "seed": recipe.seed,
        "negative prompt": student.negative_prompt or "none",
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


def base_licenses(recipe: Recipe) -> set[str]:
    """The license named in the front matter of the base's own card, if it has one."""
    from diffopd.locate import find_pipeline

    readme = find_pipeline(recipe.student.pretrained_model_name_or_path) / "README.md"
    if not readme.is_file():
        return set()
    lines = readme.read_text(encoding="utf-8").splitlines()
    return {line.split(":", 1)[1].strip() for line in lines[:20] if line.startswith("license:")}


def _example_prompt(cards: list[TeacherCard]) -> str:
    return tasks_of(cards[:1], 1)[0].rows[0].prompt.replace('"', "'")


def _scores(folder: RunFolder) -> list[str]:
    file = folder.path / "evaluation" / "scores.json"
    if not file.is_file():
        return ["Not evaluated yet."]
    rows = [row for row in json.loads(file.read_text())["rows"] if row["model"] == "student"]
    lines = ["| task | score | 95 % interval | prompts | seeds |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        counts = f"{row['num_prompts']} | {len(row['seeds'])}"
        lines.append(f"| {row['task']} | {row['score']:.3f} | {low:.3f} to {high:.3f} | {counts} |")
    return lines
