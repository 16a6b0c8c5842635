"""Weights into stock pipelines: safetensors only, and never a silent no-op."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffopd.adapters import adapter_parameters
from diffopd.drive import denoiser_name, denoiser_of, shell
from diffopd.errors import UserError
from diffopd.locate import find_pipeline
from diffopd.run_folder import RunFolder
from diffopd.teacher import TeacherCard, weight_files

if TYPE_CHECKING:
    from collections.abc import Iterator

LORA_FILE = "pytorch_lora_weights.safetensors"


def load_pipeline(
    name: str, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32, quantization: Any = None
) -> Any:
    """A stock pipeline by shelf name, folder or hub id, from safetensors, progress bar off.

    dtype: one for all components, or by component name with a "default". quantization: a config of diffusers.

    Raises UserError where it cannot be found or has pickled weights only.
    """
    from diffusers import DiffusionPipeline

    folder = find_pipeline(name)
    with _quiet():
        try:
            options = {"quantization_config": quantization} if quantization else {}
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
        except OSError as error:
            raise UserError(f"{folder}: cannot be loaded as a diffusers pipeline: {error}") from error
        except (ImportError, RuntimeError, ValueError) as error:
            if quantization is None:
                raise
            raise UserError(f"{folder}: cannot be quantized here: {_first_lines(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora(pipeline: Any, source: TeacherCard | str, adapter_name: str) -> None:
    """Put a LoRA on the pipeline's denoiser as a frozen adapter, by diffusers' own loader; alpha is honoured.

    source: a teacher's card, or a .safetensors file or folder. Raises UserError when a tensor of the file is not
    used or the file has none for the denoiser: diffusers only warns, and the result would be the base itself.
    """
    path = source.weights_path() if isinstance(source, TeacherCard) else Path(source)
    files = weight_files(path)
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .safetensors files. Name the one of the LoRA.")
    with _quiet():
        try:
            pipeline.load_lora_weights(str(files[0].parent), weight_name=files[0].name, adapter_name=adapter_name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{files[0]}: does not fit the base as a LoRA: {_first_lines(error)}") from error
    denoiser = denoiser_of(pipeline)
    loaded = adapter_parameters(denoiser, adapter_name)
    for parameter in loaded.values():
        parameter.requires_grad_(False)
    _refuse_unused(files[0], len(loaded), denoiser_name(pipeline))


def load_full_denoiser(base: Any, card: TeacherCard) -> nn.Module:
    """A teacher's own denoiser, as `load_denoiser`."""
    return load_denoiser(base, card.weights_path())


def load_denoiser(base: Any, path: Path) -> nn.Module:
    """A denoiser of the base's class and dtype; weights without a config.json have the base's shape.

    The base must carry no adapter yet. Raises UserError where the weights do not fit.
    """
    kind = type(denoiser_of(base))
    try:
        if not (path / "config.json").is_file():
            return _with_weights(copy.deepcopy(denoiser_of(base)), path)
        with _quiet():
            return kind.from_pretrained(path, dtype=denoiser_of(base).dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded as {kind.__name__}: {_first_lines(error)}") from error


def _with_weights(denoiser: nn.Module, path: Path) -> nn.Module:
    """The denoiser with the tensors of a .safetensors file or folder, each used and none missing."""
    from safetensors.torch import load_file

    tensors = {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
    denoiser.load_state_dict(tensors, strict=True)
    return denoiser


def load_fused_denoiser(base: Any, card: TeacherCard) -> nn.Module:
    """A copy of the base's denoiser with a LoRA teacher fused into its weights: no adapter's cost at each forward.

    The base must carry no adapter yet. Raises UserError as `load_lora` does.
    """
    other = shell(base)
    other.register_modules(**{denoiser_name(base): copy.deepcopy(denoiser_of(base))})
    load_lora(other, card, adapter_name=card.name)
    fuse_adapter(other)
    return denoiser_of(other)


def student_pipeline(run_dir: Path, step: int | None = None) -> Any:
    """A run's student as a plain stock pipeline: adapter fused and unloaded, scheduler of the recipe.

    step: which checkpoint-N, the latest by default. Raises UserError where the run has none.
    """
    from diffopd.assemble import with_scheduler

    folder = RunFolder.open(run_dir)
    recipe = folder.recipe()
    checkpoint = folder.path / f"checkpoint-{step}" if step is not None else folder.latest_checkpoint()
    if checkpoint is None or not checkpoint.is_dir():
        raise UserError(f"{run_dir}: has no {checkpoint.name if checkpoint else 'checkpoint'}. Train it first.")
    pipeline = with_scheduler(load_pipeline(recipe.student.pretrained_model_name_or_path), recipe)
    if recipe.student.train == "lora":
        load_lora(pipeline, str(checkpoint / LORA_FILE), "default")
        fuse_adapter(pipeline)
    else:
        name = denoiser_name(pipeline)
        trained = type(denoiser_of(pipeline)).from_pretrained(checkpoint / name, use_safetensors=True)
        pipeline.register_modules(**{name: trained})
    return pipeline


def fuse_adapter(pipeline: Any) -> None:
    """The pipeline's adapter goes into its denoiser's weights."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for parameter in denoiser_of(pipeline).parameters():  # as a reload has them: strides choose the kernels
        parameter.data = parameter.data.contiguous().clone()


def _refuse_unused(file: Path, loaded: int, component: str) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        keys = [key for key in opened.keys() if not key.endswith(".alpha")]
    if len(keys) == loaded:
        return
    shown = ", ".join(keys[:2])
    raise UserError(
        f"{file}: {len(keys)} tensors in the file, {loaded} used on the {component}. Its keys begin with {shown}. "
        f"Save it with the pipeline's save_lora_weights ({component} layers only), or in a layout diffusers converts."
    )


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars and notes of the libraries off for a moment; errors still come as exceptions."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        of_diffusers.set_verbosity(before[0])
        of_transformers.set_verbosity(before[1])
