"""Ctrl-C as a wish: the work in hand is finished first, so that what is saved belongs together."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STDERR = 2
SOON = 0.1  # seconds until a lost Ctrl-C comes again


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


@contextmanager
def lost_interrupts_come_again() -> Iterator[None]:
    """While open, a Ctrl-C that falls into a callback, where Python ignores exceptions, is raised again a moment later.

    An import goes through hundreds of such callbacks (they release its locks), and these libraries import for seconds.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return before(unraisable)
        timer = threading.Timer(SOON, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.daemon = True
        return timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
