"""Where things are: the two shelves (in a checkout or in an installed wheel), users' own folders, hub ids.

A bare name is a shipped folder; anything with a path separator is the user's own.
`owner/repo[/subfolder][@revision]`
is a hub id where no such local path exists.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from diffopd.errors import UserError, suggestion

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
PACKAGE = Path(__file__).resolve().parent
PIPELINE = [  # what a base is loaded from: no pickles, no other frameworks, no checkpoints of one file beside it
    *("*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"),
    *("*/*.safetensors", "model.safetensors", "model-*.safetensors"),  # some keep a text encoder at the top
]
VARIANTS = ["*model.*.safetensors", "*model-*.*.safetensors"]  # model.fp16.safetensors, with shards before or after


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, a folder (or .safetensors file) in it and a revision (None: the default branch)."""

    repo: str
    subfolder: str = ""
    revision: str | None = None


def shelf(kind: str) -> Path:
    """The folder "teachers" or "pipelines": inside the installed package, else beside it in a checkout."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def is_path(name: str) -> bool:
    """Whether a name is the user's own (it has a separator or starts at home or here)."""
    return "/" in name or os.sep in name or name in (".", "..") or name.startswith("~")


def absolute(name: str, folder: Path) -> str:
    """A local path as an absolute one, taken from `folder`; shelf names and hub ids stay as they are."""
    if not is_path(name):
        return name
    local = Path(os.path.abspath(folder / Path(name).expanduser()))
    return str(local) if local.exists() or not parse_hub_id(name) else name


def parse_hub_id(name: str) -> HubId | None:
    """`owner/repo[/subfolder][@revision]`, or None where the text cannot be one (absolute, dotted)."""
    found = HUB_ID.fullmatch(name)
    if not found or name.startswith((".", "~")):
        return None
    return HubId(found[1], found[2].strip("/"), found[3])


def teacher_names() -> list[str]:
    """The teachers on the shelf."""
    return sorted(path.parent.name for path in shelf("teachers").glob("*/teacher.toml"))


def pipeline_names() -> list[str]:
    """The pipelines on the shelf."""
    return sorted(path.parent.name for path in shelf("pipelines").glob("*/model_index.json"))


def recipe_names() -> list[str]:
    """The recipes on the shelf: of several teachers at its top, of one teacher in its folder."""
    top = shelf("teachers")
    return sorted(
        {path.stem for path in top.glob("*.toml")} | {path.parent.name for path in top.glob("*/distill.toml")}
    )


def tune_recipe_names() -> list[str]:
    """The tuning recipes on the shelf."""
    return sorted(path.stem for path in (shelf("teachers") / "tune").glob("*.toml"))


def find_tune_recipe(name: str) -> Path:
    """A tuning recipe's file by shelf name or path. Raises UserError for a name that is not on the shelf."""
    if name.endswith(".toml") or is_path(name):
        path = Path(name).expanduser().absolute()
        _refuse_other_file(path)
        return path
    file = shelf("teachers") / "tune" / f"{name}.toml"
    if not file.is_file():
        _refuse_other_file(Path(name))
        raise UserError(
            f'There is no shipped tuning recipe "{name}".{suggestion(name, tune_recipe_names())} '
            "For your own recipe give the path of its .toml file."
        )
    return file


def find_recipe(name: str) -> Path:
    """A recipe file by shelf name, path of a .toml file, or path of a folder with a distill.toml.

    Raises UserError where there is none, with the nearest name.
    """
    if name.endswith(".toml") or is_path(name):
        path = Path(name).expanduser()
        if (path / "teacher.toml").is_file() and not (path / "distill.toml").is_file():
            raise UserError(
                f"{path} is a teacher, and distilled is a recipe, which names its teachers. Write a .toml with "
                f'[student] and [[teachers]] name = "{name}" (README, "Add your own teacher").'
            )
        path = path / "distill.toml" if path.is_dir() else path
        if not path.is_file():
            near = nearest_sibling(path) or suggestion(Path(name).stem, recipe_names())
            raise UserError(f"{path}: there is no such recipe file.{near}")
        _refuse_other_file(path)
        return path.absolute()
    top = shelf("teachers")
    for path in (top / f"{name}.toml", top / name / "distill.toml"):
        if path.is_file():
            return path
    _refuse_other_file(Path(name))
    if name in teacher_names():
        raise UserError(
            f'"{name}" is a teacher, and distilled is a recipe, which names its teachers. Known recipes: '
            f"{', '.join(recipe_names())}. To learn from this one alone, write a .toml with [student] and [[teachers]] "
            f'name = "{name}" (README, "Add your own teacher"); `diffopd teach {name}` makes the teacher itself.'
        )
    raise UserError(
        f'There is no shipped recipe "{name}".{nearest_recipe(name) or suggestion(name, recipe_names())} '
        "For your own recipe give the path of its .toml file."
    )


