"""One process that has imported stock diffusers and not us, and that forks for each program of `diffopd.stranger`.

What a program loads and draws is its own; only the seconds of importing are shared. -I as there: no folder of ours is
on its path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback

import diffusers, numpy, torch, transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline

if "diffopd" in sys.modules:
    sys.exit("diffopd was imported")
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        error = os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT)
        os.dup2(error, 1), os.dup2(error, 2)
        sys.argv = asked["argv"]
        code = 0
        try:
            exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {"__name__": "__main__"})
        except SystemExit as ended:
            code = 0 if ended.code is None else 1
            print(ended.code, file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Strangers:
    """In the place of the module `subprocess`, for `diffopd.stranger` alone."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("the process of stock diffusers did not start")

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """`python -I PROGRAM ARGUMENT` in a fork."""
        python, isolated, *argv = command
        assert (python, isolated) == (sys.executable, "-I")
        file = Path(argv[0]).with_suffix(".stderr")
        print(json.dumps({"argv": argv, "stderr": str(file)}), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, code, "", file.read_text())

    def close(self) -> None:
        """The process ends when nobody can ask it any more."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
