"""Processes started together end together, whatever ends them."""

import os
import signal
import subprocess
import sys
import threading

from diffopd import launch


def test_processes_are_waited_for_after_ctrl_c_and_ended_by_a_second_one(monkeypatch):
    def started(seconds):
        return [subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"]) for _ in range(2)]

    saving, stuck = started(0.1), started(600)
    assert launch._interrupted(saving) == 130
    assert [process.poll() for process in saving] == [0, 0]

    def pressed_again(processes):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_wait", pressed_again)
    assert launch._interrupted(stuck) == 130
    assert [process.poll() for process in stuck] == [-signal.SIGTERM] * 2


def test_a_failing_process_ends_the_others_with_its_exit_code():
    codes = ("import sys; sys.exit(2)", "import time; time.sleep(600)")
    started = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert launch._wait(started) == 2
    assert [process.poll() for process in started] == [2, -signal.SIGTERM]


def test_sigterm_to_the_launcher_ends_its_processes(monkeypatch):
    started, popen, before = [], subprocess.Popen, signal.getsignal(signal.SIGTERM)

    def sleeping(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    assert launch.launch(2, []) == 143
    assert signal.getsignal(signal.SIGTERM) is before, "another process's end is its own affair again"
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2
