"""What others draw with an export: another process, in which this package cannot be imported, loads and calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffopd.errors import UserError

SEED = 0  # of latents and of the noise that a scheduler draws, on both sides
# Runs in a fresh interpreter in which this package cannot be imported.
PROGRAM = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffopd":
            raise ImportError("diffopd is not to be had here")

sys.meta_path.insert(0, Refuse())
try:
    import diffopd
except ImportError:
    pass
else:
    sys.exit("diffopd could be imported")
import diffusers, numpy, torch

asked = json.load(open(sys.argv[1]))
torch.set_num_threads(asked["threads"])  # another count sums in another order

def load(form):
    if form["file"]:
        kind = getattr(diffusers, form["pipeline_class"])
        return kind.from_single_file(form["file"], config=form["folder"], local_files_only=True)
    return diffusers.DiffusionPipeline.from_pretrained(form["folder"], dtype=torch.float32, local_files_only=True)

for form in asked["forms"]:
    pipeline = load(form)
    if form["scheduler"]:
        override = dict(form["scheduler"])
        kind = getattr(diffusers, override.pop("class", type(pipeline.scheduler).__name__))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **override)
    if form["lora"]:
        pipeline.load_lora_weights(form["lora"])
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(asked["seed"])  # for schedulers that draw without the generator
    generator = torch.Generator().manual_seed(asked["seed"])
    pictures = pipeline(generator=generator, output_type="np", **form["arguments"])[0]
    numpy.save(form["pictures"], numpy.asarray(pictures))
"""


@dataclass(frozen=True)
class Form:
    """How a stock client loads one exported form.

    folder: a pipeline; or the base that `lora` goes onto; or the configs of `file`. scheduler: what the client must
    change of the folder's own, as in `student.scheduler`. arguments: of its call, beside those of all forms.
    """

    name: str
    folder: str
    lora: str | None = None
    file: str | None = None
    scheduler: dict[str, Any] | None = None
    pipeline_class: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def draw(pipeline: Any, arguments: dict[str, Any]) -> np.ndarray:
    """What the pipeline draws from `SEED`, as numbers in [0, 1]: pictures (B, H, W, C) or films (B, F, H, W, C)."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)  # some schedulers draw without the call's generator
        generator = torch.Generator().manual_seed(SEED)
        return np.asarray(pipeline(generator=generator, output_type="np", **arguments)[0])


def ask(forms: list[Form], arguments: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Form -> what one other process draws with it and `arguments`; `folder` is made and removed.

    Raises UserError where a form cannot be loaded or called there.
    """
    folder.mkdir(exist_ok=True)
    files = {form.name: folder.resolve() / f"{form.name}.npy" for form in forms}
    own = [{"pictures": str(files[form.name]), "arguments": {**arguments, **form.arguments}} for form in forms]
    asked = {
        "forms": [asdict(form) | more for form, more in zip(forms, own, strict=True)],
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "stranger.py").write_text(PROGRAM)
    command = [sys.executable, "-I", str(folder / "stranger.py"), str(folder / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"Stock diffusers cannot reload the export:\n{done.stderr[-1500:]}")
    pictures = {name: np.load(file) for name, file in files.items()}
    shutil.rmtree(folder)
    return pictures
