"""What the disk refuses to take, told as what it is: which file, why, and what stands."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffopd.errors import UserError

FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))  # safetensors gives the words alone
OS_ERROR = re.compile(r"I/O error: (.*) \(os error \d+\)")


class DiskError(UserError):
    """What could not be written and why; whoever knows adds what stands."""


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """While open, what the system or safetensors refuses to write is a DiskError that names `path`.

    kept: a sentence on what is still there, and how the work goes on.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "Make room on that disk." if is_full(error) else "Make it writable."
        raise DiskError(f"{path} could not be written ({reason(error)}). {remedy} {kept}".rstrip()) from error


def is_full(error: Exception) -> bool:
    """Whether an error of the system, or of a library that met one, says that the disk takes no more."""
    return any(words in str(error) for words in FULL)


def reason(error: Exception) -> str:
    """The system's words in an error."""
    found = OS_ERROR.search(str(error))
    return found[1] if found else getattr(error, "strerror", None) or str(error)
