"""What a teacher sees beyond the student's text: a picture or a richer caption, as further arguments of its call.

D-OPSD (arXiv:2605.05204): the teacher is the model itself under a richer context, held at the student's states. Which
context a pipeline can take is a table; the heavy part of one (an IP-Adapter) is in `image_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from diffopd.data import PromptRow
from diffopd.errors import UserError
from diffopd.image_file import picture
from diffopd.settings import Settings

if TYPE_CHECKING:
    from diffopd.drive import Call

Kind = Literal["reference_image", "ip_adapter", "image_prompt", "enhanced_prompt"]
KEEP_THE_SUBJECT = "Keep the subject, the background and the composition of the reference image."
OR_CAPTIONS = (
    'Or do without a picture: kind = "enhanced_prompt", with a richer caption of each ("enhanced_text" in '
    "metadata.jsonl)."
)
# Pipeline class -> how it sees a picture in its own call.
SEES: dict[str, Kind] = {
    "Flux2KleinPipeline": "reference_image",
    "Flux2Pipeline": "reference_image",
    "StableDiffusionPipeline": "ip_adapter",
    "StableDiffusionXLPipeline": "ip_adapter",
    "LatentConsistencyModelPipeline": "ip_adapter",
    "ZImagePipeline": "image_prompt",
}
# Of these kinds, the key that names the network with which the picture is seen.
NETWORK: dict[Kind, str] = {"ip_adapter": "ip_adapter", "image_prompt": "vision_language"}
NEEDS_A_PICTURE = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "FluxKontextPipeline")


class ContextSettings(Settings):
    """The [context] of a teacher. ip_adapter: a .safetensors file, or a folder or hub folder that holds one.

    vision_language: the Qwen3-VL (a folder or hub id) that reads pictures with the pipeline's own language weights.
    """

    kind: Kind
    instruction: str | None = None
    ip_adapter: str | None = None
    image_encoder: str | None = None
    scale: float | None = Field(default=None, gt=0, le=2)  # of the IP-Adapter; None is 1
    vision_language: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ContextSettings:
        of_adapter = [key for key in ("image_encoder", "ip_adapter", "scale") if getattr(self, key) is not None]
        if self.kind != "ip_adapter" and of_adapter:
            raise ValueError(f'{of_adapter[0]} belongs to kind = "ip_adapter". Remove it or change the kind.')
        if self.kind == "ip_adapter" and not (self.ip_adapter and self.image_encoder):
            raise ValueError(
                'kind = "ip_adapter" needs ip_adapter = "its .safetensors file" and image_encoder = "the folder of its '
                'CLIP image encoder" (local or a hub id). For SD 1.5: ip_adapter = '
                '"h94/IP-Adapter/models/ip-adapter_sd15.safetensors", image_encoder = '
                '"h94/IP-Adapter/models/image_encoder"; for SDXL: "h94/IP-Adapter/sdxl_models/'
                f'ip-adapter_sdxl_vit-h.safetensors" with the same image encoder. {OR_CAPTIONS}'
            )
        if self.kind != "image_prompt" and self.vision_language is not None:
            raise ValueError('vision_language belongs to kind = "image_prompt". Remove it or change the kind.')
        if self.kind == "image_prompt" and not self.vision_language:
            raise ValueError(
                'kind = "image_prompt" needs vision_language = "a Qwen3-VL", a folder or hub id, as large as the text '
                f'encoder. For Z-Image: "Qwen/Qwen3-VL-4B-Instruct". {OR_CAPTIONS}'
            )
        if self.kind != "reference_image" and self.instruction is not None:
            raise ValueError('instruction belongs to kind = "reference_image". Remove it or change the kind.')
        return self


def own_adapter(folder: Path) -> dict[str, str]:
    """ip_adapter and image_encoder of a pipeline that comes with its own: ip-adapter*.safetensors, image_encoder/.

    Empty for any other folder, also for one with several adapters: which is meant is the user's to say.
    """
    files, encoder = list(folder.glob("ip-adapter*.safetensors")), folder / "image_encoder"
    if len(files) != 1 or not (encoder / "config.json").is_file():
        return {}
    return {"ip_adapter": str(files[0]), "image_encoder": str(encoder)}


class Context(Protocol):
    """What one side is told of a batch of rows. rows_per_call: at most so many in one call, None: no bound."""

    rows_per_call: int | None

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """One prompt a row."""

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """Further arguments of the pipeline's call for these rows."""

    def covers(self, row: PromptRow) -> bool:
        """Whether the row holds what this context shows."""


