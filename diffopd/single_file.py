"""Checkpoints of one file: a Stable Diffusion pipeline's weights under the names of the original (LDM) implementation.

The inverse of what diffusers' `from_single_file` does, for SD 1.x (one CLIP text encoder) and SDXL (CLIP and OpenCLIP).
Configs and scheduler are not in such a file: clients know them by the family, or are told.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopd.errors import UserError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
FAMILIES = {  # pipeline class -> component -> prefix in the file; the conversion is chosen by the component
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model.transformer."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def single_file_weights(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1.x or XL pipeline by their names in a single-file checkpoint.

    Raises UserError for other pipelines, and for parts that the original implementation has no name for.
    """
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        raise UserError(
            f"A single-file checkpoint can be written for {', '.join(FAMILIES)}, not for {kind}. Take the formats "
            "diffusers and lora."
        )
    _refuse_other_parts(pipeline, kind)
    unet = pipeline.unet
    found = _renamed(unet.state_dict(), lambda key: UNET + unet_name(key, unet.config.layers_per_block))
    found |= _vae(pipeline.vae)
    for component, prefix in FAMILIES[kind].items():
        convert = open_clip_weights if component == "text_encoder_2" else _clip
        found |= {prefix + key: value for key, value in convert(getattr(pipeline, component).state_dict()).items()}
    return {key: value.detach().contiguous().clone() for key, value in found.items()}


def _refuse_other_parts(pipeline: Any, kind: str) -> None:
    """Raise UserError for a pipeline of the class that has other parts than the family: SD 2.x, SDXL's refiner."""
    other = [f"it has no {component}" for component in FAMILIES[kind] if getattr(pipeline, component) is None]
    if kind == "StableDiffusionPipeline" and not other:
        act, linear = pipeline.text_encoder.config.hidden_act, pipeline.unet.config.use_linear_projection
        other += [f"its text encoder is OpenCLIP's (hidden_act {act})"] if act != "quick_gelu" else []
        other += ["its UNet has use_linear_projection"] if linear else []
    if other:
        raise UserError(
            f"A single-file checkpoint is written under the names of SD 1.x or SDXL, and this {kind} is neither: "
            f"{' and '.join(other)}. Clients would read it as another model. Take the formats diffusers and lora."
        )


def unet_name(key: str, layers_per_block: int) -> str:
    """A tensor of UNet2DConditionModel by its name in LDM's UNet. Raises UserError where it has none."""
    module, _, tensor = key.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{tensor}"
    if found := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    ):
        side, level, part, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        per_level = layers_per_block + 1
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.op.{rest.removeprefix('conv.')}"
        if side == "down":
            return f"input_blocks.{1 + level * per_level + index}.{_inner(part, rest)}"
        if part == "upsamplers":  # its place depends on whether an attention stands before it
            return f"output_blocks.{level * per_level + layers_per_block}.UPSAMPLE.{rest}"
        return f"output_blocks.{level * per_level + index}.{_inner(part, rest)}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
        place = 2 * int(found[2]) if found[1] == "resnets" else 1
        return f"middle_block.{place}.{_inner(found[1], found[3]).partition('.')[2]}"
    raise UserError(f"The UNet's {key} has no name in a single-file checkpoint. Take the format diffusers.")


def _inner(part: str, rest: str) -> str:
    """What stands inside a block: 0 is its residual layer, 1 its attention."""
    if part == "attentions":
        return f"1.{rest}"
    module, _, tensor = rest.rpartition(".")
    return f"0.{RESNET[module]}.{tensor}"


def _renamed(weights: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    named = {rename(key): value for key, value in weights.items()}
    if len(named) != len(weights):
        raise UserError("Two tensors would have one name in a single-file checkpoint. Take the format diffusers.")
    return {_placed(key, named): value for key, value in named.items()}


def _placed(key: str, named: dict[str, Tensor]) -> str:
    """An upsampler is the last layer of its block: the second, or the third where there is attention."""
    block, found, rest = key.partition(".UPSAMPLE.")
    if not found:
        return key
    has_attention = any(other.startswith(f"{block}.1.") for other in named)
    return f"{block}.{2 if has_attention else 1}.{rest}"


def _vae(vae: Any) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    found = {}
    for key, value in vae.state_dict().items():
        name = vae_name(key, levels)
        is_projection = ".attn_1." in name and value.ndim == 2  # LDM's are convolutions of one pixel
        found[VAE + name] = value[:, :, None, None] if is_projection else value
    return found


def vae_name(key: str, levels: int) -> str:
    """A tensor of AutoencoderKL by its name in LDM's autoencoder of `levels` levels."""
    name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        name = f"{found[1]}mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    return name


def _clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPTextModel's names with the `text_model.` that newer transformers leave out."""
    return {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in weights.items()}


def open_clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPTextModelWithProjection's tensors as OpenCLIP has them: q, k and v in one, the projection transposed."""
    plain = {key.removeprefix("text_model."): value for key, value in weights.items()}
    found = {}
    for key, value in plain.items():
        if key == "text_projection.weight":
            found["text_projection"] = value.T
        elif in_one := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", key):
            parts = [plain[f"{in_one[1]}self_attn.{part}_proj.{in_one[2]}"] for part in "qkv"]
            found[_open_clip_name(f"{in_one[1]}attn.in_proj_{in_one[2]}")] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj\.", key):
            found[_open_clip_name(key)] = value
    return found


def _open_clip_name(key: str) -> str:
    name = key.replace("encoder.layers.", "transformer.resblocks.")
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def write_single_file(pipeline: Any, file: Path) -> Path:
    """Write the pipeline's weights as one .safetensors; what a client must be told stands in its metadata.

    Raises UserError as `single_file_weights`.
    """
    from safetensors.torch import save_file

    prediction = {"v_prediction": "v", "epsilon": "epsilon"}.get(pipeline.scheduler.config.get("prediction_type"))
    metadata = {"format": "pt"} | ({"modelspec.prediction_type": prediction} if prediction else {})
    weights = single_file_weights(pipeline)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata=metadata)
    return file


__all__ = ["open_clip_weights", "single_file_weights", "unet_name", "vae_name", "write_single_file"]
