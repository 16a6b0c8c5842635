"""One process of a group (see test_processes): the summed gradients of one update, then runs that end in three ways.

The main process writes the gradients; each process writes how its runs ended and how far apart the parameters of all
processes are. Clocks, held-out losses and Ctrl-C differ between the processes on purpose.
"""

import json
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from diffopd import distill as loop
from diffopd import loop as common
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch

ENDINGS = {
    "clock": ["train.max_train_steps=0", "train.max_train_seconds=3.5", 'train.lr_scheduler="cosine"'],
    "held-out loss": ["train.max_train_steps=6", "train.validate_every=1", "train.patience=2"],
    "Ctrl-C": ["train.max_train_steps=6", 'name="Ctrl-C"'],
}


def differ(rank: int) -> None:
    """The main process's clock goes 1 s a reading and its loss always falls; nobody presses Ctrl-C there."""
    ticks, follow = count(), loop._follow
    common.time = SimpleNamespace(monotonic=lambda: next(ticks) * (1.0 + 9.0 * rank))

    def validate(run, trained):
        trained.progress.checks_since_best += rank
        return {"dots": 0.0}

    def interrupted(run, trained, *, moved):
        follow(run, trained, moved=moved)
        if rank == 1 and trained.progress.update == 1 and run.recipe.name == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)

    loop._validate, loop._follow = validate, interrupted


def end_of(run, folder: Path) -> dict[str, object]:
    """Train until something ends it; the reason, the updates done, the largest difference between processes."""
    trained = loop.new_trained(run)
    log = SimpleNamespace(update=lambda *args: None, validation=lambda losses: None)
    reason = common.run_updates(run, trained, RunFolder(folder), log, loop.one_update, loop._validate)
    mine = torch.cat([p.detach().flatten() for p in trained.parameters.values()])
    everyone = [torch.empty_like(mine) for _ in range(run.processes.world)]
    torch.distributed.all_gather(everyone, mine)
    apart = float((everyone[0] - everyone[1]).abs().max())
    return {"reason": reason, "updates": trained.progress.update, "apart": apart}


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    recipe_file, target, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    recipe = read_recipe(recipe_file, overrides)
    processes = loop.join_processes()
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), processes, "cpu")
    loop.one_update(run, loop.new_trained(run), Watch())
    if processes.is_main:
        save_file({name: p.grad for name, p in student.parameters.items()}, target)
    differ(processes.rank)
    ends = {
        name: end_of(replace(run, recipe=read_recipe(recipe_file, [*overrides, *options])), target.with_suffix(f".{n}"))
        for n, (name, options) in enumerate(ENDINGS.items())
    }
    own = torch.nn.Parameter(torch.full((3,), 1.0 + processes.rank))
    processes.copy_from_main([own])
    ends["copied from main"] = own.tolist()
    target.with_suffix(f".{processes.rank}.json").write_text(json.dumps(ends))
    processes.wait()
