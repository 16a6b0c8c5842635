"""Settings read from TOML into frozen models, with errors that name the file, the line and the key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffopd.errors import UserError, suggestion

Location = tuple[str | int, ...]
HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
ASSIGNMENT = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
DECODE_PLACE = re.compile(r"\s*\(at line (\d+), column \d+\)")
# pydantic's words for these kinds of errors speak of classes or of its own inner steps.
PLAIN = {
    "model_type": "it must be a table",
    "too_short": "it must have at least {min_length} and has {actual_length}",
    "string_pattern_mismatch": "it must match {pattern}",
}


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no silent conversion, finite numbers only.

    can_override: whether `--set` reaches these settings; if not, errors do not offer it.
    """

    can_override: ClassVar[bool] = True

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class Source:
    """Where settings came from: a file, the line of each key in it, and what the command line replaced."""

    path: Path
    text: str
    lines: dict[Location, int]
    replaced: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """'file:line' of a key (or of the table around it), or the --set option that gave it."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.replaced:
                return f"--set {self.replaced[location[:end]]}"
            inside = [option for key, option in self.replaced.items() if key[:end] == location]
            if inside and location not in self.lines:
                return f"--set {inside[0]}"
            if location[:end] in self.lines:
                return f"{self.path}:{self.lines[location[:end]]}"
        return str(self.path)


def read_toml(path: Path) -> tuple[dict[str, Any], Source]:
    """Parse a TOML file. Raises UserError for a missing file, bad encoding, or bad syntax (with its line)."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of an existing file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = DECODE_PLACE.search(str(error))
        line = int(found[1]) if found else len(text.splitlines())
        reason = DECODE_PLACE.sub("", str(error))
        raise UserError(f"{path}:{line}: is not valid TOML: {reason}. Correct that line.") from error
    return data, Source(path, text, key_lines(text))


def key_lines(text: str) -> dict[Location, int]:
    """The line of every table header and `key =` of a TOML text; keys inside inline tables are not listed."""
    lines: dict[Location, int] = {}
    counts: dict[Location, int] = {}
    prefix: Location = ()
    for number, line in enumerate(text.split("\n"), start=1):  # comments may hold other separators, such as U+2028
        if header := HEADER.match(line):
            parts = _indexed(_parts(header[2]), counts)
            if header[1] == "[[":
                parts = parts[:-1] if isinstance(parts[-1], int) else parts
                counts[parts] = counts.get(parts, -1) + 1
                lines.setdefault(parts, number)
                parts = (*parts, counts[parts])
            prefix = parts
            lines.setdefault(prefix, number)
        elif assignment := ASSIGNMENT.match(line):
            lines.setdefault((*prefix, *_parts(assignment[1])), number)
    return lines


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _indexed(parts: list[str], counts: dict[Location, int]) -> Location:
    """A header's path with the current index after every array of tables on the way."""
    path: Location = ()
    for part in parts:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path])
    return path


def validated(
    model: type[Model], data: dict[str, Any], source: Source, offered: Mapping[str, Collection[str]] | None = None
) -> Model:
    """`data` as `model`. Raises UserError naming every wrong key, its place and what is allowed.

    offered: table ("" for the top) -> the keys to name in place of a wrong one, where not all that are known have an
    effect.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [_explain(model, details, source, offered or {}) for details in error.errors()]
        raise UserError("\n".join(dict.fromkeys(found))) from error


def _explain(
    model: type[Settings], details: dict[str, Any], source: Source, offered: Mapping[str, Collection[str]]
) -> str:
    location: Location = tuple(details["loc"])
    place, name, kind = source.place(location), dotted(location), details["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown key {name}.{suggestion(str(location[-1]), _keys(model, location[:-1], offered))}"
    if kind == "missing":
        return f"{place}: {name} is missing. Add it{_in_table(location)}."
    if kind == "value_error":
        return f"{place}: {name + ': ' if name else ''}{details['ctx']['error']}"
    given = details["input"]
    shown = f"{name} = {str(given).lower() if isinstance(given, bool) else repr(given)}"
    if kind == "literal_error":
        options = [option.strip().strip("'") for option in re.split(",| or ", details["ctx"]["expected"])]
        return f"{place}: {shown} is not allowed.{suggestion(str(given), options)}"
    plain = details["msg"].replace("Input should be", "it must be").replace("Input should", "it must")
    allowed = PLAIN[kind].format(**details.get("ctx", {})) if kind in PLAIN else _lower_first(plain)
    elsewhere = model.can_override and not place.startswith("--set")
    remedy = "Change it there" + (f" or with --set {name}=VALUE" if elsewhere else "")
    return f"{place}: {shown} is not allowed: {allowed}. {remedy}."


def dotted(location: Location) -> str:
    """A location as it is written in --set."""
    return ".".join(str(part) for part in location)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _in_table(location: Location) -> str:
    return f" to [{dotted(location[:-1])}]" if len(location) > 1 else " at the top"


def _keys(model: type[Settings], location: Location, offered: Mapping[str, Collection[str]]) -> list[str]:
    """The keys to offer for the table at `location`."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
        current = inner[0] if inner else annotation
    named = offered.get(dotted(location), current.model_fields)
    return [key for key in current.model_fields if key in named]
