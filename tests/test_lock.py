"""One process at work in a run folder: others are refused, and whatever ends it leaves nothing in the way."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from test_cli import command, replace
from test_run_folder import contents

from diffopd.cli import _at_work
from diffopd.errors import UserError
from diffopd.launch import LAUNCHED
from diffopd.lock import at_work
from diffopd.run_folder import LOCK, RunFolder

ROOT = Path(__file__).parents[1]
WORKING = "at work"
HOLDER = f"""
import subprocess, sys
from pathlib import Path
from diffopd import launch
from diffopd.lock import at_work
WORK = "print('{WORKING}', flush=True); import sys; sys.stdin.read()"
popen = subprocess.Popen
subprocess.Popen = lambda command, **options: popen([sys.executable, "-c", WORK], **options)
with at_work(Path(sys.argv[1]), print) as lock:
    launch.launch(2, [], lock) if sys.argv[2:] else exec(WORK)
"""


@pytest.fixture
def start():
    """Starts `python ARGUMENTS` and waits until it says that it is at work; all are ended with the test."""
    started = []

    def begin(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, *map(str, arguments)]
        started.append(
            subprocess.Popen(
                words, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
        said = []
        for line in started[-1].stdout:
            if line.strip() == WORKING:
                return started[-1]
            said.append(line)
        raise AssertionError("".join(said))

    yield begin
    for process in started:
        process.kill()
        process.stdin.close()
        process.wait()


def enter(folder):
    """Whether this process got in, or the refusal."""
    with at_work(folder, print) as lock:
        return lock is not None


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, start):
    folder = tmp_path / "runs" / "one"
    first = start("-c", HOLDER, folder)
    with pytest.raises(UserError, match="is in use: .*Nothing was written.*--output-dir") as caught:
        enter(folder)
    assert f"{folder} is in use" in str(caught.value)
    host = re.escape(socket.gethostname())
    assert re.search(
        rf"process \(pid {first.pid} on {host}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)", str(caught.value)
    )
    first.kill()
    first.wait()
    assert [path.name for path in folder.iterdir()] == [LOCK]
    assert RunFolder.at(folder) and enter(folder), "what a killed process leaves is nobody's run"
    assert list(folder.iterdir()) == []


def test_processes_that_outlive_their_killed_launcher_keep_the_folder(tmp_path, start):
    first = start("-c", HOLDER, tmp_path, "launch")
    first.kill()
    first.wait()
    with pytest.raises(UserError, match="or one that it started, is at work"):
        enter(tmp_path)
    first.stdin.close()  # both read it to its end
    with FileLock(tmp_path / LOCK):
        pass
    assert enter(tmp_path)


def test_what_was_made_for_the_lock_goes_again_unless_it_was_used(tmp_path):
    folder = tmp_path / "runs" / "one"
    with pytest.raises(KeyError), at_work(folder, print):
        assert (folder / LOCK).is_file()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with at_work(folder, print):
        (folder / "recipe.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_a_folder_of_other_files_or_that_cannot_be_written_is_refused_before_the_lock(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty and holds no run"), _at_work(tmp_path):
        pass
    with pytest.raises(UserError, match=r"mine.txt/run cannot be written \(Not a directory\).*--output-dir"):
        enter(tmp_path / "mine.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("setting", [{LAUNCHED: "1", "RANK": "0"}, {"RANK": "1"}], ids=["launched", "another rank"])
def test_a_process_that_works_for_another_takes_no_lock(tmp_path, monkeypatch, setting):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with at_work(tmp_path, print) as lock, _at_work(tmp_path) as own:
        assert lock is not None and own is None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_work_goes_on(tmp_path, monkeypatch, capsys, number):
    def unsupported(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with _at_work(tmp_path / "run") as lock:
        assert lock is None
    told = " ".join(capsys.readouterr().err.split())
    assert f"run is on a file system without locks ({os.strerror(number)})" in told
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_started_twice_ends_with_code_2_and_leaves_the_first_alone(
    tmp_path, tiny_sd, tiny_teacher, start
):
    """The first is held where it evaluates, by a reward that waits for a word."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "dots")
    wait = f'print("\\n{WORKING}", flush=True), __import__("sys").stdin.readline()'
    is_drawn = "len(set(images[0].tobytes())) > 1"  # not one of the blank pictures that it is tried on
    replace(teacher / "reward.py", "):\n", f"):\n    if {is_drawn}:\n        {wait}\n")
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, [teacher])
    run = tmp_path / "run"
    words = ["distill", recipe, "--set", "evaluate.teachers=false"]
    first = start("-m", "diffopd.cli", *words)
    before = contents(run)
    assert json.loads(before[run / LOCK])["pid"] == first.pid

    second = [sys.executable, "-m", "diffopd.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(second, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"Error: {run} is in use: another diffopd process (pid {first.pid} on" in done.stderr
    for name in ("evaluate", "export"):
        refused = command(name, run)
        assert refused.exit_code == 2 and f"(pid {first.pid} on" in refused.stderr, name
    assert command(*words, "--dry-run").exit_code == 0
    assert contents(run) == before
    assert command("report", run).exit_code == 0 and (run / "report.html").is_file()

    out, _ = first.communicate("go on\n" * 9)
    assert first.returncode == 0 and "Done:" in out
    assert not [path for path in run.rglob("*") if path.name == LOCK]
    assert "is finished and nothing has changed" in command(*words).output
