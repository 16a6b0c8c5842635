"""Recipe-level checks: what can be known to be wrong before a weight is loaded, with its place."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffopd.blueprint import Blueprint, pipeline_hashes, read_blueprint
from diffopd.buckets import called_size
from diffopd.call_check import (
    check_backends,
    check_call_arguments,
    check_guidance,
    check_packages,
    check_resolutions,
    check_reward_runs,
)
from diffopd.data import PromptRow
from diffopd.errors import UserError
from diffopd.fit_check import check_fit, check_warm_start, lora_size
from diffopd.grid import Grid, check_walk, grid_of, make_scheduler, side_arguments
from diffopd.locate import PACKAGE, find_pipeline
from diffopd.recipe import Recipe
from diffopd.reward import try_card_reward
from diffopd.rows_check import check_contexts, check_given, check_pictures, check_test_rows, read_rows
from diffopd.run_folder import RunFolder
from diffopd.teacher import TeacherCard, forget_rewards, hub_weights, lora_file, teacher_card, weights_sha256

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Parts:
    """What a recipe names, found and checked: the base, the teachers' cards and prompts, the student's grid.

    grid is None where only the pipeline itself decides it. hashes: file -> sha256, empty unless asked for. adapted: the
    base's denoiser on the meta device under the student's new LoRA, None where there is no new one. Copy, to change it.
    """

    recipe: Recipe
    base: Blueprint
    cards: tuple[TeacherCard, ...]
    train_rows: dict[str, list[PromptRow]]
    test_rows: dict[str, list[PromptRow]]
    grid: Grid | None
    hashes: dict[str, str]
    adapted: nn.Module | None = None


def check(recipe: Recipe, *, hash_weights: bool = False) -> Parts:
    """Check a recipe against the files it names. hash_weights also reads the bytes of the weights.

    Without it, no network is asked for a base whose configs come with diffopd: they are enough for a plan.

    Raises UserError for the first thing that is wrong, naming its place, what is allowed and what to do.
    """
    base = _base(recipe, shipped=not hash_weights)
    cards = _cards(recipe)
    train, test = read_rows(recipe, cards)
    check_given(recipe, cards, base)
    check_pictures(recipe, cards, train, test)
    check_resolutions(recipe)
    for card in cards:
        check_reward_runs(card, must_run=hash_weights)
    check_packages(recipe)
    check_backends(recipe, base)
    check_call_arguments(recipe, base)
    check_contexts(recipe, base, cards, train)
    grid = check_walk(recipe, base)
    _check_two_answers(recipe, base, cards)
    check_guidance(recipe, base, cards)
    for index, card in enumerate(cards):
        check_fit(recipe, index, card, base, shipped=not hash_weights)
    check_warm_start(recipe, base, cards)
    adapted = None
    if recipe.student.train == "lora" and not recipe.student.init_weights:
        adapted = copy.deepcopy(base.meta_denoiser)
        lora_size(recipe, adapted)
    check_test_rows(recipe, test)
    _check_scored_steps(recipe, base)
    hashes = _hashes(recipe, cards) if hash_weights else {}
    return Parts(recipe, base, cards, train, test, grid, hashes, adapted)


def try_rewards(parts: Parts) -> None:
    """Call each function that scores a task once, on blank pictures, so that it does not fail after the training only.

    In one process; what the functions' files hold (a network, say) is let go again. Raises UserError as
    `reward.try_card_reward`.
    """
    if parts.base.is_video:
        return  # scored are lists of frames, whose number only the pipeline decides
    size = called_size(parts.recipe.student.call, parts.base)
    for card in parts.cards:
        try_card_reward(card, parts.test_rows[card.name][: parts.recipe.evaluate.num_prompts], size)
    forget_rewards()


def _base(recipe: Recipe, *, shipped: bool) -> Blueprint:
    place = recipe.place("student", "pretrained_model_name_or_path")
    try:
        base = read_blueprint(recipe.student.pretrained_model_name_or_path, shipped=shipped)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    _refuse_pickles(base, place)
    return base


def _refuse_pickles(base: Blueprint, place: str) -> None:
    """Local components must have .safetensors that are loaded; those of a hub id are only ever loaded as such."""
    if _is_hub_snapshot(base.folder):
        return
    held = base.weight_files()
    for name in base.configs:
        folder = base.folder / name
        if not (folder / "config.json").is_file() or name in held:
            continue
        others = sorted(folder.glob("*.safetensors"))
        if others:
            raise UserError(
                f"{place}: {folder} has {others[0].name}, but the weights that are loaded are not there or not all: "
                "one file or the shards of an index, without a variant such as fp16 in the name. Save the pipeline "
                "anew with save_pretrained, or rename the file."
            )
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{place}: {folder} has pickled weights only, which are never loaded. Save the pipeline anew "
                "with save_pretrained(safe_serialization=True)."
            )
        if name == base.denoiser:
            raise UserError(f"{place}: {folder} has no .safetensors weights. Save or copy the pipeline anew.")


def _is_hub_snapshot(folder: Path) -> bool:
    return "snapshots" in folder.parts or folder.is_relative_to(PACKAGE / "configs")


def _cards(recipe: Recipe) -> tuple[TeacherCard, ...]:
    cards: list[TeacherCard] = []
    for index, settings in enumerate(recipe.teachers):
        place = recipe.place("teachers", index, "name")
        try:
            card = teacher_card(settings.name, recipe.path)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        twin = next((other for other in cards if other.name == card.name), None)
        if twin:
            raise UserError(
                f"{place}: two teachers are called {card.name!r}: {twin.path} and {card.path}. Rename one card."
            )
        if "ema_decay" in settings.model_fields_set and card.form != "ema":
            raise UserError(
                f"{recipe.place('teachers', index, 'ema_decay')}: ema_decay belongs to a teacher of form "
                f'"ema"; {card.name!r} has form {card.form!r}. Remove it.'
            )
        selves = [other.name for other in (*cards, card) if other.form == "ema"]
        if len(selves) > 1:
            raise UserError(
                f'{place}: {selves[0]!r} and {selves[1]!r} are both of form "ema". The student has one average, so at '
                "most one teacher can be it. Remove one; the prompts of both may go into one teacher's files."
            )
        cards.append(card)
    return tuple(cards)


def _check_two_answers(recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...]) -> None:
    """An objective that compares what guided answers are made of needs both sides guided by two of them."""
    from diffopd.objective import OBJECTIVES
    from diffopd.rehearsal import forwards

    if not OBJECTIVES[recipe.objective.name].needs_branches:
        return
    steps = recipe.student.num_inference_steps
    sides = [("student", "the student", side_arguments(recipe.student, steps))]
    for teacher, card in zip(recipe.teachers, cards, strict=True):
        guidance = card.guidance_scale if teacher.guidance_scale is None else teacher.guidance_scale
        told = side_arguments(teacher, steps, guidance)
        sides.append((f"teachers.{card.name}", f"teacher {card.name!r}", told))
    for section, who, told in sides:
        if forwards(base, make_scheduler(recipe, base), told) < 2:
            raise UserError(
                f"{recipe.place('objective', 'name')}: objective {recipe.objective.name!r} compares the two answers of "
                f"each side's guidance, but {who} gives one (guidance_scale = {told['guidance_scale']:g}). Set "
                f"{section}.guidance_scale so that {base.pipeline_class} guides by two answers "
                "(above 1 in most), or take another objective."
            )


def _check_scored_steps(recipe: Recipe, base: Blueprint) -> None:
    """The student can be called with the number of steps that it is to be scored at."""
    steps, place = recipe.evaluate.student_steps, recipe.place("evaluate", "student_steps")
    if steps is None:
        return
    given = sorted({"sigmas", "timesteps"} & set(recipe.student.call))
    if given:
        raise UserError(
            f"{place}: student_steps = {steps} asks for another grid than student.call.{given[0]}, which gives the "
            "student's step by step. Remove one of the two."
        )
    try:
        grid_of(recipe, base, make_scheduler(recipe, base), steps)
    except UserError as error:
        raise UserError(f"{place}: the student cannot be called with student_steps = {steps}: {error}") from error


def _hashes(recipe: Recipe, cards: tuple[TeacherCard, ...]) -> dict[str, str]:
    """file -> sha256 of all that a run begins with: the base, a warm start, teachers' weights, prompts and rewards.

    Raises UserError for weights of a teacher that are not those of its card.
    """
    hashes = _base_hashes(recipe)
    warm, here = recipe.student.init_weights, Path.cwd()
    if warm and not hub_weights(warm, here):
        hashes["init_weights"] = weights_sha256(lora_file(warm, here, recipe.place("student", "init_weights")))
    hashes |= _teacher_hashes(cards)
    for card in cards:
        hashes |= {f"{card.name}: {what}": digest for what, digest in card.task_hashes().items()}
    return hashes


def _base_hashes(recipe: Recipe) -> dict[str, str]:
    folder = find_pipeline(recipe.student.pretrained_model_name_or_path)  # of a hub id, now with its weights
    return {f"base/{file}": digest for file, digest in pipeline_hashes(folder).items()}


def _teacher_hashes(cards: tuple[TeacherCard, ...]) -> dict[str, str]:
    digests = {f"{card.name}/{card.weights}": card.digest() for card in cards}
    return {file: digest for file, digest in digests.items() if digest}


def check_unchanged(folder: RunFolder, *, teachers: bool) -> None:
    """Raise UserError where the base of a run, or the weights of its teachers, are not those that it began with.

    Its student is an adapter on that base or weights beside its other parts: on another it draws something else.
    """
    recipe = folder.recipe()
    hashes = _base_hashes(recipe)
    if teachers:
        hashes |= _teacher_hashes(tuple(teacher_card(settings.name, recipe.path) for settings in recipe.teachers))
    folder.refuse_changed(hashes, "Nothing was written. Restore the file.")
