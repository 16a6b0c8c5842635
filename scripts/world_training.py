"""What the trainings of the embedded world's models share: log, averages, rates, and the denoiser's loss."""

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

Output = Annotated[Path, typer.Option(help="folder of the training state and logs")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Workers = Annotated[int, typer.Option(help="processes that draw ahead of the training; 0: it draws itself")]


def prepare(device: str) -> torch.device:
    """One thread, the first seed, and on a GPU matrix products in TF32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    return torch.device(device)


@contextmanager
def drawn_ahead(draw: Callable[[int], Any], first: int, workers: int) -> Iterator[Iterator[Any]]:
    """An iterator of draw(first), draw(first + 1), ... without an end; with workers, drawn by them ahead of their use.

    `draw` must depend on its number alone, so the results are the same for any number of workers.
    """
    if not workers:
        yield map(draw, count(first))
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, initializer=_serve, initargs=(draw,)) as pool:
        yield _kept_busy(pool, first, 4 * workers)


_DRAW: list[Callable[[int], Any]] = []  # of a worker: functions that cannot be sent come by the fork


def _serve(draw: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    _DRAW[:] = [draw]


def _call(number: int) -> Any:
    return _DRAW[0](number)


def _kept_busy(pool: Any, first: int, ahead: int) -> Iterator[Any]:
    waiting = [pool.apply_async(_call, (number,)) for number in range(first, first + ahead)]
    for number in count(first + ahead):
        yield waiting.pop(0).get()
        waiting.append(pool.apply_async(_call, (number,)))


def log_row(output: Path, name: str, **row: Any) -> None:
    """Appends one JSON line to <output>/<name>.jsonl and prints it."""
    line = json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    with (output / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


@torch.no_grad()
def update_average(average: list[torch.Tensor], parameters: list[torch.Tensor], decay: float) -> None:
    """Exponential moving average of the weights."""
    torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state without ever leaving a half-written file."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(progress: float) -> float:
    """From 1 to 0.02 while progress goes from 0 to 1."""
    return 0.02 + 0.98 * math.cos(math.pi / 2 * min(progress, 1.0)) ** 2


def velocity_loss(
    model: Callable[..., torch.Tensor],
    scheduler: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v = alpha eps - sigma x0 (arXiv:2202.00512); noisy timesteps are drawn more often."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = (1000 * torch.rand(len(latents), generator=generator) ** 0.7).long().to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, tokens), scheduler.get_velocity(latents, noise, timesteps))
