"""Checkpoints of a run: deployable weights in the layouts others load, and what an exact resume needs.

checkpoint-N/pytorch_lora_weights.safetensors (LoRA) or checkpoint-N/unet/ (full) are the weights to deploy: the
average where one is kept, else the trained ones. checkpoint-N/state/ holds trained parameters, average, optimizer
and counters, all in safetensors and JSON (nothing pickled). The noise needs no state: it is a function of integers.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffopd.adapters import STUDENT, Average
from diffopd.disk import writing
from diffopd.drive import denoiser_name, denoiser_of
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder


@dataclass
class Progress:
    """Counters of a run: finished updates, seconds of training, best held-out loss and checks since it.

    validated: a hash of the prompts that the best loss is of, 0 where it is unknown.
    """

    update: int = 0
    seconds: float = 0.0
    best_validation: float | None = None
    checks_since_best: int = 0
    images: int = 0
    validated: int = 0


@dataclass
class Trained:
    """What a checkpoint saves and restores: the student's parameters, their average, the optimizer."""

    pipeline: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    self_teacher: Average | None = None
    is_lora: bool = True
    progress: Progress = field(default_factory=Progress)


def save_checkpoint(folder: Path, trained: Trained) -> None:
    """Write `folder` whole or not at all: a temporary name, flushed to disk, then a rename.

    A folder that is there already stays as it is: it holds the state of this very update.

    Raises UserError where the disk does not take it, naming the checkpoint before it, which stays.
    """
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(folder, RunFolder(folder.parent).kept()):
            _write(temporary, trained)
            temporary.rename(folder)
            flush(folder.parent)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, trained: Trained) -> None:
    state = folder / "state"
    state.mkdir(parents=True)
    save_file(_contiguous(trained.parameters), state / "parameters.safetensors")
    for name, average in (("average", trained.average), ("self_teacher", trained.self_teacher)):
        if average:
            save_file(_contiguous(average.values), state / f"{name}.safetensors")
    save_file(_optimizer_tensors(trained), state / "optimizer.safetensors")
    (state / "progress.json").write_text(json.dumps(asdict(trained.progress)))
    with averaged(trained):
        save_deployable(folder, trained.pipeline, is_lora=trained.is_lora)
    share(folder)
    for path in (*folder.rglob("*"), folder):
        flush(path)


def share(folder: Path) -> None:
    """Files of a folder as readable as the user's other new files are; safetensors keeps its own to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, trained: Trained) -> None:
    """Put a checkpoint's state back.

    Raises UserError when it does not fit the student that is being trained, and for a file that is damaged or gone.
    """
    state = folder / "state"
    _fill(trained.parameters, _read(state / "parameters.safetensors"), folder)
    for name, average in (("average", trained.average), ("self_teacher", trained.self_teacher)):
        if average:
            average.values.update(_on_devices(_read(state / f"{name}.safetensors"), average.values))
    _restore_optimizer(trained, _read(state / "optimizer.safetensors"))
    try:
        trained.progress = Progress(**json.loads((state / "progress.json").read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise _damaged(state / "progress.json", error) from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file}: is damaged ({error}). Restore it, or remove {file.parents[1]} to go on from the checkpoint before it."
    )


def averaged(trained: Trained) -> AbstractContextManager:
    """While open, the student has the weights to deploy: their average, where one is kept."""
    return trained.average.applied(trained.parameters) if trained.average else nullcontext()


def save_deployable(folder: Path, pipeline: Any, *, is_lora: bool) -> None:
    """The student's denoiser weights as diffusers stores them; the LoRA file carries rank, alpha and targets."""
    denoiser, name = denoiser_of(pipeline), denoiser_name(pipeline)
    if not is_lora:
        denoiser.save_pretrained(folder / name)
        return
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser, adapter_name=STUDENT)
    metadata = denoiser.peft_config[STUDENT].to_dict()
    options = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(str(folder), **options)


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _optimizer_tensors(trained: Trained) -> dict[str, Tensor]:
    """Flat name -> tensor; parameters are named, so that an order of construction does not matter."""
    flat = {}
    for name, parameter in trained.parameters.items():
        for key, value in trained.optimizer.state.get(parameter, {}).items():
            flat[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    return flat or {"empty": torch.zeros(1)}


def _restore_optimizer(trained: Trained, flat: dict[str, Tensor]) -> None:
    for name, parameter in trained.parameters.items():
        found = {k.split("|", 1)[1]: v for k, v in flat.items() if k.startswith(f"{name}|")}
        if found:
            state = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
            trained.optimizer.state[parameter] = state


def _fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor], folder: Path) -> None:
    if set(parameters) != set(values) or any(parameters[n].shape != v.shape for n, v in values.items()):
        raise UserError(
            f"{folder}: its parameters do not fit this student (other rank, targets or architecture). "
            "Resume with the recipe that made it, or start in another output_dir."
        )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _on_devices(values: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(like[name].device) for name, value in values.items()}
