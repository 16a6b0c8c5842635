"""Prompt embeddings on disk: a stock pipeline's own `encode_prompt`, asked once for each prompt.

`encode_prompt` differs from class to class, so it is wrapped on the pipeline object and known by its bound arguments
alone. Each prompt is encoded by itself and stored as its own file; the negative prompt is encoded once, whatever
prompts it stands beside. A key is a hash of text encoders (weights, dtype, device), tokenizers, pipeline class,
options, library versions, text and all other arguments, so a stored tensor is always what the encoder would say.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffopd.checkpoint import flush
from diffopd.drive import Call, denoisers_of, replaced_forward
from diffopd.errors import UserError

ENCODERS = ("text_encoder", "tokenizer", "processor")  # how the parts of a pipeline that read prompts are named
GUIDED = "do_classifier_free_guidance"
IRRELEVANT = ("device", "num_images_per_prompt", "num_videos_per_prompt")


def cache_folder() -> Path:
    """Where embeddings are kept for all runs: $DIFFOPD_CACHE, else diffopd in the user's cache folder."""
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DIFFOPD_CACHE") or general / "diffopd") / "prompt_embeds"


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders by component name."""
    return {k: m for k, m in pipeline.components.items() if k.startswith(ENCODERS) and isinstance(m, nn.Module)}


class PromptEmbeddings:
    """The cache of one base; `attach` puts it on every pipeline over that base. `encoded` counts encoder calls.

    `close` says that the encoders are gone: a prompt that is not stored is then refused.
    """

    def __init__(self, pipeline: Any, folder: Path) -> None:
        self.folder = folder
        self.encoded = 0
        self._encoders = fingerprint(pipeline)
        self._closed = False
        self._is_split_checked = False
        folder.mkdir(parents=True, exist_ok=True)

    def attach(self, pipeline: Any) -> None:
        """Let the pipeline's calls take their prompts from here."""
        original = pipeline.encode_prompt
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            told = _bound(signature, args, kwargs)
            rows = _rows(told)
            if rows is None:
                if self._closed and not _has_embeddings(told):
                    raise UserError("A prompt that is not a text cannot be encoded: the text encoders were released.")
                return original(**told)
            device = told.get("device") or pipeline._execution_device
            return _on(device, _stacked([self._row(original, row) for row in rows]))

        pipeline.encode_prompt = encode_prompt

    def fill(self, call: Call, prompts: Iterable[str]) -> None:
        """Store all that this call would ask the encoders for, prompt by prompt; no denoiser runs."""
        for prompt in prompts:
            run_to_denoiser(call.prompted([prompt]))

    def close(self) -> None:
        """The encoders are gone from now on."""
        self._closed = True

    def _row(self, original: Callable[..., Any], row: dict[str, Any]) -> Any:
        if not row.get(GUIDED):
            return self._entry(original, row)
        positive = self._entry(original, _without_negative(row))
        answer = _merged(positive, self._entry(original, _negative_alone(row)))
        if not self._is_split_checked and not self._closed:
            _refuse_other(answer, self._ask(original, row))
            self._is_split_checked = True
        return answer

    def _entry(self, original: Callable[..., Any], row: dict[str, Any]) -> Any:
        """What is stored, on the CPU like all other rows; what is not, or is damaged, is encoded and stored first."""
        file = self.folder / f"{self._key(original, row)}.safetensors"
        if file.is_file():
            try:
                return _read(file)
            except SafetensorError as error:
                warnings.warn(f"{file}: is damaged ({error}); its prompt is encoded anew.", stacklevel=2)
        if self._closed:
            raise UserError(
                f"Prompt {row.get('prompt')!r} is not stored in {self.folder}, and the text encoders were "
                'released. Set train.text_encoders = "cached" or "resident".'
            )
        _write(file, self._ask(original, row))
        return _read(file)

    def _ask(self, original: Callable[..., Any], row: dict[str, Any]) -> Any:
        self.encoded += 1
        with torch.no_grad():
            return original(**{k: list(v) if isinstance(v, list) else v for k, v in row.items()})  # some write into it

    def _key(self, original: Callable[..., Any], row: dict[str, Any]) -> str:
        told = {name: value for name, value in row.items() if name not in IRRELEVANT}
        owner = original.__self__
        options = {k: v for k, v in owner.config.items() if isinstance(v, (bool, int, float)) or v is None}
        said = [type(owner).__name__, options, str(owner._execution_device).split(":")[0], self._encoders, told]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class _Reached(Exception):
    """A call has come to its denoiser."""


def run_to_denoiser(call: Call) -> None:
    """Run a pipeline call up to its first network evaluation, which does not happen: its prompts are encoded then."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached

    entry = inspect.unwrap(type(call.pipeline).__call__)
    with ExitStack() as stack, torch.no_grad():
        for denoiser in denoisers_of(call.pipeline):
            stack.enter_context(replaced_forward(denoiser, stop))
        try:
            entry(call.pipeline, **call.arguments)
        except _Reached:
            return
    raise RuntimeError(f"{type(call.pipeline).__name__} ended without asking its denoiser.")


def fingerprint(pipeline: Any) -> str:
    """sha256 of all that turns a text into embeddings: encoders' weights and configs, tokenizers, library versions."""
    import diffusers
    import transformers

    digest = hashlib.sha256(f"{diffusers.__version__} {transformers.__version__}".encode())
    for name, component in sorted(pipeline.components.items()):
        if not name.startswith(ENCODERS) or component is None:
            continue
        digest.update(name.encode())
        if isinstance(component, nn.Module):
            digest.update(component.config.to_json_string().encode())
            for key, tensor in component.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            _add_files(digest, component)
    return digest.hexdigest()


