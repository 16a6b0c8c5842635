"""Holds exported files of a UNet student to ComfyUI, a client that is not diffusers: one network, number by number.

    python scripts/check_client.py FILE... --comfyui CHECKOUT --pipeline EXPORT/pipeline [--base BASE] [--json]

FILE: a single-file checkpoint, or a LoRA in any layout, of one export. ComfyUI's own code recognises the network, loads
the checkpoint, reads the LoRA's keys and patches the weights; what its network then predicts is compared with the UNet
of the exported diffusers folder. A LoRA goes onto --base, the folder (or shelf name) that the student began from.
CHECKOUT is a clone of ComfyUI; its packages (einops, torchsde, scipy, sentencepiece, ...) must be importable, in an
environment of their own. ComfyUI knows Stable Diffusion by its full size; for another size its class is told the width
and the number of heads, which is all that is told, and the widths must be whole multiples of the first (those of the
shipped base are not). Text encoder and VAE are not compared: ComfyUI has their sizes fixed.
Exit code 1: a prediction differs by more than 1e-3 of its size, or a key of the file was not used; 2: cannot be run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

PREFIX = "model.diffusion_model."
TOLERANCE = 1e-3  # of the prediction's largest value; another implementation sums in another order


class Unreadable(Exception):
    """Something that cannot be checked; says why."""


def import_comfyui(checkout: Path) -> Any:
    """ComfyUI's package `comfy` from a clone, on the CPU. Raises Unreadable where it does not import."""
    sys.path.insert(0, str(checkout))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.lora
        import comfy.model_detection
        import comfy.supported_models
        import comfy.utils
    except ImportError as error:
        raise Unreadable(f"{checkout}: ComfyUI cannot be imported ({error}). Install its packages.") from error
    return comfy


def network(comfy: Any, tensors: dict[str, torch.Tensor], like: Any) -> Any:
    """ComfyUI's model of a checkpoint's UNet, its weights loaded; `like`: the config of diffusers' UNet.

    Raises Unreadable for a network that ComfyUI does not recognise and tensors that it does not use.
    """
    found = comfy.model_detection.detect_unet_config(tensors, PREFIX)
    widths = [found["model_channels"] * times for times in found["channel_mult"]] if found else []
    if widths != list(like.block_out_channels):
        raise Unreadable(
            f"ComfyUI recognises a UNet of widths {widths}, the exported one has {list(like.block_out_channels)}: it "
            "knows whole multiples of the first width only."
        )
    num_heads = like.num_attention_heads or like.attention_head_dim

    class OfThisWidth(comfy.supported_models.SD15):
        unet_config = {key: found[key] for key in comfy.supported_models.SD15.unet_config}
        unet_extra_config = {"num_heads": num_heads, "num_head_channels": -1}

    config = OfThisWidth(found)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, PREFIX, device="cpu")
    own = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    missing, unused = model.diffusion_model.load_state_dict(own, strict=False)
    if missing or unused:
        raise Unreadable(f"ComfyUI's network misses {missing[:2]} and does not use {unused[:2]}.")
    return model


def patch(comfy: Any, model: Any, lora: dict[str, torch.Tensor]) -> list[str]:
    """Put a LoRA into the model's weights as ComfyUI does; returns the keys of the file that it does not know."""
    weights, used = model.state_dict(), set()
    names = comfy.lora.model_lora_keys_unet(model, {})
    for key, adapter in comfy.lora.load_lora(dict(lora), names, log_missing=False).items():
        used |= set(adapter.loaded_keys)
        weights[key].copy_(comfy.lora.calculate_weight([(1.0, adapter, 1.0, None, None)], weights[key].clone(), key))
    return sorted(set(lora) - used)


@torch.no_grad()
def predictions(model: Any, unet: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What ComfyUI's network and diffusers' UNet say of the same two inputs: noise, timesteps 999 and 250, context."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    sample = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    context = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([999, 250])
    theirs = model.diffusion_model(sample, timesteps=timesteps, context=context)
    return theirs, unet(sample, timesteps, context).sample


def check_file(comfy: Any, file: Path, unet: torch.nn.Module, base: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """What ComfyUI makes of one file: kind, unused keys, largest difference in units of the prediction's size."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    is_checkpoint = any(key.startswith(PREFIX) for key in tensors)
    if not is_checkpoint and base is None:
        raise Unreadable(f"{file}: is a LoRA. Give --base, the pipeline that it goes onto.")
    model = network(comfy, tensors if is_checkpoint else dict(base), unet.config)
    unused = [] if is_checkpoint else patch(comfy, model, tensors)
    theirs, ours = predictions(model, unet)
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    kind = "checkpoint" if is_checkpoint else "lora"
    agrees = difference <= TOLERANCE and not unused
    return {"file": str(file), "kind": kind, "unused": len(unused), "difference": difference, "agrees": agrees}


def base_weights(base: str) -> dict[str, torch.Tensor]:
    """The base as a single-file checkpoint holds it."""
    from safetensors.torch import load_file

    from diffopd.load import load_pipeline
    from diffopd.single_file import write_single_file

    with tempfile.TemporaryDirectory() as folder:
        return load_file(write_single_file(load_pipeline(base), Path(folder) / "base.safetensors"))


def main(
    files: Annotated[list[Path], typer.Argument(help="Single-file checkpoints and LoRA files of one export.")],
    comfyui: Annotated[Path, typer.Option(help="A clone of ComfyUI.")],
    pipeline: Annotated[Path, typer.Option(help="The exported diffusers folder that all files must equal.")],
    base: Annotated[str | None, typer.Option(help="What a LoRA goes onto: a folder or a shelf name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare exported files with the exported folder, as ComfyUI reads them."""
    try:
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", local_files_only=True).eval()
        weights = base_weights(base) if base else None
        comfy = import_comfyui(comfyui)  # after diffusers: a checkout may shadow packages that it probes for
        rows = [check_file(comfy, file, unet, weights) for file in files]
    except Unreadable as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps({"client": "ComfyUI", "tolerance": TOLERANCE, "files": rows}))
    else:
        for row in rows:
            verdict = "agrees" if row["agrees"] else f"DIFFERS ({row['unused']} keys not used)"
            typer.echo(f"{row['kind']:<10} {row['difference']:.1e}  {verdict}  {row['file']}")
    if not all(row["agrees"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
