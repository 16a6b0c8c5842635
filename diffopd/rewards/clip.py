"""Rewards of CLIP's kind, through transformers: agreement with the prompt, human preference, aesthetics.

A model is a hub id or a folder in transformers' layout with .safetensors weights; it is loaded when the reward is
made. They need nothing beyond a plain installation but the weights.
"""

from __future__ import annotations

from typing import Any

PLACES = (0, 2, 4, 6, 7)  # of its layers in the published state: dropouts stand between


class ClipScore:
    """Cosine of picture and prompt, in [-1, 1] (arXiv:2104.08718 without its factor 2.5 and its clip at 0).

    Raises OSError for a model that is neither a folder nor to be had from the hub.
    """

    packages: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("model", "processor", "head")
    needs: dict[str, str] = {}

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", processor: str | None = None, device: str | None = None
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._device = device or default_device()
        self._model = loaded(CLIPModel, model, use_safetensors=True).to(self._device).eval()
        self._processor = loaded(CLIPProcessor, processor or model)

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """(B,)."""
        pictures, texts = self._embed(images, prompts)
        return (pictures * texts).sum(1).cpu()

    def _embed(self, images: list[Any], prompts: list[str]) -> tuple[Any, Any]:
        """Unit vectors (B, D) of pictures and prompts; a prompt is cut at the model's length."""
        import torch

        pictures = [image.convert("RGB") for image in images]
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = self._processor(text=prompts, images=pictures, **options).to(self._device)
        with torch.no_grad():
            said = self._model(**inputs)
        return said.image_embeds.float(), said.text_embeds.float()


class PickScore(ClipScore):
    """PickScore (arXiv:2305.01569) over 26, as Flow-GRPO's reward: logit scale x cosine / 26, near .85.

    Published numbers (22.34) are this times 26.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
    ) -> None:
        super().__init__(model, processor, device)
        self._scale = float(self._model.logit_scale.detach().exp()) / 26

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """(B,)."""
        return self._scale * super().__call__(images, prompts, metadata)


class HPSv2(ClipScore):
    """Human Preference Score v2 (arXiv:2306.09341): the cosine under its CLIP ViT-H/14, near .28.

    model is required: the authors publish a pickled open_clip state only, which is never loaded here. Give a folder
    or hub id of its conversion to transformers' layout with .safetensors weights.
    """

    needs = {
        "model": "The authors publish pickled weights only, which are never loaded: give a folder or hub id of HPSv2 "
        "as a transformers CLIPModel with .safetensors weights."
    }

    def __init__(
        self, model: str, processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", device: str | None = None
    ) -> None:
        super().__init__(model, processor, device)


class Aesthetic(ClipScore):
    """LAION's aesthetic predictor v2 (sac+logos+ava1): a linear head on CLIP ViT-L/14, about 1 to 10.

    head is required: a .safetensors file of the published head's state (layers.0.weight, ...), whose .pth is pickled
    and never loaded here; docs/teach.md says how to convert it once.
    """

    needs = {"head": "It is a .safetensors file of the published head (docs/teach.md says how to convert it)."}

    def __init__(self, head: str, model: str = "openai/clip-vit-large-patch14", device: str | None = None) -> None:
        from torch import nn

        state = _head_state(head)
        super().__init__(model, device=device)
        layers = [nn.Linear(*reversed(state[f"layers.{place}.weight"].shape)) for place in PLACES]
        for layer, place in zip(layers, PLACES, strict=True):
            layer.load_state_dict({key: state[f"layers.{place}.{key}"].float() for key in ("weight", "bias")})
        self._head = nn.Sequential(*layers).to(self._device).eval()
        width, needed = layers[0].in_features, self._model.config.projection_dim
        if width != needed:
            raise ValueError(
                f"head {head} takes {width} features, {model} has {needed}. Take the model it was made on."
            )

    def __call__(self, images: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """(B,); the prompts do not matter."""
        import torch

        pictures, _ = self._embed(images, prompts)
        with torch.no_grad():
            return self._head(pictures)[:, 0].cpu()


def _head_state(head: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    if not head.endswith(".safetensors"):
        raise ValueError(f"head {head} is not a .safetensors file. Convert it once (docs/teach.md).")
    state = load_file(head)
    wanted = [f"layers.{place}.{key}" for place in PLACES for key in ("weight", "bias")]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"head {head} has no {missing[0]}. It must be the state of the published predictor.")
    return state


def loaded(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)`. Raises OSError that says how to get what is missing."""
    try:
        return kind.from_pretrained(name, **options)
    except OSError as error:
        raise OSError(
            f"{name} is no folder with a {kind.__name__} in safetensors, and the hub did not give it "
            f"({str(error).splitlines()[0]}). Download it first (hf download {name}), or name a folder."
        ) from error


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
