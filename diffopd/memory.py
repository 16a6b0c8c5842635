"""What need not lie on the device while the loop runs: the VAE, idle teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ReleasedVae:
    """The VAE taken off a set of pipelines, so that nothing holds its weights.

    A pipeline reads its VAE's scale factor when it is made, so it is released from finished pipelines only.
    """

    def __init__(self, pipelines: Iterable[Any], folder: Path) -> None:
        self._pipelines, self._folder = list(pipelines), folder
        vae = self._pipelines[0].vae
        self._kind, self._dtype, self._device = type(vae), vae.dtype, vae.device
        self._set(None)

    @contextmanager
    def back(self) -> Iterator[None]:
        """The VAE, loaded again, is on every pipeline while open."""
        vae = self._kind.from_pretrained(self._folder / "vae", dtype=self._dtype, use_safetensors=True)
        self._set(vae.requires_grad_(False).eval().to(self._device))
        try:
            yield
        finally:
            self._set(None)

    def _set(self, vae: nn.Module | None) -> None:
        for pipeline in self._pipelines:
            pipeline.register_modules(vae=vae)


class Offload:
    """Frozen denoisers that live on the CPU; the one in use is on the device until another one is asked for.

    Weights never change, so leaving the device costs nothing: the copy there is dropped. `moves` counts the copies
    made. Where the device is a GPU the weights on the CPU are pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._homes: dict[int, dict[Tensor, Tensor]] = {}
        self._present: nn.Module | None = None
        self.moves = 0

    def add(self, denoiser: nn.Module) -> None:
        """Take charge of a frozen denoiser; its weights are on the CPU afterwards."""
        denoiser.to("cpu")
        held = [*denoiser.parameters(), *denoiser.buffers()]
        pin = self._device.type == "cuda"
        self._homes[id(denoiser)] = {t: t.data.pin_memory() if pin else t.data for t in held}
        self._return(denoiser)

    @contextmanager
    def using(self, denoiser: nn.Module) -> Iterator[None]:
        """The denoiser is on the device while open (and afterwards, until another one is used)."""
        self.bring(denoiser)
        yield

    def bring(self, denoiser: nn.Module) -> None:
        """Have this denoiser on the device, and no other one of this object."""
        if denoiser is self._present:
            return
        if self._present is not None:
            self._return(self._present)
        for tensor, home in self._homes[id(denoiser)].items():
            tensor.data = home.to(self._device, non_blocking=True)
        self._present = denoiser
        self.moves += 1

    def _return(self, denoiser: nn.Module) -> None:
        for tensor, home in self._homes[id(denoiser)].items():
            tensor.data = home