def _add_files(digest: Any, tokenizer: Any) -> None:
    """What a tokenizer or processor saves says all it does."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument by name, defaults included."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    told = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            told |= told.pop(parameter.name)
    return told


def _is_prompt(name: str) -> bool:
    return name.startswith(("prompt", "negative_prompt"))


def _has_embeddings(told: dict[str, Any]) -> bool:
    return any(isinstance(value, (Tensor, list)) and "embeds" in name for name, value in told.items())


def _rows(told: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The arguments of each prompt by itself; None where something is not text, numbers or their lists."""
    prompts = [told["prompt"]] if isinstance(told.get("prompt"), str) else told.get("prompt")
    count = told.get("num_images_per_prompt", told.get("num_videos_per_prompt", 1))
    if not isinstance(prompts, list) or count != 1:
        return None
    kept = {name: value for name, value in told.items() if name not in IRRELEVANT}
    try:
        json.dumps(kept)
    except TypeError:
        return None
    return [
        {name: _own(name, value, index, len(prompts)) for name, value in told.items()} for index in range(len(prompts))
    ]


def _own(name: str, value: Any, index: int, count: int) -> Any:
    """Prompt number `index` as a list of one, everything else as it is."""
    if not _is_prompt(name):
        return value
    if isinstance(value, str):
        return [value]
    return [value[index]] if isinstance(value, list) and len(value) == count else value


def _without_negative(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if k.startswith("negative_prompt") else v for k, v in row.items()} | {GUIDED: False}


def _negative_alone(row: dict[str, Any]) -> dict[str, Any]:
    """The call whose negative half is this row's, whatever the prompt."""
    plain = {k: row.get(f"negative_{k}") for k in row if k.startswith("prompt")}
    return row | plain | {"prompt": row.get("negative_prompt") or [""]}


def _merged(positive: Any, negative: Any) -> Any:
    """The slots that a call without guidance leaves empty come from the call for the negative prompt."""
    return [n if _is_empty(p) else p for p, n in zip(positive, negative, strict=True)]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and not value)


def _refuse_other(merged: Any, direct: Any) -> None:
    if not _same(merged, list(direct)):
        raise UserError(
            "This pipeline encodes a prompt otherwise apart from its negative prompt, so neither can be cached. "
            'Set train.text_encoders = "resident".'
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is None and b is None


def _stacked(answers: list[Any]) -> Any:
    """Answers of single prompts as one answer of a batch."""
    first = answers[0]
    if isinstance(first, Tensor):
        return _stacked_tensors(answers)
    if first is None:
        if any(answer is not None for answer in answers):
            raise UserError(LENGTHS)
        return None
    return tuple(_stacked_slot([answer[slot] for answer in answers]) for slot in range(len(first)))


def _stacked_slot(values: list[Any]) -> Any:
    if isinstance(values[0], (list, tuple)):  # one tensor a prompt, of its own length
        return [tensor for value in values for tensor in value]
    return _stacked(values)


def _stacked_tensors(tensors: list[Tensor]) -> Tensor:
    if tensors[0].shape[0] != 1:  # not a row of a batch: position ids that all prompts share
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise UserError(LENGTHS)
        return tensors[0]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise UserError(LENGTHS)
    return torch.cat(tensors)


LENGTHS = (
    "This pipeline pads the prompts of a batch to the longest of them, which embeddings that were stored one by one do "
    'not know. Set train.batch_size = 1 (and train.gradient_accumulation_steps), or train.text_encoders = "resident".'
)


def _on(device: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_on(device, item) for item in value) if isinstance(value, (list, tuple)) else value


def _write(file: Path, answer: Any) -> None:
    """A file of its own name first, then a rename: processes that start together never see half of one."""
    tensors: dict[str, Tensor] = {}
    form = json.dumps(_flattened(answer, "0", tensors))
    temporary = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.partial")
    save_file(tensors, temporary, metadata={"form": form})
    flush(temporary)  # else a crash may leave the name with nothing behind it
    os.replace(temporary, file)


def _flattened(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Names in the place of tensors, which go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return name
    if isinstance(value, (list, tuple)):
        return [_flattened(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None:
        return None
    raise UserError(
        f"This pipeline's encode_prompt also returns a {type(value).__name__}, which cannot be cached. Set "
        'train.text_encoders = "resident".'
    )


def _read(file: Path) -> Any:
    with safe_open(file, "pt") as opened:
        return _filled(json.loads(opened.metadata()["form"]), opened)


def _filled(form: Any, opened: Any) -> Any:
    if isinstance(form, list):
        return [_filled(item, opened) for item in form]
    return None if form is None else opened.get_tensor(form)
