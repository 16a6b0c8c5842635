"""scripts/setup.sh with a stand-in for Python: what it installs, when it starts anew, what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Makes an environment that holds itself, writes down what pip is asked for, and has torch of the kind in $BUILDS.
PYTHON = """#!/usr/bin/env bash
here="$LOG"
case "$*" in
    "-c import sys"*) exit 0 ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "made" >> "$here" ;;
    "-m pip freeze") echo "torch==2.13.0" ;;
    "-m pip install"*) echo "pip ${*: -1} $(echo "$*" | grep -o 'index-url [^ ]*')" >> "$here" ;;
    "-c import torch"*) echo "$BUILDS" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with setup.sh and no environment yet."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.sh", "constraints.txt"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def set_up(project, kind, *, builds=None, index=""):
    """(exit code, what was done, what was said) of one start."""
    log = project / "log"
    log.write_text("")
    own = {"DIFFOPD_TORCH": kind, "DIFFOPD_PYTHON": str(project / "python"), "DIFFOPD_TORCH_INDEX": index}
    environment = {**os.environ, **own, "LOG": str(log), "BUILDS": builds or kind}
    done = subprocess.run(
        ["bash", str(project / "scripts" / "setup.sh")], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, log.read_text().split("\n")[:-1], done.stdout + done.stderr


def test_the_first_start_installs_and_the_second_does_nothing(project):
    code, done, said = set_up(project, "cpu")
    assert (code, done) == (0, ["made", "pip torch==2.13.0 ", "pip .[test] "]), said
    assert "Installed torch==2.13.0, a cpu build." in said
    assert set_up(project, "cpu") == (0, [], "")


def test_another_kind_starts_anew(project):
    set_up(project, "cpu")
    (project / ".venv" / "old").write_text("")
    code, done, said = set_up(project, "cuda")
    assert code == 0 and done == ["made", "pip torch>=2.13 ", "pip .[test] "]
    assert "Making .venv anew" in said and not (project / ".venv" / "old").exists()


def test_a_set_up_that_was_cut_short_for_another_kind_starts_anew(project):
    set_up(project, "cpu")
    (project / ".venv" / ".diffopd-installed").write_text("cpu unfinished\n")
    assert set_up(project, "cpu")[1] == ["pip torch==2.13.0 ", "pip .[test] "]
    (project / ".venv" / ".diffopd-installed").write_text("cpu unfinished\n")
    assert set_up(project, "cuda")[1][0] == "made"


def test_a_build_of_the_other_kind_is_told_and_an_index_gets_the_wanted_one(project):
    code, _, said = set_up(project, "cpu", builds="cuda")
    assert code == 0 and "a cuda build" in said and "DIFFOPD_TORCH_INDEX to an index of cpu builds" in said
    code, done, said = set_up(project, "cpu", index="file:///builds")
    assert code == 0 and done[:2] == ["made", "pip torch==2.13.0 index-url file:///builds"]
    assert set_up(project, "cpu", index="file:///builds") == (0, [], "")
    assert set_up(project, "cpu") == (0, [], ""), "without the setting what is there stays"


def test_a_gpu_build_that_was_asked_for_and_not_served_is_an_error_each_time(project):
    for _ in range(2):
        code, _, said = set_up(project, "cuda", builds="cpu")
        assert code == 1 and "a cpu build" in said and "DIFFOPD_TORCH_INDEX to an index of cuda builds" in said


def test_an_unknown_kind_is_refused(project):
    code, done, said = set_up(project, "tpu")
    assert code == 2 and not done and "allowed are cpu and cuda" in said
