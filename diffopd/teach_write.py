"""The weights of a finished teach run into the teacher's own folder, and their sha256 into its card."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from diffopd.checkpoint import flush
from diffopd.errors import UserError
from diffopd.load import LORA_FILE
from diffopd.run_folder import RunFolder, atomic_write
from diffopd.settings import read_toml
from diffopd.teach_log import fall_of
from diffopd.teach_recipe import TeachRecipe
from diffopd.teacher import TeacherCard, weight_files, weights_sha256

VALUE = re.compile(r"""^([^=]*=\s*)("[^"]*"|'[^']*')""")  # of a key, and what stands before it


def target_of(recipe: TeachRecipe) -> Path:
    """Where the card says the weights are: the file of a LoRA, the folder of a full denoiser."""
    named = recipe.card.folder / str(recipe.card.weights)
    if recipe.card.form == "lora":
        return named if named.suffix == ".safetensors" else named / LORA_FILE
    return named


def check_writable(recipe: TeachRecipe, *, overwrite: bool) -> None:
    """Before training: nothing would be lost by writing, and the card can take a sha256. Raises UserError otherwise."""
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
    _with_sha256(recipe.card, "0" * 64)


def write_weights(recipe: TeachRecipe, run: RunFolder, *, number: int | None = None, overwrite: bool = False) -> Path:
    """Copy a checkpoint's weights to where the card says, and correct its sha256; returns the weights' path.

    number: which checkpoint; None the last, unless the run fell (`fall_of`). A LoRA carries its rank, alpha and targets
    as metadata, as in the checkpoint. Raises UserError for a run that fell, for a checkpoint that is not there, and for
    weights that are there unless `overwrite`.
    """
    check_writable(recipe, overwrite=overwrite)
    held, target = run.checkpoints(), target_of(recipe)
    if not held:
        raise UserError(f"{run.path}: has no checkpoint whose weights could be written. Train it first.")
    if number is not None and number not in held:
        raise UserError(f"{run.path}: has no checkpoint-{number}; there are {', '.join(map(str, held))}.")
    if number is None and (fall := fallen(recipe, run)):
        raise UserError(f"{run.path}: was not written. {fall}")
    checkpoint = held[max(held) if number is None else number]
    if recipe.card.form == "lora":
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, (checkpoint / LORA_FILE).read_bytes())
    else:
        _replace_folder(_denoiser_folder(checkpoint), target)
    atomic_write(recipe.card.path, _with_sha256(recipe.card, weights_sha256(target)))
    return target


def fallen(recipe: TeachRecipe, run: RunFolder) -> str | None:
    """What to tell of a run that ended worse than it began; None for others, and where tasks come one after another."""
    fall = None if recipe.sampling.prompt_files == "one_after_another" else fall_of(run.metrics())
    if fall is None:
        return None
    held = run.checkpoints()
    near = min(held, key=lambda number: abs(number - fall.until))
    earlier = (
        f"checkpoint-{near} is the nearest to the best (--write --checkpoint {near}). " if near != max(held) else ""
    )
    return (
        f"It ended worse than it began: {fall}. {earlier}Fewer updates, a lower train.learning_rate or a higher "
        f"estimator.kl_weight may prevent that; --write --checkpoint {max(held)} takes what it came to all the same."
    )


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


def _with_sha256(card: TeacherCard, digest: str) -> str:
    """The card's text with this sha256, in place of the line that has one or after that of the weights.

    Raises UserError for a card that is written in such a way that the line cannot be put there.
    """
    data, source = read_toml(card.path)  # as it is now: it may have been edited while the teacher was taught
    lines = source.text.split("\n")
    if ("sha256",) in source.lines:
        place = source.lines["sha256",] - 1
        lines[place] = VALUE.sub(rf'\g<1>"{digest}"', lines[place])
    elif ("weights",) in source.lines:
        lines.insert(source.lines["weights",], f'sha256 = "{digest}"')
    text = "\n".join(lines)
    try:
        is_right = tomllib.loads(text) == data | {"sha256": digest}
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise UserError(
            f"{card.place('weights')}: --write puts a sha256 on a line of its own, which this card does not allow. "
            'Write weights = "..." (and sha256, if it is there) on a line each, above all tables.'
        )
    return text
