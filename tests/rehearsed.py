"""Tiny configs of every pipeline family whose call can be rehearsed, and the real pipelines that they make."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffopd.adapters import freeze
from diffopd.blueprint import Blueprint, read_blueprint

KL = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4}
KL |= {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
KL2 = KL | {"_class_name": "AutoencoderKLFlux2"}
DEEP = {"_class_name": "AutoencoderDC", "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
DEEP |= {"latent_channels": 4, "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1]}
DEEP |= {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "encoder_qkv_multiscales": [[], []]}
DEEP |= {"decoder_qkv_multiscales": [[], []], "attention_head_dim": 4}
VIDEO = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
VIDEO |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DYNAMIC = FLOW | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing"}
LCM = DDIM | {"_class_name": "LCMScheduler"}
UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4}
UNET |= {"layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4}
UNET |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
UNET |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
SD3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 8, "in_channels": 4, "out_channels": 4, **HEADS}
SD3 |= {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 64}
PACKED = {"in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 16, **HEADS}
FLUX = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [2, 2, 4], "pooled_projection_dim": 16, **PACKED}
FLUX2 = {"_class_name": "Flux2Transformer2DModel", "axes_dims_rope": [2, 2, 2, 2], **PACKED}
CHROMA = {"_class_name": "ChromaTransformer2DModel", "axes_dims_rope": [2, 2, 4], **PACKED}
CHROMA |= {"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16}
Z_IMAGE = {"_class_name": "ZImageTransformer2DModel", "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1}
Z_IMAGE |= {"n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [2, 2, 4], "axes_lens": [64, 32, 32]}
QWEN = {"_class_name": "QwenImageTransformer2DModel", "in_channels": 16, "out_channels": 4, **HEADS}
QWEN |= {"joint_attention_dim": 16, "axes_dims_rope": [2, 2, 4]}
SANA = {"_class_name": "SanaTransformer2DModel", "in_channels": 4, "out_channels": 4, **HEADS, "sample_size": 8}
SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
SANA |= {"cross_attention_dim": 16, "caption_channels": 16}
SPRINT = SANA | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1.0}
PIXART = {"_class_name": "PixArtTransformer2DModel", "in_channels": 4, "out_channels": 8, **HEADS, "sample_size": 8}
PIXART |= {"cross_attention_dim": 16, "caption_channels": 16}
LUMINA = {"_class_name": "Lumina2Transformer2DModel", "in_channels": 4, "hidden_size": 16, "num_layers": 2}
LUMINA |= {"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "cap_feat_dim": 16}
LUMINA |= {"axes_dim_rope": [2, 2, 4], "axes_lens": [64, 32, 32], "sample_size": 8, "multiple_of": 16}
WAN = {"_class_name": "WanTransformer3DModel", "in_channels": 4, "out_channels": 4, **HEADS}
WAN |= {"ffn_dim": 16, "text_dim": 16, "freq_dim": 8, "rope_max_seq_len": 32}
SIZE = {"height": 16, "width": 16}

Configs = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]
# name -> pipeline class, denoiser, autoencoder, scheduler, settings of model_index.json
FAMILIES: dict[str, Configs] = {
    "sd": ("StableDiffusionPipeline", UNET, KL, DDIM, {}),
    "sdxl": ("StableDiffusionXLPipeline", UNET | SDXL, KL, DDIM, {}),
    "lcm": ("LatentConsistencyModelPipeline", UNET | {"time_cond_proj_dim": 8}, KL, LCM, {}),
    "sd3": ("StableDiffusion3Pipeline", SD3, KL, FLOW, {}),
    "flux": ("FluxPipeline", FLUX | {"guidance_embeds": True}, KL, DYNAMIC, {}),
    "flux2": ("Flux2Pipeline", FLUX2, KL2, DYNAMIC, {}),
    "klein": ("Flux2KleinPipeline", FLUX2 | {"guidance_embeds": False}, KL2, DYNAMIC, {"is_distilled": False}),
    "klein distilled": ("Flux2KleinPipeline", FLUX2 | {"guidance_embeds": False}, KL2, DYNAMIC, {"is_distilled": True}),
    "chroma": ("ChromaPipeline", CHROMA, KL, FLOW, {}),
    "z-image": ("ZImagePipeline", Z_IMAGE, KL, FLOW, {}),
    "qwen": ("QwenImagePipeline", QWEN, VIDEO | {"_class_name": "AutoencoderKLQwenImage"}, DYNAMIC, {}),
    "sana": ("SanaPipeline", SANA, DEEP, FLOW, {}),
    "sana sprint": ("SanaSprintPipeline", SPRINT, DEEP, {"_class_name": "SCMScheduler"}, {}),
    "pixart": ("PixArtSigmaPipeline", PIXART, KL, {"_class_name": "DPMSolverMultistepScheduler"}, {}),
    "lumina": ("Lumina2Pipeline", LUMINA, KL, FLOW, {}),
    "wan": ("WanPipeline", WAN, VIDEO | {"_class_name": "AutoencoderKLWan"}, FLOW, {}),
}


def blueprint(name: str, folder: Path) -> Blueprint:
    """The family's configs, written to a folder and read back."""
    kind, denoiser, vae, scheduler, options = FAMILIES[name]
    component = "unet" if kind in UNETS else "transformer"
    held = {component: denoiser, "vae": vae, "scheduler": scheduler}
    index = {"_class_name": kind, **options}
    index |= {part: ["diffusers", config["_class_name"]] for part, config in held.items()}
    for part, config in held.items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return read_blueprint(str(folder))


UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")


def model(config: dict[str, Any]) -> nn.Module:
    """A random model of a config; parameters that the library leaves uninitialised are zero."""
    torch.manual_seed(0)
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    for name, parameter in made.named_parameters():
        if name.endswith("pad_token"):
            nn.init.zeros_(parameter)
    return made


def pipeline(name: str) -> Any:
    """The family's stock pipeline with random weights and without text encoders, frozen."""
    class_name, denoiser, vae, scheduler, options = FAMILIES[name]
    kind = getattr(diffusers, class_name)
    init = inspect.signature(kind.__init__).parameters
    needed = [key for key, p in init.items() if p.default is inspect.Parameter.empty and key != "self"]
    component = "unet" if class_name in UNETS else "transformer"
    held = {component: model(denoiser), "vae": model(vae)}
    held["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    options = {**options, **({"requires_safety_checker": False} if "requires_safety_checker" in init else {})}
    made = kind(**{**dict.fromkeys(needed), **held, **options})
    made.set_progress_bar_config(disable=True)
    freeze(made)
    return made
