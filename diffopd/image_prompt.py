"""A prompt that holds a picture, for pipelines whose text encoder is the language half of a vision-language model.

D-OPSD's context for Z-Image (arXiv:2605.05204): Qwen3-VL, its language weights replaced by those of the pipeline's own
text encoder, reads one user turn of picture and caption. Without the picture it says what the text encoder says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffopd.context import ContextSettings, covers
from diffopd.data import PromptRow
from diffopd.drive import Call
from diffopd.errors import UserError
from diffopd.image_file import picture
from diffopd.locate import download, parse_hub_id

LAYER = -2  # of the hidden states, as the pipeline takes them
MOST_TOKENS = 1024  # of picture and caption together
LARGEST = 512 * 512  # pixels that are shown, so that the caption has room: 256 tokens of Qwen3-VL's
PICTURE = "<|vision_start|>{}<|vision_end|>"
PLACE = "<|image_pad|>"


class ImagePrompt:
    """Each row's own picture and prompt as prompt embeddings (tokens, D), computed once and kept on the CPU."""

    rows_per_call: int | None = None

    def __init__(self, encoder: Any, processor: Any, tokenizer: Any) -> None:
        self._encoder, self._processor, self._tokenizer = encoder, processor, tokenizer
        self._known: dict[tuple[str, str, Any], Tensor] = {}

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """The rows' own prompts."""
        return [row.prompt for row in rows]

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """prompt_embeds: one (tokens, D) a row."""
        return {"prompt_embeds": [self._embeds(row).to(self._encoder.device) for row in rows]}

    def covers(self, row: PromptRow) -> bool:
        """Whether the row names a picture."""
        return covers("image_prompt", row)

    def _embeds(self, row: PromptRow) -> Tensor:
        key = row.prompt, row.metadata["file_name"], row.bucket
        if key not in self._known:
            self._known[key] = self.encode(row.prompt, picture(row.metadata["file_name"], row.bucket)).cpu()
        return self._known[key]

    def encode(self, prompt: str, image: Image.Image | None) -> Tensor:
        """(tokens, D), at most 1,024 tokens: the caption's end is cut where there would be more."""
        shown, seen = "", {}
        if image is not None:
            seen = dict(self._processor(images=[_reduced(image)], return_tensors="pt"))
            count = int(seen["image_grid_thw"].prod()) // self._processor.merge_size**2
            shown = PICTURE.format(PLACE * count)
        turn = [{"role": "user", "content": shown + prompt}]
        text = self._tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        told = self._tokenizer([text], truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        told = {name: told[name] for name in ("input_ids", "attention_mask")} | seen
        if image is not None:
            told["mm_token_type_ids"] = (told["input_ids"] == self._encoder.config.image_token_id).int()
        told = {name: value.to(self._encoder.device) for name, value in told.items()}
        with torch.no_grad():
            return self._encoder(**told, output_hidden_states=True).hidden_states[LAYER][0]


def with_image_prompt(call: Call, settings: ContextSettings, place: str) -> tuple[Call, ImagePrompt]:
    """A teacher's call and the encoder of its pictures.

    Raises UserError for a vision-language model that is missing or whose language half is not the text encoder's shape.
    """
    from transformers import AutoImageProcessor

    folder, text_encoder = _folder(settings.vision_language), call.pipeline.text_encoder
    try:
        encoder = _reading(folder, text_encoder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"{place}: vision_language {settings.vision_language!r} cannot read for this pipeline's text encoder: "
            f"{line} "
            'Take the Qwen3-VL of its size, such as "Qwen/Qwen3-VL-4B-Instruct" for Z-Image.'
        ) from error
    tokenizer = call.pipeline.tokenizer
    if tokenizer.convert_tokens_to_ids(PLACE) != encoder.config.image_token_id:
        raise UserError(
            f"{place}: {PLACE} is not token {encoder.config.image_token_id} of the pipeline's tokenizer, so "
            f"{settings.vision_language!r} was made for another one. Take the Qwen3-VL of its family."
        )
    return call, ImagePrompt(encoder, processor, tokenizer)


def _reading(folder: Path, text_encoder: Any) -> Any:
    """The vision-language model whose language half is the text encoder's: weights (shared) and positions."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig.from_pretrained(folder)
    config.text_config.rope_parameters |= {"rope_theta": text_encoder.config.rope_parameters["rope_theta"]}
    config.text_config.rms_norm_eps = text_encoder.config.rms_norm_eps
    model = Qwen3VLModel.from_pretrained(folder, config=config, use_safetensors=True, dtype=text_encoder.dtype)
    language = getattr(text_encoder, "model", text_encoder)  # of one with a head, what is below it
    model.language_model.load_state_dict(language.state_dict(), assign=True)
    return model.to(text_encoder.device).eval().requires_grad_(False)


def _reduced(image: Image.Image) -> Image.Image:
    share = (LARGEST / (image.width * image.height)) ** 0.5
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.LANCZOS) if share < 1 else image


def _folder(spec: str) -> Path:
    local = Path(spec).expanduser()
    hub = None if local.exists() else parse_hub_id(spec)
    return download(hub, ["*.safetensors", "*.json"]) if hub else local