@dataclass(frozen=True)
class TextOnly:
    """The prompts as they are."""

    rows_per_call: int | None = None

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """The rows' own prompts."""
        return [row.prompt for row in rows]

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """No further arguments."""
        return {}

    def covers(self, row: PromptRow) -> bool:
        """Always: it shows nothing but the prompt."""
        return True


@dataclass(frozen=True)
class Noised(TextOnly):
    """The prompts of rows whose pictures are noised, one row a call: each picture has a level of its own."""

    rows_per_call: int | None = 1

    def covers(self, row: PromptRow) -> bool:
        """Whether the row names a picture."""
        return covers("reference_image", row)


@dataclass(frozen=True)
class EnhancedPrompt:
    """A richer caption in the prompt's place (the row's "enhanced_prompt")."""

    rows_per_call: int | None = None

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """The rows' richer captions."""
        return [row.metadata["enhanced_prompt"] for row in rows]

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """No further arguments."""
        return {}

    def covers(self, row: PromptRow) -> bool:
        """Whether the row has a richer caption."""
        return covers("enhanced_prompt", row)


@dataclass(frozen=True)
class ReferenceImage:
    """The row's own picture as `image`, and after its prompt the instruction to keep what it shows.

    Stock pipelines show all pictures of a call to each of its prompts, so a call has one row.
    """

    instruction: str = KEEP_THE_SUBJECT
    rows_per_call: int | None = 1

    def prompts(self, rows: Sequence[PromptRow]) -> list[str]:
        """The prompt, then the instruction."""
        return [f"{row.prompt.rstrip(' .')}. {self.instruction}".removesuffix(". ") for row in rows]

    def arguments(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """image: the picture of the one row."""
        (row,) = rows
        return {"image": picture(row.metadata["file_name"], row.bucket)}

    def covers(self, row: PromptRow) -> bool:
        """Whether the row names a picture."""
        return covers("reference_image", row)


def covers(kind: Kind, row: PromptRow) -> bool:
    """Whether a row holds what a context of this kind shows."""
    return isinstance(row.metadata.get("enhanced_prompt" if kind == "enhanced_prompt" else "file_name"), str)


def in_context(call: Call, settings: ContextSettings, adapter: str | None, place: str) -> tuple[Call, Context]:
    """A teacher's call and what it is told of each row. adapter: the LoRA that answers on its side, None for none.

    Raises UserError for an IP-Adapter or a vision-language model that is missing or does not fit.
    """
    if settings.kind == "enhanced_prompt":
        return call, EnhancedPrompt()
    if settings.kind == "reference_image":
        return call, ReferenceImage(KEEP_THE_SUBJECT if settings.instruction is None else settings.instruction)
    if settings.kind == "image_prompt":
        from diffopd.image_prompt import with_image_prompt

        return with_image_prompt(call, settings, place)
    from diffopd.image_tokens import with_image_tokens

    return with_image_tokens(call, settings, adapter, place)


def choose_kind(pipeline_class: str, *, is_enhanced: bool, place: str) -> Kind:
    """The context for a pipeline: its own way to see a picture, else the second caption.

    is_enhanced: whether every picture has a richer caption. Raises UserError that explains the alternatives where
    there is neither.
    """
    if pipeline_class in SEES:
        return SEES[pipeline_class]
    if is_enhanced:
        return "enhanced_prompt"
    raise UserError(
        f"{place}: {pipeline_class} has no way to see a picture in its call, so its teacher would know no more than "
        'the student. Give every picture a richer caption ("enhanced_text" in metadata.jsonl), or tune a model whose '
        f"pipeline is one of {', '.join(SEES)}."
    )


def check_context(kind: Kind, pipeline_class: str, *, is_enhanced: bool, place: str) -> None:
    """Raise UserError for a context that pipeline or captions do not offer, and for a student that needs a picture."""
    if pipeline_class in NEEDS_A_PICTURE:
        raise UserError(
            f"{place}: {pipeline_class} needs a picture in every call, but a student is told text alone. Save its "
            "weights as the text-to-image pipeline of the same family, or tune another model."
        )
    if kind == "enhanced_prompt":
        if not is_enhanced:
            raise UserError(
                f'{place}: the teacher is to read richer captions, but not every picture has one. Add "enhanced_text" '
                "to every line of metadata.jsonl."
            )
    elif SEES.get(pipeline_class) != kind:
        fitting = [name for name, way in SEES.items() if way == kind]
        raise UserError(
            f"{place}: {pipeline_class} takes no {kind.replace('_', ' ')}. Pipelines that do: {', '.join(fitting)}. "
            f"Leave kind out to have it chosen{', or take enhanced_prompt' if is_enhanced else ''}."
        )