def _refuse_other_file(path: Path) -> None:
    if path.is_file() and path.suffix != ".toml":
        raise UserError(
            f"{path} is not a recipe: a recipe is a .toml file. Give the path of one, or a shipped recipe's name "
            "(`diffopd teachers` lists them)."
        )


def find_teacher(name: str, relative_to: Path) -> Path:
    """A teacher's folder by shelf name or path from `relative_to`. Raises UserError where there is none."""
    if not is_path(name):
        folder = shelf("teachers") / name
        if not (folder / "teacher.toml").is_file():
            raise UserError(
                f'There is no shipped teacher "{name}".{suggestion(name, teacher_names())} '
                f"For your own teacher give its folder with a separator, such as ./{name}."
            )
        return folder
    folder = Path(absolute(name, relative_to))
    if not (folder / "teacher.toml").is_file():
        raise UserError(_no_teacher(folder))
    return folder


def _no_teacher(folder: Path) -> str:
    """Why there is no teacher at a local path, and what to name instead."""
    if folder.is_file():
        return f"{folder}: is a file. Name the teacher's folder, the one with its teacher.toml."
    is_there, places = folder.is_dir(), [folder, folder.parent] if folder.is_absolute() else []
    found = [[str(path.parent) for path in sorted(place.glob("*/teacher.toml"))] for place in places]
    near = next(filter(None, found), [])
    hint = suggestion(str(folder), near) if near else ""
    wrong = "is not a teacher folder, it has no teacher.toml" if is_there else "there is no such folder"
    return (
        f"{folder}: {wrong}.{hint} A teacher is a folder with teacher.toml, weights and prompts "
        '(README, "Add your own teacher").'
    )


def find_pipeline(name: str, relative_to: Path | None = None, *, patterns: list[str] | None = None) -> Path:
    """The folder of a base pipeline: shelf name, local path from `relative_to` (default: here), or hub id.

    patterns: of a hub repository only these files are downloaded, by default all that a pipeline is loaded from. Raises
    UserError where there is no such pipeline.
    """
    if not is_path(name):
        folder = shelf("pipelines") / name
        here = (relative_to or Path.cwd()) / name
        hint = suggestion(name, pipeline_names()) + " For your own give a path with a separator, or owner/repo."
        hint = f' For the folder {here} write "./{name}".' if here.is_dir() else hint
    else:
        folder = Path(absolute(name, relative_to or Path.cwd()))
        hub = parse_hub_id(name)
        if hub and not folder.is_dir():
            local = (relative_to or Path.cwd()) / name
            return download(hub, patterns or PIPELINE, without=VARIANTS, local=local)
        hint = f"{nearest_sibling(folder)} Give a folder that a diffusers pipeline was saved to."
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{name}: there is no pipeline with a model_index.json at {folder}.{hint}")
    return folder


def shipped_configs(name: str) -> Path | None:
    """The folder of configs that comes with the package for a hub id, None where there is none. No weights in it."""
    folder = PACKAGE / "configs" / name.partition("@")[0]
    return folder if parse_hub_id(name) and (folder / "model_index.json").is_file() else None


def nearest_sibling(path: Path) -> str:
    """' Did you mean "x"?' for what lies where a missing local path should, "" where nothing near does."""
    while not path.parent.is_dir() and path.parent != path.parent.parent:
        path = path.parent
    if path.exists() or not path.parent.is_dir():
        return ""
    entries = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    near = difflib.get_close_matches(path.name, entries, n=1, cutoff=0.6)
    return f' Did you mean "{path.parent / near[0]}"?' if near else ""


def nearest_recipe(name: str) -> str:
    """' Did you mean "x"?' for a recipe file that lies here under nearly this name, "" where none does."""
    near = difflib.get_close_matches(name, [file.name for file in Path().glob("*.toml")], n=1, cutoff=0.75)
    return f' Did you mean "{near[0]}"?' if near else ""


def download(hub: HubId, patterns: list[str], *, without: Collection[str] = (), local: Path | None = None) -> Path:
    """The local copy of a hub repository's (sub)folder or file. Raises UserError when it cannot be had.

    patterns, without: which of its files. local: the path that the same text would be; where something near it exists,
    the error offers that.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    prefix = f"{hub.subfolder}/" if hub.subfolder else ""
    wanted = [prefix + pattern for pattern in patterns]
    told = {"ignore_patterns": [prefix + pattern for pattern in without]} if without else {}
    if hub.subfolder.endswith(".safetensors"):  # one file of a repository that may hold many
        wanted = [hub.subfolder]
    try:
        top = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted, **told)
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        near = nearest_sibling(local) if local else ""
        raise UserError(
            f"{hub.repo}: no local folder of this name, and the hub did not give it ({type(error).__name__}).{near} "
            "Check the path or id, log in with `hf auth login` for a gated one, or unset HF_HUB_OFFLINE."
        ) from error
    return Path(top) / hub.subfolder
