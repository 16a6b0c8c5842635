"""The one error that a person can repair: it says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown by the command line without a traceback, exit code 2."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' where a known name is near, then the known names; begins with a space."""
    names = list(known)
    near = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    guess = next((f' Did you mean "{name}"?' for name in names if near and name.lower() == near[0]), "")
    return f"{guess} Known: {', '.join(names) or 'none'}."
