"""`--set section.key=value`: values are TOML or a bare word, list items are reached by index or name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from diffopd.errors import UserError, suggestion
from diffopd.settings import Location

BARE_WORD = re.compile(r"[\w./:@~+-]+")


def parse_override(option: str) -> tuple[list[str], Any]:
    """'a.b=c' as (["a", "b"], value). UserError for a missing '=' or key, or a value not in TOML."""
    name, equals, text = option.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or not all(parts):
        raise UserError(f"--set {option}: not of the form section.key=value. Example: --set train.batch_size=8.")
    try:
        return parts, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if BARE_WORD.fullmatch(text.strip()):
            return parts, text.strip()
        raise UserError(
            f"--set {option}: the value {text!r} is not TOML. Allowed are numbers, true, false, [lists], "
            f"{{key = value}} tables and strings; several words need two quotes: --set '{name}=\"two words\"'."
        ) from error


def apply_override(data: dict[str, Any], option: str) -> Location:
    """Put one override into `data`; returns where. Raises UserError for a list item that does not exist."""
    parts, value = parse_override(option)
    current: Any = data
    location: list[str | int] = []
    for depth, part in enumerate(parts):
        key = _index(current, part, option) if isinstance(current, list) else part
        location.append(key)
        if depth + 1 == len(parts):
            current[key] = value
        elif isinstance(current, dict):
            current = current.setdefault(key, {})
        else:
            current = current[key]
        if depth + 1 < len(parts) and not isinstance(current, (dict, list)):
            raise UserError(f"--set {option}: {'.'.join(parts[: depth + 1])} is a single value and has no keys.")
    return tuple(location)


def _index(items: list[Any], part: str, option: str) -> int:
    """A list item by its number, or by its name (of a path, the last part)."""
    names = [Path(str(item.get("name", ""))).name if isinstance(item, dict) else str(item) for item in items]
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if part in names:
        return names.index(part)
    known = [*map(str, range(len(items))), *names]
    raise UserError(f"--set {option}: there is no item {part!r} in this list.{suggestion(part, known)}")
