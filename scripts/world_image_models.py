"""The image path of the embedded world, untrained: an image encoder and an IP-Adapter of stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from world_models import world

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
WEIGHTS = "ip-adapter.safetensors"


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    """(..., 48, 48, 3) uint8 to (..., 3, 48, 48), as CLIPImageProcessor gives it."""
    mean, std = MEAN.to(pictures.device), STD.to(pictures.device)
    return ((pictures.float() / 255 - mean) / std).movedim(-1, -3)


def build_image_encoder() -> nn.Module:
    """A CLIPVisionModelWithProjection of 0.7 million weights: 36 patches of 8 pixels and the class token.

    Stock adapters of hidden states read the last but one layer, so three of its four layers are seen by the denoiser.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=world.SIZE,
        patch_size=8, projection_dim=64, hidden_act="gelu",
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if "position_embedding" in name:  # at CLIP's 0.02 they drown beside the patches
            nn.init.normal_(parameter, std=0.3)
    return encoder


def open_frozen(pipeline: Path) -> Any:
    """A stock pipeline in float32 whose networks stand still."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    return pipe


def adapter_weights(unet: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """An untrained adapter of all hidden states ("full"), in the keys of its file.

    Keys begin as the text's, values at zero: at first a picture changes nothing.
    """
    width, state = unet.config.cross_attention_dim, {}
    layers = {"proj.0": nn.Linear(width, width), "proj.2": nn.Linear(width, width), "proj.3": nn.LayerNorm(width)}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value.detach() for key, value in layer.named_parameters()}
    attention, modules = {}, dict(unet.named_modules())
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = modules[name.removesuffix(".processor")]
            attention[f"{number}.to_k_ip.weight"] = layer.to_k.weight.detach().clone()
            attention[f"{number}.to_v_ip.weight"] = torch.zeros_like(layer.to_v.weight)
    return {"image_proj": state, "ip_adapter": attention}


class ImagePath(nn.Module):
    """A pipeline with image encoder and adapter loaded by stock code; `trained` holds what the training moves.

    `begin_from` is a folder of `save_image_path`. With `denoiser` the denoiser's own weights are moved as well.
    """

    def __init__(self, pipe: Any, *, begin_from: Path | None = None, denoiser: bool = False) -> None:
        super().__init__()
        if begin_from is None:
            pipe.register_modules(image_encoder=build_image_encoder(), feature_extractor=None)
            pipe.load_ip_adapter(adapter_weights(pipe.unet), subfolder="", weight_name="")
        else:
            pipe.load_ip_adapter(str(begin_from), subfolder="", weight_name=WEIGHTS)
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        processors = [p for p in pipe.unet.attn_processors.values() if isinstance(p, nn.Module)]
        parts = {"encoder": pipe.image_encoder, "projection": pipe.unet.encoder_hid_proj}
        parts |= {"attention": nn.ModuleList(processors)} | ({"denoiser": pipe.unet} if denoiser else {})
        self.trained = nn.ModuleDict(parts)
        self.trained.requires_grad_(True).train()

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, 37, 128) for the adapter, and pooled features (B, 64), of normalised pictures."""
        seen = self.trained["encoder"](pictures, output_hidden_states=True)
        return seen.hidden_states[-2], seen.image_embeds

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """The denoiser's answer with pictures in view, or without the adapter at all where hidden is None."""
        for processor in self.trained["attention"]:
            processor.scale = [0.0 if hidden is None else 1.0]  # stock code skips an adapter of no weight
        told = self.text_encoder(tokens)[0]
        shown = told[:, :1] if hidden is None else hidden
        return self.unet(noisy, timesteps, told, added_cond_kwargs={"image_embeds": [shown[:, None]]}).sample


def save_image_path(model: ImagePath, folder: Path) -> None:
    """Writes image_encoder/ and ip-adapter.safetensors in fp16, as `load_ip_adapter` reads them."""
    from copy import deepcopy

    from safetensors.torch import save_file

    deepcopy(model.trained["encoder"]).half().save_pretrained(folder / "image_encoder")
    (projection,) = model.trained["projection"].image_projection_layers
    names = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"}
    state = {}
    for key, value in projection.state_dict().items():
        layer, _, kind = key.rpartition(".")
        state[f"image_proj.{names[layer]}.{kind}"] = value
    for number, processor in enumerate(model.unet.attn_processors.values()):
        if isinstance(processor, nn.Module):
            state[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            state[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    halves = {key: value.detach().half().contiguous() for key, value in state.items()}
    save_file(halves, folder / WEIGHTS, metadata={"format": "pt"})
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
