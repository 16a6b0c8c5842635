"""Several processes train what one does; their group, and what is refused before they start."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import (
    NO_CLIP,
    assert_same_gradients,
    gradients_of,
    recipe_with,
    rows_of,
    run_to_end,
    weights_of,
)
from safetensors.torch import load_file

from diffopd import distill as loop
from diffopd.cli import app
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def test_two_processes_are_one_in_gradients_schedules_and_ends(tiny_recipe, tmp_path):
    """Also where their clocks, their held-out losses and who gets Ctrl-C differ (see two_processes.py)."""
    whole = gradients_of(recipe_with(tiny_recipe, NO_CLIP, "train.batch_size=8"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "two_processes.py"
    target = tmp_path / "gradients.safetensors"
    started, outputs = [], []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(script), str(tiny_recipe), str(target), NO_CLIP, "train.batch_size=4"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    assert_same_gradients(whole, load_file(target))
    ends = [json.loads(target.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    assert (
        ends[0]
        == ends[1]
        == {
            "clock": {"reason": "reached max_train_seconds = 3.5", "updates": 4, "apart": 0.0},
            "held-out loss": {"reason": "the held-out loss has not fallen for 2 checks", "updates": 2, "apart": 0.0},
            "Ctrl-C": {"reason": loop.INTERRUPTED, "updates": 2, "apart": 0.0},
            "copied from main": [1.0, 1.0, 1.0],
        }
    )


def test_the_command_in_two_processes_is_the_command_with_a_doubled_batch(tiny_recipe, tmp_path, monkeypatch):
    """`--processes 2` at batch 2 and the loop alone at batch 4 train the same weights."""
    alone = run_to_end(recipe_with(tiny_recipe, "train.batch_size=4"))
    one, folder = weights_of(alone, 2), RunFolder(tmp_path / "two")
    arguments = ["distill", str(tiny_recipe), "--output-dir", str(folder.path), "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["diffopd", *arguments, "--set", "evaluate.teachers=false"])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 0
    assert (folder.path / "report.html").is_file()
    two = weights_of(folder, 2)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    counted = [[row["network_calls"] for row in rows_of(path, "update")] for path in (alone, folder)]
    assert counted[0] == counted[1] and counted[0][0]["student"] > 0, "calls are those of all processes"


def test_a_group_on_gpus_also_sums_tensors_of_the_cpu(monkeypatch):
    """Clocks, counts and flags are CPU tensors, which NCCL alone would refuse."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert loop.join_processes() == loop.Processes(1, 2)
    assert asked == [1, "cpu:gloo,cuda:nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="has no GPU: there are 1"):
        loop.join_processes()


def test_a_folder_of_other_files_is_refused_before_processes_start(tiny_recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    monkeypatch.setattr(subprocess, "Popen", None)
    arguments = ["distill", str(tiny_recipe), "--processes", "2", "--output-dir", str(tmp_path / "full")]
    monkeypatch.setattr(sys, "argv", ["diffopd", *arguments])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
