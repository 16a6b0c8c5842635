"""The weights of a finished teach run into the teacher's own folder, and their sha256 into its card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from diffopd.checkpoint import flush
from diffopd.errors import UserError
from diffopd.load import LORA_FILE
from diffopd.run_folder import RunFolder, atomic_write
from diffopd.teach_recipe import TeachRecipe
from diffopd.teacher import weight_files, weights_sha256

SHA256 = re.compile(r'(?m)^sha256\s*=\s*"[0-9a-f]*"')
WEIGHTS = re.compile(r"(?m)^weights\s*=.*$")


def target_of(recipe: TeachRecipe) -> Path:
    """Where the card says the weights are: the file of a LoRA, the folder of a full denoiser."""
    named = recipe.card.folder / str(recipe.card.weights)
    if recipe.card.form == "lora":
        return named if named.suffix == ".safetensors" else named / LORA_FILE
    return named


def check_writable(recipe: TeachRecipe, *, overwrite: bool) -> None:
    """Before training: nothing would be lost by writing. Raises UserError where weights are there already."""
    target = target_of(recipe)
    if recipe.card.form == "full" and target.suffix:
        raise UserError(
            f"{recipe.card.place('weights')}: weights = {recipe.card.weights!r}: a full denoiser is written as a "
            'folder with its config. Name a folder, such as "unet".'
        )
    if target.exists() and not overwrite:
        raise UserError(
            f"{target}: holds weights, which --write would replace. Nothing was trained or written; add --overwrite to "
            "replace them at the end, or leave --write out and take them from the run's last checkpoint."
        )


def write_weights(recipe: TeachRecipe, run: RunFolder, *, overwrite: bool = False) -> Path:
    """Copy the last checkpoint's weights to where the card says, and correct its sha256; returns the weights' path.

    A LoRA carries its rank, alpha and targets as metadata, as in the checkpoint. Raises UserError for a run without
    a checkpoint, and for weights that are there unless `overwrite`.
    """
    check_writable(recipe, overwrite=overwrite)
    checkpoint, target = run.latest_checkpoint(), target_of(recipe)
    if checkpoint is None:
        raise UserError(f"{run.path}: has no checkpoint whose weights could be written. Train it first.")
    if recipe.card.form == "lora":
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, (checkpoint / LORA_FILE).read_bytes())
    else:
        _replace_folder(_denoiser_folder(checkpoint), target)
    _write_sha256(recipe, weights_sha256(target))
    return target


def _denoiser_folder(checkpoint: Path) -> Path:
    return next(path for path in sorted(checkpoint.iterdir()) if path.name != "state" and weight_files(path))


def _replace_folder(source: Path, target: Path) -> None:
    """A copy of a folder under its final name, whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for path in (*partial.rglob("*"), partial):
        flush(path)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def _write_sha256(recipe: TeachRecipe, digest: str) -> None:
    card = recipe.card.path
    text, line = card.read_text(encoding="utf-8"), f'sha256 = "{digest}"'
    if SHA256.search(text):
        text = SHA256.sub(line, text, count=1)
    else:
        text = WEIGHTS.sub(lambda found: f"{found[0]}\n{line}", text, count=1)
    atomic_write(card, text)
