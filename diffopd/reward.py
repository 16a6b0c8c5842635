"""The reward of a task: a file's function, a shipped one, or a weighted sum of these; of a card, or of a teach.toml."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffopd.data import PromptRow, read_prompts
from diffopd.errors import UserError, suggestion
from diffopd.locate import is_path, parse_hub_id
from diffopd.rewards import SHIPPED
from diffopd.teach_recipe import TeachRecipe
from diffopd.teacher import Reward, RewardSettings, TeacherCard, file_sha256, load_reward, reward_files

SLACK = 1e-6  # of a mean in float32
FROM_0_TO_1 = (
    "a card's function scores from 0 to 1. Scale it, or write it as [[rewards]], a sum, "
    "which may give any finite number."
)


@dataclass(frozen=True)
class WeightedSum:
    """sum of weight x reward over named terms; a reward of one term is that term times its weight.

    shares: the sum must lie in [0, 1], as that of a card's one function.
    """

    terms: tuple[tuple[str, float, Reward], ...]
    shares: bool = False

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        """(B,) float64. Raises ValueError for a term that gives anything but B numbers, or a share out of place."""
        total = np.zeros(len(images))
        for name, weight, reward in self.terms:
            total += weight * _scores(name, reward(images, prompts, metadata), len(images))
        outside = _no_shares(total) if self.shares else total[:0]
        if len(outside):
            raise ValueError(f"reward {self.terms[0][0]!r} scored {outside[0]:g}, and {FROM_0_TO_1}")
        return total


def _no_shares(scores: np.ndarray) -> np.ndarray:
    """Those out of [0, 1]; what is not finite is told elsewhere."""
    return scores[np.isfinite(scores) & ((scores < -SLACK) | (scores > 1 + SLACK))]


def _scores(name: str, given: Any, count: int) -> np.ndarray:
    """(count,) float64 of what a reward gave. Raises ValueError for anything else."""
    import torch

    try:
        given = given.detach() if isinstance(given, torch.Tensor) else given  # a network's answer: no gradient is taken
        scores = torch.as_tensor(given, dtype=torch.float64).cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward {name!r} gave {type(given).__name__} for {count} pictures, not a list of one number for each."
        ) from error
    if not scores.ndim or scores.size != count:
        found = f"{scores.size} score{'s' * (scores.size != 1)}" if scores.ndim else "one number"
        raise ValueError(f"reward {name!r} gave {found} for {count} pictures, not a list of one for each.")
    return scores.reshape(-1)


@dataclass(frozen=True)
class _Term:
    """One term, the teacher's folder that its files are in, and where it is written."""

    settings: RewardSettings
    folder: Path
    place: str


def reward_of(recipe: TeachRecipe) -> Reward:
    """The reward that a teacher is taught by, its networks loaded: the recipe's own, else the card's.

    Raises UserError for a missing file, function, package or weights, saying what to install or download.
    """
    return card_reward(recipe.card) if not recipe.rewards else _summed(_terms(recipe))


def card_reward(card: TeacherCard) -> Reward:
    """The reward that scores a teacher's task, its networks loaded. Raises UserError as `reward_of`."""
    return replace(_summed(_terms_of_card(card)), shares=not card.rewards and ":" in card.reward)


def terms_of(recipe: TeachRecipe) -> list[RewardSettings]:
    """The terms of the recipe's reward: its own, else the card's."""
    return recipe.rewards or recipe.card.terms


def check_reward(recipe: TeachRecipe) -> list[str]:
    """Check every term without loading networks; returns the packages that are still to be installed.

    Raises UserError for an unknown name, an option that it does not take, or a file that cannot be imported.
    """
    return _checked(_terms(recipe))


