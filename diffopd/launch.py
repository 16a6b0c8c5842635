"""Several processes on this machine, started and ended together: what `diffopd distill --processes N` does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
LAUNCHED = "DIFFOPD_LAUNCHED"  # set in the environment of processes that were started here


class _Terminated(Exception):
    """SIGTERM has come."""


def launch(count: int, arguments: list[str], lock: int | None = None) -> int:
    """Run `diffopd ARGUMENTS` in `count` processes of one group; returns the first failure's exit code, else 0.

    Only the first process writes to the terminal, errors of all come through. When one fails the others are ended:
    they would wait for it for ever. Ctrl-C reaches all of them (one terminal); they finish their update, save and
    stop by themselves, and a second one ends them. SIGTERM reaches this process alone, which passes it on (143).
    lock: descriptor of the run folder's lock (`at_work`), which they hold with this process, and without it if need be.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHED: "1"}
    share = str(max(1, (os.cpu_count() or 1) // count))  # threads of processes that fight over cores are far slower
    command = [sys.executable, "-m", "diffopd.cli", *arguments]
    started: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": share, **os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            out, held = None if rank == 0 else subprocess.DEVNULL, () if lock is None else (lock,)
            started.append(subprocess.Popen(command, env=environment, stdout=out, pass_fds=held))
        return _wait(started)
    except KeyboardInterrupt:
        return _interrupted(started)
    except _Terminated:
        return _end(started, 128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)  # who is forked from here later must end by it


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _interrupted(started: list[subprocess.Popen[bytes]]) -> int:
    try:
        _wait(started)
    except KeyboardInterrupt:
        _end(started, 130)
    return 130


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in started]
        failed = [code for code in codes if code]
        if failed:
            return _end(started, failed[0])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _end(started: list[subprocess.Popen[bytes]], code: int) -> int:
    deadline = time.monotonic() + GRACE_SECONDS
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return code
