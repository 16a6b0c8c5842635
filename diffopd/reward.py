"""The reward that a teacher is taught by: its card's, a file's function, a shipped one, or a weighted sum of these."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffopd.errors import UserError, suggestion
from diffopd.rewards import SHIPPED
from diffopd.teach_recipe import RewardSettings, TeachRecipe
from diffopd.teacher import Reward, file_sha256, load_reward


@dataclass(frozen=True)
class WeightedSum:
    """sum of weight x reward over named terms; a reward of one term is that term times its weight."""

    terms: tuple[tuple[str, float, Reward], ...]

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        """(B,) float64. Raises ValueError for a term that gives another number of scores."""
        total = np.zeros(len(images))
        for name, weight, reward in self.terms:
            scores = torch.as_tensor(reward(images, prompts, metadata), dtype=torch.float64).cpu().numpy().reshape(-1)
            if len(scores) != len(images):
                raise ValueError(f"reward {name!r} gave {len(scores)} scores for {len(images)} pictures.")
            total += weight * scores
        return total


def reward_of(recipe: TeachRecipe) -> Reward:
    """The recipe's reward, its networks loaded.

    Raises UserError for a missing file, function, package or weights, saying what to install or download.
    """
    terms = terms_of(recipe)
    loaded = [(term.reward, term.weight, _load(recipe, number, term)) for number, term in enumerate(terms)]
    return WeightedSum(tuple(loaded))


def terms_of(recipe: TeachRecipe) -> list[RewardSettings]:
    """The terms of the recipe's reward: its own, else the card's reward."""
    return recipe.rewards or [RewardSettings(reward=recipe.card.reward)]


def check_reward(recipe: TeachRecipe) -> list[str]:
    """Check every term without loading networks; returns the packages that are still to be installed.

    Raises UserError for an unknown name, an option that it does not take, or a file that cannot be imported.
    """
    missing = []
    for number, term in enumerate(terms_of(recipe)):
        if ":" in term.reward:
            _of_file(recipe, number, term)
            continue
        kind = _shipped(recipe, number, term.reward)
        known = [name for name in inspect.signature(kind).parameters]
        for key in term.options:
            if key not in known:
                raise UserError(
                    f"{_place(recipe, number)}: reward {term.reward!r} takes no option {key!r}.{suggestion(key, known)}"
                )
        missing += [name for name in kind.packages if importlib.util.find_spec(name) is None]
    return list(dict.fromkeys(missing))


def reward_hashes(recipe: TeachRecipe) -> dict[str, str]:
    """file -> sha256 of the files that the recipe's own terms and pictures are made by."""
    specs = [term.reward for term in recipe.rewards if ":" in term.reward]
    specs += [recipe.pictures] if recipe.pictures else []
    files = [spec.rpartition(":")[0] for spec in specs]
    return {f"{recipe.card.name}: {file}": file_sha256(recipe.card.folder / file) for file in dict.fromkeys(files)}


def picture_function(recipe: TeachRecipe) -> Any:
    """The function that draws training pictures, (prompts, metadata, seeds) -> B PIL images; None where there is none.

    Raises UserError for a missing file or function.
    """
    if recipe.pictures is None:
        return None
    try:
        return load_reward(recipe.pictures, recipe.card.folder)
    except UserError as error:
        raise UserError(f"{recipe.place('pictures')}: pictures, loaded as a reward is: {error}") from error


def _load(recipe: TeachRecipe, number: int, term: RewardSettings) -> Reward:
    if ":" in term.reward:
        return _of_file(recipe, number, term)
    kind, options = _shipped(recipe, number, term.reward), dict(term.options)
    try:
        return kind(**_with_paths(options, recipe.card.folder))
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{_place(recipe, number)}: reward {term.reward!r} cannot be loaded: {error}") from error


def _with_paths(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options that name something in the teacher's folder, as absolute paths."""
    return {
        key: str(folder / value) if isinstance(value, str) and (folder / value).exists() else value
        for key, value in options.items()
    }


def _of_file(recipe: TeachRecipe, number: int, term: RewardSettings) -> Reward:
    if term.options:
        raise UserError(f"{_place(recipe, number)}: options belong to shipped rewards; {term.reward!r} is a function.")
    try:
        return load_reward(term.reward, recipe.card.folder)
    except UserError as error:
        raise UserError(f"{_place(recipe, number)}: {error}") from error


def _shipped(recipe: TeachRecipe, number: int, name: str) -> Any:
    if name not in SHIPPED:
        raise UserError(
            f'{_place(recipe, number)}: there is no shipped reward "{name}".{suggestion(name, list(SHIPPED))} '
            "For your own give file.py:function from the teacher's folder."
        )
    module, kind = SHIPPED[name].split(":")
    return vars(importlib.import_module(module))[kind]


def _place(recipe: TeachRecipe, number: int) -> str:
    return recipe.place("rewards", number, "reward") if recipe.rewards else recipe.card.place("reward")