def missing_weights(recipe: TeachRecipe, watched: Sequence[TeacherCard]) -> list[str]:
    """What weights of the shipped rewards that will be loaded are named by options and neither there nor a hub id."""
    terms = ([] if recipe.is_supervised else _terms(recipe)) + _terms_of_card(recipe.card)
    terms += [term for card in watched for term in _terms_of_card(card)]
    found = [
        f"{value} (options.{key} of {term.settings.reward!r}, {term.place})"
        for term in terms
        if term.settings.reward in SHIPPED
        for key, value in term.settings.options.items()
        if key in getattr(_shipped(term), "weights", ())
        if isinstance(value, str)
        and not (term.folder / value).exists()
        and not (is_path(value) and parse_hub_id(value))
    ]
    return list(dict.fromkeys(found))


def check_card_reward(card: TeacherCard) -> list[str]:
    """As `check_reward`, of the reward that scores a teacher's task."""
    return _checked(_terms_of_card(card))


def check_rows(recipe: TeachRecipe, *, download: bool) -> None:
    """Ask every term that has a `check` whether it can score each training and held-out row of a teacher.

    No network is loaded; download: whether a config may be fetched for it. Raises UserError naming the row's file and
    line, and what the term says of it.
    """
    files = recipe.card.prompts.files("train") + recipe.card.prompts.files("test")
    _check_rows(_terms(recipe), files, download=download)


def check_card_rows(card: TeacherCard, *, download: bool) -> None:
    """As `check_rows`, of the held-out rows, which are those that a card's reward scores."""
    _check_rows(_terms_of_card(card), card.prompts.files("test"), download=download)


def try_reward(recipe: TeachRecipe, rows: Sequence[PromptRow], size: tuple[int, int]) -> None:
    """Call the file's functions that a teacher is taught by once, on two blank pictures of (width, height) pixels.

    rows: real ones to call them with. Shipped rewards are not loaded. Raises UserError, naming file and function, for
    whatever a function raises, and for scores that are not one finite number a picture.
    """
    if not recipe.rewards:
        try_card_reward(recipe.card, rows, size)
    for term in _terms(recipe) if recipe.rewards else ():
        _tried(term, rows, size)


def try_card_reward(card: TeacherCard, rows: Sequence[PromptRow], size: tuple[int, int]) -> None:
    """As `try_reward`, of what scores a teacher's task: a card's one function must also keep to [0, 1]."""
    for term in _terms_of_card(card):
        scores = _tried(term, rows, size)
        outside = _no_shares(scores)
        if not card.rewards and len(outside):
            raise UserError(
                f"{term.place}: {term.settings.reward!r} scored a blank picture {outside[0]:g}, and {FROM_0_TO_1}"
            )


def _tried(term: _Term, rows: Sequence[PromptRow], size: tuple[int, int]) -> np.ndarray:
    """(2,) scores of two blank pictures; zeros for a shipped reward, which is not called."""
    from PIL import Image

    if ":" not in term.settings.reward:
        return np.zeros(2)
    reward, asked = _of_file(term), [rows[0], rows[-1]]
    images = [Image.new("RGB", size, "gray") for _ in asked]
    try:
        given = reward(images, [row.prompt for row in asked], [dict(row.metadata) for row in asked])
        scores = _scores(term.settings.reward, given, len(images))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        why = f"{type(error).__name__}: {str(error).rstrip('.')}{_line_in(term, error)}"
        raise UserError(
            f"{term.place}: {term.settings.reward!r} was tried on two blank pictures of {size[0]} x {size[1]} pixels "
            f"and cannot score them: {why} Correct it: it takes "
            "(images, prompts, metadata) and gives one number for each picture."
        ) from error
    wrong = scores[~np.isfinite(scores)]
    if len(wrong):
        raise UserError(
            f"{term.place}: {term.settings.reward!r} scored a blank picture {wrong[0]}, and scores "
            "must be finite. Correct it, or give such pictures a score of their own."
        )
    return scores


def _check_rows(terms: list[_Term], files: Sequence[Path], *, download: bool) -> None:
    for term in terms:
        check = _row_check(term, download=download)
        for file in files if check else ():
            for number, row in enumerate(read_prompts(file), start=1):
                try:
                    check([row.prompt], [dict(row.metadata)])
                except (Exception, SystemExit) as error:  # whatever the user's code raises
                    told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    raise UserError(
                        f"{file}:{number}: the reward {term.settings.reward!r} ({term.place}) cannot score this row: "
                        f"{told.rstrip('.')}{_line_in(term, error)} Correct the row, or remove it."
                    ) from error


