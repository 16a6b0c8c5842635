"""What need not lie on the device while the loop runs: encoders whose answers are stored, the VAE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffopd.embeddings import text_encoders


class Released:
    """Text encoders and VAE taken off a set of pipelines, so that nothing holds their weights.

    A pipeline reads its VAE's scale factor when it is made, so they are released from finished pipelines only.
    """

    def __init__(self, pipelines: Iterable[Any], folder: Path, *, keep_vae: bool) -> None:
        self._pipelines, self._folder = list(pipelines), folder
        first = self._pipelines[0]
        self._vae = None if keep_vae else first.vae
        self._device = first.device
        if self._vae is not None:
            self._vae = type(first.vae), first.vae.dtype
        gone = [*text_encoders(first), *([] if keep_vae else ["vae"])]
        for pipeline in self._pipelines:
            pipeline.register_modules(**dict.fromkeys(gone))

    @contextmanager
    def vae_back(self) -> Iterator[None]:
        """The VAE, loaded again, is on every pipeline while open."""
        if self._vae is None:
            yield
            return
        kind, dtype = self._vae
        vae = kind.from_pretrained(self._folder / "vae", dtype=dtype, use_safetensors=True)
        vae = vae.requires_grad_(False).eval().to(self._device)
        for pipeline in self._pipelines:
            pipeline.register_modules(vae=vae)
        try:
            yield
        finally:
            for pipeline in self._pipelines:
                pipeline.register_modules(vae=None)
