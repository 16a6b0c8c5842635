"""Ctrl-C as a wish: the work in hand is finished first, so that what is saved belongs together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STDERR = 2


@dataclass
class Interrupt:
    """asked: somebody has pressed Ctrl-C."""

    asked: bool = False


@contextmanager
def deferred_interrupt(note: str) -> Iterator[Interrupt]:
    """While open, the first Ctrl-C only sets `asked` and shows `note`; a second one raises KeyboardInterrupt at once.

    Signals belong to the main thread; in another one, and where SIGINT is ignored, nothing is changed.
    """
    interrupt, before = Interrupt(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        os.write(STDERR, note.encode())  # a buffered write may not be entered twice

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
