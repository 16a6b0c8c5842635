"""The prompts of a run, encoded and stored before its denoiser is loaded.

Text encoders and denoiser are then never in memory together: of large models either takes most of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from diffopd.blueprint import NOT_IN_TRAINING, build_component, read_blueprint
from diffopd.drive import Call
from diffopd.embeddings import PromptEmbeddings, cache_folder, text_encoders
from diffopd.load import load_pipeline
from diffopd.parts import DENOISERS
from diffopd.processes import Processes

Asked = tuple[Mapping[str, Any], Sequence[str]]  # the arguments of a call, and prompts that it will be made with


def encode_ahead(pipeline: Any, asked: Iterable[Asked], processes: Processes) -> PromptEmbeddings:
    """Store what these calls ask the encoders for, shared among processes; then the encoders leave the pipeline.

    Raises UserError for a pipeline whose answers cannot be stored.
    """
    cache = PromptEmbeddings(pipeline, cache_folder())
    cache.attach(pipeline)
    for arguments, prompts in asked:
        different = list(dict.fromkeys(prompts))
        for index in processes.rows(len(different)):
            cache.fill(Call(pipeline, dict(arguments)), different[index : index + 1])
    processes.wait()
    cache.close()
    pipeline.register_modules(**dict.fromkeys(text_encoders(pipeline)))
    return cache


def load_encoders(name: str, dtypes: Any, quantization: Any, device: str) -> Any:
    """The base's pipeline with its text encoders on the device, and of its denoisers the shapes alone.

    A call of it gets as far as its first network evaluation (`run_to_denoiser`). dtypes and quantization: as
    `load_pipeline` takes them. Raises UserError as `load_pipeline` does.
    """
    base = read_blueprint(name)
    width = dtypes["default"] if isinstance(dtypes, dict) else dtypes
    shapes = {d: build_component(base.classes[d], base.configs[d]).to(width) for d in DENOISERS if d in base.configs}
    pipeline = load_pipeline(name, dtypes, quantization, leave_out=NOT_IN_TRAINING, given=shapes)
    for encoder in text_encoders(pipeline).values():
        encoder.requires_grad_(False).to(device)
    stock = type(pipeline)
    there = property(lambda self: torch.device(device))  # else "meta", or the CPU that the VAE stays on
    as_stock = {"_execution_device": there, "device": there, "__module__": stock.__module__}
    pipeline.__class__ = type(stock.__name__, (stock,), as_stock)
    return pipeline