def _row_check(term: _Term, *, download: bool) -> Callable[..., None] | None:
    """What refuses rows that a term cannot score, (prompts, metadata) -> None; None for a term that takes any."""
    if ":" in term.settings.reward:
        return getattr(_of_file(term), "check", None)
    check = getattr(_shipped(term), "check", None)
    return check and partial(check, download=download, **_with_paths(term.settings.options, term.folder))


def _line_in(term: _Term, error: Exception) -> str:
    """' (file:line).' of the last line of the term's own file that an error went through, '.' where there is none."""
    file = (term.folder / term.settings.reward.rpartition(":")[0]).resolve()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" ({file}:{lines[-1]})." if lines else "."


def reward_hashes(recipe: TeachRecipe) -> dict[str, str]:
    """file -> sha256 of the files that the recipe's own terms and pictures are made by."""
    files = reward_files(recipe.rewards) + ([recipe.pictures.rpartition(":")[0]] if recipe.pictures else [])
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


def _terms(recipe: TeachRecipe) -> list[_Term]:
    if not recipe.rewards:
        return _terms_of_card(recipe.card)
    places = [recipe.place("rewards", number, "reward") for number in range(len(recipe.rewards))]
    return [_Term(term, recipe.card.folder, place) for term, place in zip(recipe.rewards, places, strict=True)]


def _terms_of_card(card: TeacherCard) -> list[_Term]:
    places = [card.place("rewards", number, "reward") for number in range(len(card.rewards))]
    return [
        _Term(term, card.folder, place)
        for term, place in zip(card.terms, places or [card.place("reward")], strict=True)
    ]


def _summed(terms: list[_Term]) -> WeightedSum:
    return WeightedSum(tuple((term.settings.reward, term.settings.weight, _load(term)) for term in terms))


def _checked(terms: list[_Term]) -> list[str]:
    missing: list[str] = []
    for term in terms:
        if ":" in term.settings.reward:
            _of_file(term)
            continue
        kind = _shipped(term)
        known = [name for name in inspect.signature(kind).parameters]
        for key in term.settings.options:
            if key not in known:
                raise UserError(
                    f"{term.place}: reward {term.settings.reward!r} takes no option {key!r}.{suggestion(key, known)}"
                )
        for key, why in getattr(kind, "needs", {}).items():
            if key not in term.settings.options:
                raise UserError(f"{term.place}: reward {term.settings.reward!r} needs options.{key}. {why}")
        missing += [name for name in kind.packages if importlib.util.find_spec(name) is None]
    return list(dict.fromkeys(missing))


def _load(term: _Term) -> Reward:
    if ":" in term.settings.reward:
        return _of_file(term)
    kind = _shipped(term)
    try:
        return kind(**_with_paths(term.settings.options, term.folder))
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{term.place}: reward {term.settings.reward!r} cannot be loaded: {error}") from error


def _with_paths(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options that name something in the teacher's folder, as absolute paths."""
    return {
        key: str(folder / value) if isinstance(value, str) and (folder / value).exists() else value
        for key, value in options.items()
    }


def _of_file(term: _Term) -> Reward:
    if term.settings.options:
        raise UserError(f"{term.place}: options belong to shipped rewards; {term.settings.reward!r} is a function.")
    try:
        return load_reward(term.settings.reward, term.folder)
    except UserError as error:
        raise UserError(f"{term.place}: {error}") from error


def _shipped(term: _Term) -> Any:
    name = term.settings.reward
    if name not in SHIPPED:
        raise UserError(
            f'{term.place}: there is no shipped reward "{name}".{suggestion(name, list(SHIPPED))} '
            "For your own give file.py:function from the teacher's folder."
        )
    module, kind = SHIPPED[name].split(":")
    return vars(importlib.import_module(module))[kind]
