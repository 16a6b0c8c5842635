"""Prompt files: .txt with one prompt a line, or .jsonl with one object a line ("prompt" and any metadata).

A dataset folder with one file per split does as well: train.txt, train.jsonl or train_metadata.jsonl, and the same for
test (the folders of flow_grpo).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffopd.errors import UserError

SPLIT_FILES = ("{}_metadata.jsonl", "{}.jsonl", "{}.txt")
# Metadata that says how a row is told or handled.
NOT_ASKED = {"task", "file_name", "is_drawn", "bucket", "pixels", "enhanced_prompt"}
LEAST_ASKED = 20  # fewer kinds than this in many prompts are taken for categories


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what else its row said (a reward reads it); "file_name", a picture, is made absolute.

    So is "reference", which dino_similarity compares with, where such a file lies beside the prompts: a reward of the
    user's may have a text there.
    """

    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[int, int] | None:
        """(width, height) in pixels at which the row is trained, None for the pipeline's own size."""
        return tuple(self.metadata["bucket"]) if "bucket" in self.metadata else None


def prompt_file(path: Path | str, split: str) -> Path:
    """The prompt file that `path` names: itself, or the one of `split` ("train" or "test") in a dataset folder.

    Raises UserError for a folder that has no file of the split, or several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    names = [form.format(split) for form in SPLIT_FILES]
    found = [name for name in names if (path / name).is_file()]
    if len(found) == 1:
        return path / found[0]
    if found:
        raise UserError(f"{path}: has several files of the {split} split ({', '.join(found)}). Name one of them.")
    raise UserError(f"{path}: has no prompts of the {split} split. Put {' or '.join(names)} there.")


def read_prompts(path: Path | str | Sequence[str], split: str = "train") -> list[PromptRow]:
    """The rows of a prompt file, or of the file of `split` in a dataset folder, in order; row i is line i + 1.

    Of several files: the first rows of all, then the second ones, and so on.

    Raises UserError naming file and line: no such file, another suffix, no prompts, an empty line, a line that is
    not a JSON object, a missing or empty "prompt".
    """
    if not isinstance(path, (Path, str)):
        rounds = zip_longest(*(read_prompts(file, split) for file in path))
        return [row for found in rounds for row in found if row is not None]
    path = prompt_file(path, split)
    if path.suffix not in (".txt", ".jsonl") and path.exists():
        raise UserError(f"{path}: prompt files end in .txt (one prompt a line) or .jsonl; rename or convert it.")
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # prompts may hold U+2028 or U+0085
    except OSError as error:
        raise UserError(f"{path}: prompts cannot be read ({error.strerror}). Name an existing file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error
    if lines == [""]:
        raise UserError(f"{path}: has no prompts. Write at least one line.")
    read = _text_row if path.suffix == ".txt" else _json_row
    return [_located(read(line, f"{path}:{number}"), path) for number, line in enumerate(lines, start=1)]


def asked_of(rows: Sequence[PromptRow]) -> list[str]:
    """What each row asks for: equal for rows that ask for the same in other words, or beside another picture.

    It is the row's metadata without what says how it is told or handled; the prompt itself where a row has no other
    metadata, or where the rows have so few kinds of it (fewer than 20, and than a quarter of the prompts) that it can
    only be a category.
    """
    kept = [{key: value for key, value in row.metadata.items() if key not in NOT_ASKED} for row in rows]
    told = [json.dumps(one, sort_keys=True) for one in kept]
    is_category = len(set(told)) < min(LEAST_ASKED, len({row.prompt for row in rows}) / 4)
    tells_apart = len(set(told)) > 1 and not is_category
    return [said if one and tells_apart else row.prompt for said, one, row in zip(told, kept, rows, strict=True)]


def check_tasks(rows: list[PromptRow], path: Path, teacher: str, teachers: Collection[str]) -> None:
    """A row that names its "task" must belong to the teacher whose file it stands in.

    Raises UserError naming file, line and the tasks that are covered.
    """
    for number, row in enumerate(rows, start=1):
        task = row.metadata.get("task", teacher)
        if task not in teachers:
            raise UserError(
                f"{path}:{number}: task {task!r} is covered by no teacher of this recipe (covered: "
                f"{', '.join(teachers)}). Remove the row or add a teacher for it."
            )
        if task != teacher:
            raise UserError(
                f"{path}:{number}: task {task!r} stands among the prompts of teacher {teacher!r}, which "
                f"would be asked for it. Move the row to the prompts of {task!r}."
            )


def _located(row: PromptRow, path: Path) -> PromptRow:
    located, here = {}, path.parent.resolve()
    for key in ("file_name", "reference"):
        name = row.metadata.get(key)
        if isinstance(name, str) and (key == "file_name" or (here / name).is_file()):
            located[key] = str(here / name)
    return PromptRow(row.prompt, row.metadata | located)


def _text_row(line: str, place: str) -> PromptRow:
    if not line.strip():
        raise UserError(f"{place}: empty line. Every line is a prompt: remove it.")
    return PromptRow(line.strip())


def _json_row(line: str, place: str) -> PromptRow:
    if not line.strip():
        raise UserError(f"{place}: empty line. Every line is a JSON object: remove it.")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg}, column {error.colno}). Correct that line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{place}: needs a JSON object with a string "prompt", such as {{"prompt": "a red dot"}}.')
    if not row["prompt"].strip():
        raise UserError(f'{place}: "prompt" is empty. Write one or remove the row.')
    return PromptRow(row["prompt"], {key: value for key, value in row.items() if key != "prompt"})
