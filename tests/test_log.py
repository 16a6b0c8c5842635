"""What a run prints while it trains: a bar on a terminal, a line at each held-out check elsewhere, never both."""

import re

import pytest
from rich.console import Console

from diffopd.checkpoint import Progress
from diffopd.distill import UpdateLosses
from diffopd.log import TrainingLog
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch
from diffopd.teach_log import Round, TeachLog

TEXT = 'name = "r"\n[student]\npretrained_model_name_or_path = "emoji"\n[[teachers]]\nname = "text"\n'


@pytest.fixture
def open_log(tmp_path):
    """A log with these bounds, of a run that has made 10 updates in 30 seconds."""
    (tmp_path / "r.toml").write_text(TEXT + "[train]\nmax_train_steps = 40\n")

    def begin(kind, *overrides, is_main=True):
        recipe = read_recipe(tmp_path / "r.toml", list(overrides))
        folder = RunFolder.create(tmp_path / "run", recipe, {})
        return kind(folder, recipe, Progress(update=10, seconds=30.0), is_main=is_main)

    return begin


def losses():
    record = UpdateLosses()
    record.sums, record.rows = {("text", 0): 0.25, ("style", 0): 1.0}, {("text", 0): 1, ("style", 0): 1}
    return record


def printed(log, capsys):
    with log:
        log.update(losses(), 1e-3, Watch())
        log.validation({"text": 0.125, "style": 0.375})
    return [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ((), "0:01:30"),
        (("train.max_train_seconds=90",), "0:01:00"),
        (("train.max_train_steps=0", "train.max_train_seconds=7230"), "2:00:00"),
    ],
)
def test_without_a_terminal_each_check_prints_a_plain_line(open_log, capsys, bounds, left):
    said = printed(open_log(TrainingLog, *(b + ".0" if "seconds" in b else b for b in bounds)), capsys)
    assert said == [f"distill update 10 | text 0.2500 style 1.0000 | held-out 0.2500 | about {left} left"]


def test_on_a_terminal_the_bar_says_it(open_log, capsys, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    assert printed(open_log(TrainingLog), capsys) == []


@pytest.mark.parametrize(("columns", "shown"), [(120, "text 0.2500 style 1.0000"), (80, "mean 0.6250")])
def test_the_bars_clock_has_room_on_a_narrow_terminal(open_log, capsys, monkeypatch, columns, shown):
    monkeypatch.setattr("rich._console", Console(width=columns, force_terminal=True))
    with open_log(TrainingLog) as log:
        log.update(losses(), 1e-3, Watch())
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(rf" 10 \| {shown} \| \S+/s \d:\d\d:\d\d [\d-]+:[\d-]+:[\d-]+\s*$", plain), plain


def test_other_processes_say_nothing(open_log, capsys):
    assert printed(open_log(TrainingLog, is_main=False), capsys) == []


def test_teaching_says_what_held_out_prompts_say(open_log, capsys):
    with open_log(TeachLog) as log:
        log.validation({"reward": 0.5})
        log.update(Round({"reward": 0.25}), 1e-3, Watch())
        log.validation({"reward": 0.75, "drift": 0.125})
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert said == [
        "teach update 10 | held-out reward 0.5000 | about 0:01:30 left",
        "teach update 10 | reward 0.2500 | held-out reward 0.7500 drift 0.1250 | about 0:01:30 left",
    ]
