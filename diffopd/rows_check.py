"""Whether prompts, pictures and contexts are there for what the recipe does with them."""

from __future__ import annotations

from pathlib import Path

from diffopd.blueprint import Blueprint
from diffopd.context import check_context, covers
from diffopd.data import PromptRow, check_tasks, read_prompts
from diffopd.errors import UserError
from diffopd.locate import nearest_sibling
from diffopd.recipe import Recipe
from diffopd.teacher import TeacherCard


def read_rows(
    recipe: Recipe, cards: tuple[TeacherCard, ...]
) -> tuple[dict[str, list[PromptRow]], dict[str, list[PromptRow]]]:
    """(training rows, test rows) by teacher. UserError for a row that names the task of no teacher."""
    names = [card.name for card in cards]
    read: dict[str, dict[str, list[PromptRow]]] = {"train": {}, "test": {}}
    for card in cards:
        for split, given in (("train", card.prompts.train), ("test", card.prompts.test)):
            for path in card.prompts.files(split):
                check_tasks(read_prompts(path), path, card.name, names)
            read[split][card.name] = read_prompts(given)
    return read["train"], read["test"]


def check_given(recipe: Recipe, cards: tuple[TeacherCard, ...], base: Blueprint) -> None:
    """Where pictures teach, states are noised ones, and the network's answer is compared: there is no step."""
    given, objective = next((card for card in cards if card.form == "pictures"), None), recipe.objective
    if given is None:
        return
    from diffopd.data_states import can_encode, cannot_encode

    if not can_encode(base.pipeline_class, base.configs.get("vae", {}).get("_class_name", "")):
        raise UserError(
            f"{recipe.place('student', 'pretrained_model_name_or_path')}: {cannot_encode(base.pipeline_class)}"
        )
    allowed = ("velocity", "denoised", "noise")
    wrong = {
        "states": (objective.states != "data", 'states = "data"'),
        "name": (objective.name not in allowed, f"one of {', '.join(allowed)}"),
        "substeps": (objective.substeps > 1, "substeps = 1"),
        "step_weights": (bool(objective.step_weights), "no step_weights"),
    }
    for key, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            raise UserError(
                f"{recipe.place('objective', key)}: objective.{key} = {getattr(objective, key)!r}, but teacher "
                f'{given.name!r} is of form "pictures": noised pictures are compared with what they are. Give {remedy}.'
            )


def check_pictures(
    recipe: Recipe, cards: tuple[TeacherCard, ...], train: dict[str, list[PromptRow]], test: dict[str, list[PromptRow]]
) -> None:
    """objective.states = "data" noises pictures: every row that may be drawn must name one that is there."""
    if recipe.objective.states != "data":
        return
    from diffopd.trajectory import PROMPTS_PER_TEACHER

    checked = recipe.train.batch_size if recipe.train.validate_every else 0
    for card in cards:
        tested = list(enumerate(test[card.name], start=1))
        # Those at the end are for the held-out loss, those at the beginning for the trajectories.
        tested = tested[:PROMPTS_PER_TEACHER] + (tested[PROMPTS_PER_TEACHER:][-checked:] if checked else [])
        tested = [] if card.form == "pictures" else tested  # these are checked on their training rows
        for split, rows in (("train", list(enumerate(train[card.name], start=1))), ("test", tested)):
            path = " and ".join(map(str, card.prompts.files(split)))
            for number, row in rows:
                name = row.metadata.get("file_name")
                if not isinstance(name, str):
                    place = recipe.place("objective", "states")
                    raise UserError(
                        f"{path}:{number}: the row names no picture, and {place} asks for "
                        'states = "data". Add "file_name" (a path from the prompt file) to every row of a .jsonl '
                        'file, or set objective.states = "student".'
                    )
                if not (row.metadata.get("is_drawn") or Path(name).is_file()):  # some are drawn before the first update
                    raise UserError(f"{path}:{number}: there is no picture {name}.{nearest_sibling(Path(name))}")


def check_contexts(
    recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...], rows: dict[str, list[PromptRow]]
) -> None:
    """A teacher's context is one that the pipeline takes, and every training row holds what it shows."""
    for index, (settings, card) in enumerate(zip(recipe.teachers, cards, strict=True)):
        if settings.context is None:
            continue
        place = recipe.place("teachers", index, "context")
        is_enhanced = all("enhanced_prompt" in row.metadata for row in rows[card.name])
        check_context(settings.context.kind, base.pipeline_class, is_enhanced=is_enhanced, place=place)
        lacking = next((row for row in rows[card.name] if not covers(settings.context.kind, row)), None)
        if lacking:
            raise UserError(
                f"{place}: the row of prompt {lacking.prompt!r} in {card.prompts.train} names no picture. Add "
                '"file_name" to every row.'
            )


def check_test_rows(recipe: Recipe, rows: dict[str, list[PromptRow]]) -> None:
    """A number of prompts that was asked for must be there; the default one means at most."""
    asked = recipe.evaluate.num_prompts if "num_prompts" in recipe.evaluate.model_fields_set else 1
    for name, held_out in rows.items():
        if len(held_out) < asked:
            raise UserError(
                f"{recipe.place('evaluate', 'num_prompts')}: num_prompts = {asked}, but teacher {name!r} has "
                f"{len(held_out)} test prompts. Ask for at most {len(held_out)}, or give it more."
            )
