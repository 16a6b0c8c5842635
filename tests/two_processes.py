"""One process of a group: the summed gradients of one update, written by the main process (see test_distill)."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffopd import distill as loop
from diffopd.recipe import read_recipe
from diffopd.supervise import Watch

if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = read_recipe(sys.argv[1], sys.argv[3:])
    processes = loop.join_processes()
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), processes, "cpu")
    trained = loop._trained(run)
    assert processes.of_main(float(processes.rank)) == 0.0, "the clock of a schedule must be the main process's"
    loop.one_update(run, trained, Watch())
    if processes.is_main:
        save_file({name: p.grad for name, p in student.parameters.items()}, Path(sys.argv[2]))
    processes.wait()
