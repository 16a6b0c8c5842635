"""How much of a prompt's quoted text can be read in the picture. Needs rapidocr and onnxruntime: diffopd[ocr]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OCR:
    """1 - Levenshtein / length of the wanted text, in [0, 1], as the OCR reward of Flow-GRPO (arXiv:2505.05470).

    The wanted text is metadata["text"], else the first quoted span of the prompt. Case and spaces do not count, a
    text that contains the wanted one scores 1, and the distance is at most the length. upscale: enlarge pictures
    this many times first; recognisers miss small letters.

    Raises ImportError without rapidocr.
    """

    packages = ("rapidocr", "onnxruntime")

    def __init__(self, upscale: int = 1) -> None:
        if upscale < 1:
            raise ValueError(f"upscale = {upscale} is not allowed. Give a whole number of at least 1.")
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(f"it reads text with rapidocr ({error}). Install diffopd[ocr].") from error
        self._engine, self._upscale = RapidOCR(params={"Global.log_level": "error"}), upscale

    @staticmethod
    def check(prompts: list[str], metadata: list[dict[str, Any]], **options: Any) -> None:
        """Raises ValueError for a prompt that quotes nothing and has no "text", whatever the options."""
        for prompt, row in zip(prompts, metadata, strict=True):
            wanted_text(prompt, row)

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """(B,). Raises ValueError for a prompt that quotes nothing and has no "text"."""
        wanted = [wanted_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        return [text_score(text, self.read(image)) for text, image in zip(wanted, images, strict=True)]

    def read(self, image: Any) -> str:
        """All text of a picture, in reading order; "" where there is none."""
        size = (image.width * self._upscale, image.height * self._upscale)
        pixels = np.asarray(image.convert("RGB").resize(size))[..., ::-1]  # the engine takes BGR
        return " ".join(self._engine(np.ascontiguousarray(pixels)).txts or ())


def wanted_text(prompt: str, row: dict[str, Any]) -> str:
    """What is to be read. Raises ValueError where neither the row nor the prompt says so."""
    found = QUOTED.search(prompt)
    text = row.get("text") or (found and (found[1] or found[2]))
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(f'the prompt {prompt!r} quotes no text. Quote it as "..." or give its row a "text".')
    return text


def text_score(wanted: str, read: str) -> float:
    """1 - min(Levenshtein, length) / length of the wanted text; 1 where it is contained; case and spaces ignored."""
    wanted, read = _plain(wanted), _plain(read)
    if wanted in read:
        return 1.0
    return 1.0 - min(levenshtein(wanted, read), len(wanted)) / len(wanted)


def levenshtein(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Insertions, deletions and replacements from one sequence to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
