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
from diffopd.blueprint import read_json, without_weights
from diffopd.dialects import read_lora
from diffopd.drive import denoiser_name, denoiser_of, shell
from diffopd.errors import UserError
from diffopd.locate import find_pipeline
from diffopd.run_folder import RunFolder
from diffopd.teacher import TeacherCard, weight_files

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

LORA_FILE = "pytorch_lora_weights.safetensors"


def load_pipeline(
    name: str,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    quantization: Any = None,
    *,
    leave_out: Collection[str] = (),
    given: Mapping[str, nn.Module] | None = None,
) -> Any:
    """A stock pipeline by shelf name, folder or hub id, from safetensors, progress bar off.

    dtype: one for all components, or by component name with a "default". quantization: a config of diffusers.
    leave_out: components that the pipeline can do without, where it has them. given: components that are not loaded.

    Raises UserError where it cannot be found or has pickled weights only.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    folder = find_pipeline(name)
    with _quiet():
        try:
            options = {"quantization_config": quantization} if quantization else {}
            options |= _without(folder, leave_out) | dict(given or {})
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot be loaded as a diffusers pipeline: {error}{_lacking(folder)}") from error
        except (ImportError, RuntimeError, ValueError) as error:
            if quantization:
                raise UserError(f"{folder}: cannot be quantized here: {_first_lines(error)}") from error
            if not isinstance(error, ImportError):
                raise
            raise UserError(f"{folder}: needs a package that is not installed: {_first_lines(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _lacking(folder: Path) -> str:
    """What a folder has no weights for, if anything, and why there may be some all the same."""
    lacking = ", ".join(without_weights(folder))
    if not lacking:
        return ""
    return (
        f" There are no .safetensors that are loaded for {lacking}: pickled weights and variants (such as fp16) are "
        "never taken, nor downloaded. Load such a pipeline with diffusers, and give the folder of its save_pretrained."
    )


def _without(folder: Path, components: Collection[str]) -> dict[str, Any]:
    """What `from_pretrained` is told so that it leaves out components that a folder has."""
    index = read_json(folder / "model_index.json")
    told: dict[str, Any] = {name: None for name in components if index.get(name, [None])[0]}
    if "safety_checker" in told and "requires_safety_checker" in index:
        told["requires_safety_checker"] = False  # else diffusers warns of its absence at each copy of the pipeline
    return told


def load_lora(pipeline: Any, source: TeacherCard | str, adapter_name: str) -> None:
    """Put a LoRA on the pipeline's denoiser as a frozen adapter; its layout may be any that `dialects` reads.

    source: a teacher's card, or a .safetensors file or folder. Where alpha stands in the file's own tensors it is
    multiplied into the second matrix, so the adapter then has lora_alpha = rank. Raises UserError when a tensor of
    the file is not used or the file has none for the denoiser: the result would be the base itself.
    """
    path = source.weights_path() if isinstance(source, TeacherCard) else Path(source)
    files = weight_files(path)
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .safetensors files. Name the one of the LoRA.")
    denoiser = denoiser_of(pipeline)
    if not hasattr(denoiser, "load_lora_adapter"):
        raise UserError(f"{files[0]}: diffusers puts no LoRA on {type(denoiser).__name__}. Take a full checkpoint.")
    with _quiet():
        lora = read_lora(files[0], pipeline)
        try:
            denoiser.load_lora_adapter(lora.tensors(), prefix=None, adapter_name=adapter_name, metadata=lora.config)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{files[0]}: does not fit the base as a LoRA: {_first_lines(error)}") from error
    loaded = adapter_parameters(denoiser, adapter_name)
    for parameter in loaded.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, denoiser.dtype))
        parameter.requires_grad_(False)
    if len(loaded) != 2 * len(lora.layers):
        raise UserError(
            f"{files[0]}: {2 * len(lora.layers)} tensors in the file, {len(loaded)} used on the "
            f"{denoiser_name(pipeline)}. Its config names other layers than its tensors; save it anew."
        )


def load_full_denoiser(base: Any, card: TeacherCard) -> nn.Module:
    """A teacher's own denoiser, as `load_denoiser`."""
    return load_denoiser(base, card.weights_path())


def load_denoiser(base: Any, path: Path) -> nn.Module:
    """A denoiser of the base's class and dtype; weights without a config.json have the base's shape.

    The base must carry no adapter yet. Raises UserError where the weights do not fit.
    """
    from safetensors import SafetensorError

    kind = type(denoiser_of(base))
    try:
        if not (path / "config.json").is_file():
            return _with_weights(copy.deepcopy(denoiser_of(base)), path)
        with _quiet():
            return kind.from_pretrained(path, dtype=denoiser_of(base).dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
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
    pipeline = student_with_adapter(run_dir, step)
    if RunFolder.open(run_dir).recipe().student.train == "lora":
        fuse_adapter(pipeline)
    return pipeline


def student_with_adapter(run_dir: Path, step: int | None = None) -> Any:
    """As `student_pipeline`, but a LoRA student's adapter is still beside the base's weights."""
    from diffopd.assemble import with_scheduler

    folder = RunFolder.open(run_dir)
    recipe = folder.recipe()
    checkpoint = checkpoint_of(folder, step)
    pipeline = with_scheduler(load_pipeline(recipe.student.pretrained_model_name_or_path), recipe)
    if recipe.student.train == "lora":
        load_lora(pipeline, str(checkpoint / LORA_FILE), "default")
    else:
        name = denoiser_name(pipeline)
        trained = type(denoiser_of(pipeline)).from_pretrained(checkpoint / name, use_safetensors=True)
        pipeline.register_modules(**{name: trained})
    return pipeline


def checkpoint_of(folder: RunFolder, step: int | None = None) -> Path:
    """A run's checkpoint-N, the latest by default. Raises UserError where the run has none."""
    checkpoint = folder.path / f"checkpoint-{step}" if step is not None else folder.latest_checkpoint()
    if checkpoint is None or not checkpoint.is_dir():
        raise UserError(f"{folder.path}: has no {checkpoint.name if checkpoint else 'checkpoint'}. Train it first.")
    return checkpoint


def fuse_adapter(pipeline: Any) -> None:
    """The pipeline's adapter goes into its denoiser's weights."""
    denoiser = denoiser_of(pipeline)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    for parameter in denoiser.parameters():  # as a reload has them: strides choose the kernels
        parameter.data = parameter.data.contiguous().clone()


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
