"""One process at work in a run folder: the operating system's lock, which goes with the process, however that ends."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from diffopd.errors import UserError
from diffopd.run_folder import LOCK

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems without, or mounted without


@contextmanager
def at_work(folder: Path, tell: Callable[[str], object]) -> Iterator[int | None]:
    """While open, no other process gets in here; makes the folder, and removes it again if nothing was put into it.

    Yields the lock's file descriptor: a process that inherits it has the lock too. tell: hears of a file system without
    locks, where work goes on (None). Raises UserError where another process is at work, or nothing can be written.
    """
    file, descriptors = folder / LOCK, []
    new = [place for place in (folder, *folder.parents) if not place.exists()]

    def sign(descriptor: int) -> None:
        signature = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signature).encode(), 0)
        descriptors.append(descriptor)

    lock = FileLock(file, blocking=False, fallback_to_soft=False, on_acquired=sign)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is in use: another diffopd process{_signed(file)}, or one that it started, is at work in it. "
            "Nothing was written. Wait for its end, or stop it with Ctrl-C, then give this command again; a second "
            "run needs a folder of its own (--output-dir)."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            _remove_empty(new)
            raise UserError(
                f"{folder} cannot be written ({error.strerror}). Make it writable, or train in another folder "
                "(--output-dir)."
            ) from error
        tell(
            f"Warning: {folder} is on a file system without locks ({error.strerror}). Take care yourself that no other "
            "diffopd process works in this folder meanwhile: they would write over each other."
        )
    try:
        yield descriptors[0] if descriptors else None
    finally:
        file.unlink(missing_ok=True)  # before the release: whoever opened it meanwhile sees that it is gone
        lock.release()
        _remove_empty(new)


def _signed(file: Path) -> str:
    try:
        signature = json.loads(file.read_text(encoding="utf-8"))
        return " (pid {pid} on {host}, since {since})".format(**signature)
    except (OSError, ValueError, KeyError, TypeError):  # it has ended by now, or has only begun
        return ""


def _remove_empty(places: list[Path]) -> None:
    for place in places:
        with suppress(OSError):
            place.rmdir()
