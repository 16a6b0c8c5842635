"""Several processes as one: who I am, and one reduction per update.

Started by `torchrun`; without it there is one process. A wrapped (DDP) denoiser has no `.config` and breaks stock
pipelines, so the raw module is kept and its gradients are summed once, after the round's last backward.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffopd.errors import UserError


@dataclass(frozen=True)
class Processes:
    """rank in [0, world)."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, logs and shows."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This process's share of `count` rows: contiguous, sizes differ by at most one."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over processes in one reduction; a missing gradient counts as zero."""
        if self.world == 1:
            return
        held = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in held])
        dist.all_reduce(flat)
        for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts by name, summed over processes; a name may be absent in some."""
        if self.world == 1:
            return dict(counts)
        held: list[dict[str, int]] = [{}] * self.world
        dist.all_gather_object(held, dict(counts))
        return dict(sum(map(Counter, held), Counter()))

    def agree(self, value: bool) -> bool:
        """True on all processes if it is True on any."""
        return bool(self.sum(torch.tensor(float(value))).item() > 0) if self.world > 1 else value

    def of_main(self, value: float) -> float:
        """The main process's value, in every process (each has a clock of its own)."""
        if self.world == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(held, src=0)
        return float(held)

    def copy_from_main(self, parameters: Iterable[nn.Parameter]) -> None:
        """The main process's values in every process: what was computed at the start may differ by rounding."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def wait(self) -> None:
        """Until every process is here."""
        self.agree(False)


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_this_gpu() -> Callable[[], None]:
    """What gives another thread this one's GPU: torch keeps it by thread, and each begins with the first."""
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def join_processes() -> Processes:
    """Join the group that `torchrun` describes in the environment, or be alone.

    Raises UserError where there are GPUs, but fewer than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes()
    take_gpu()
    if not dist.is_initialized():  # gradients are summed where they lie; clocks, counts and flags are CPU tensors
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Processes(dist.get_rank(), world)


def take_gpu() -> None:
    """Where there are GPUs and several processes, each takes its own.

    Raises UserError where there are fewer GPUs than processes.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or not torch.cuda.is_available():
        return
    number, held = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= held:
        raise UserError(f"Process {number + 1} of this machine has no GPU: there are {held}. Start at most {held}.")
    torch.cuda.set_device(number)
