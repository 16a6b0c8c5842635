"""Whether adapters and teachers fit the base: its layers, its latent space, its noise schedule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from diffopd.blueprint import Blueprint, add_lora_on_meta, misfit, read_blueprint, read_json, tensor_shapes
from diffopd.errors import UserError
from diffopd.recipe import Recipe
from diffopd.teacher import TeacherCard, hub_weights, lora_file, weight_files

if TYPE_CHECKING:
    from torch import nn

# Config keys that decide whether one network can stand at another's states.
STATE_KEYS = {
    "denoiser": ("_class_name", "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim"),
    "vae": ("_class_name", "latent_channels", "scaling_factor", "shift_factor", "block_out_channels"),
    "scheduler": (
        "num_train_timesteps",
        "prediction_type",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "shift",
    ),
    "text_encoder": ("_class_name", "hidden_size", "d_model", "vocab_size"),
}


def lora_size(recipe: Recipe, meta_denoiser: nn.Module) -> int:
    """Parameters of the student's adapter, which is put on a meta denoiser. UserError where it cannot be."""
    student = recipe.student
    takes_adapters(recipe.place("student", "train"), meta_denoiser)
    place, layers = recipe.place("student", "target_modules"), [f".{name}" for name, _ in meta_denoiser.named_modules()]
    try:
        size = add_lora_on_meta(meta_denoiser, student.rank, student.target_modules)
    except (ValueError, re.error) as error:
        raise UserError(
            f"{place}: target_modules = {student.target_modules!r} gives no LoRA "
            f"on the base's {type(meta_denoiser).__name__}: {error} Name layers of it (such as to_q, conv1), or give "
            "one regular expression for their whole names."
        ) from error
    names = [] if isinstance(student.target_modules, str) else student.target_modules
    unknown = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if unknown:
        raise UserError(
            f"{place}: target_modules = {names!r}: the base's {type(meta_denoiser).__name__} has no layer called "
            f"{' or '.join(unknown)}. Correct or remove {'it' if len(unknown) == 1 else 'them'}."
        )
    return size


def takes_adapters(place: str, denoiser: nn.Module) -> None:
    """Raise UserError with the place where diffusers puts no adapters on such a network."""
    from diffopd.adapters import check_takes_adapters

    try:
        check_takes_adapters(denoiser)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def check_warm_start(recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...]) -> None:
    """What the student begins from fits the base; only LoRA teachers are averaged."""
    other = next((card for card in cards if card.form != "lora"), None)
    if recipe.student.begin_from == "teacher_average" and other:
        raise UserError(
            f'{recipe.place("student", "begin_from")}: begin_from = "teacher_average" averages LoRA teachers, but '
            f'{other.name!r} is of form "{other.form}". Convert it with scripts/lowrank_teacher.py, or take "base".'
        )
    spec, place = recipe.student.init_weights, recipe.place("student", "init_weights")
    if spec is None or hub_weights(spec, Path.cwd()):
        return
    takes_adapters(place, base.meta_denoiser)
    reason = misfit(lora_file(spec, Path.cwd(), place), base)
    if reason:
        raise UserError(f"{place}: {spec} does not fit the base: {reason}. Take a LoRA of this base.")


def check_fit(recipe: Recipe, index: int, card: TeacherCard, base: Blueprint, *, shipped: bool) -> None:
    """The teacher stands on the student's architecture and latent space, and its weights can be loaded."""
    place = recipe.place("teachers", index, "name")
    try:
        own = read_blueprint(card.base, shipped=shipped)
    except UserError as error:
        raise UserError(f"{card.place('base')}: {error}") from error
    if own.folder.resolve() != base.folder.resolve():
        _same_states(place, card, own, base)
    if card.form == "lora":
        takes_adapters(card.place("form"), base.meta_denoiser)
    if card.weights is None or card.hub_weights:
        return
    path = card.weights_path()
    if card.form == "lora":
        reason = misfit(path, base)
        if reason:
            raise UserError(
                f"{card.place('weights')}: teacher {card.name!r} does not fit the base: {reason}. Take a teacher "
                f"that was trained on {recipe.student.pretrained_model_name_or_path}."
            )
    if card.form == "full":
        _full_fits(card, path, base)


def _same_states(place: str, card: TeacherCard, own: Blueprint, base: Blueprint) -> None:
    """Raise unless the configs that define states and conditions agree."""
    for part, keys in STATE_KEYS.items():
        mine = own.denoiser_config if part == "denoiser" else own.configs.get(part, {})
        others = base.denoiser_config if part == "denoiser" else base.configs.get(part, {})
        if card.form == "lora" and part == "denoiser":  # an adapter needs the very same layers
            keys = sorted({key for key in {*mine, *others} if not key.startswith("_")} - {"sample_size"})
            keys = ["_class_name", *keys]
        for key in keys:
            if mine.get(key) != others.get(key):
                raise UserError(
                    f"{place}: teacher {card.name!r} cannot stand at the student's states: {part} {key} is "
                    f"{mine.get(key)!r} in its base {card.base}, {others.get(key)!r} in the student's. "
                    "Take a teacher of the student's base."
                )


def _full_fits(card: TeacherCard, path: Path, base: Blueprint) -> None:
    """A full denoiser must take and give what the base's does."""
    if (path / "config.json").is_file():
        own = read_json(path / "config.json")
        for key in STATE_KEYS["denoiser"]:
            if own.get(key) != base.denoiser_config.get(key):
                raise UserError(
                    f"{card.place('weights')}: teacher {card.name!r} cannot stand at the student's states: "
                    f"its denoiser's {key} is {own.get(key)!r}, the base's is {base.denoiser_config.get(key)!r}. "
                    "Take a teacher of the student's base."
                )
        return
    shapes = {name: shape for file in weight_files(path) for name, shape in tensor_shapes(file).items()}
    expected = {name: tuple(p.shape) for name, p in base.meta_denoiser.state_dict().items()}
    different = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{card.place('weights')}: teacher {card.name!r} does not fit the base's {base.denoiser}: {name} "
            f"is {shapes.get(name, 'absent')}, expected {expected.get(name, 'absent')} ({len(different)} "
            "tensors differ). A checkpoint of another shape needs its config.json beside it."
        )
