"""Random tiny pipelines without text encoders, with a student and a teacher adapter, for engine tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffopd.adapters import STUDENT, AdapterSwitch, add_adapter, freeze
from diffopd.drive import Call, denoiser_of, shell

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
VP_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**BETAS, "clip_sample": False}),
    "ddim zero-SNR v": ("DDIMScheduler", {**BETAS, **ZERO_SNR, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {**BETAS, "clip_sample": False}),
    "lcm": ("LCMScheduler", BETAS),
    "pndm": ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", BETAS),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS),
    "heun": ("HeunDiscreteScheduler", BETAS),
    "kdpm2": ("KDPM2DiscreteScheduler", BETAS),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", BETAS),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ singlestep": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", BETAS),
    "deis": ("DEISMultistepScheduler", BETAS),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0, "steps_offset": 1}
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow euler re-noised": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "flow dpm++ 2m": ("DPMSolverMultistepScheduler", FLOW),
    "flow unipc": ("UniPCMultistepScheduler", FLOW),
}
SCHEDULERS = {**VP_SCHEDULERS, **FLOW_SCHEDULERS}
CHANNELS, SIZE, WIDTH = 4, 8, 16


def scheduler_named(name: str, **override: Any) -> Any:
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind)(**{**options, **override})


def pipeline_with(scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen stock pipeline that takes prompt embeddings: SD3 where the scheduler is the flow one's, else SD."""
    torch.manual_seed(0)
    is_sd3 = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    pipeline = (_sd3_pipeline if is_sd3 else _sd_pipeline)(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    return pipeline.to(dtype=dtype)


def _vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)


def _sd3_pipeline(scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIZE,
    )
    texts = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=_vae(), scheduler=scheduler, **texts)


def _sd_pipeline(scheduler: Any) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        unet=unet,
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def draws(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def arguments(batch: int = 3, steps: int = 4, guidance_scale: float = 1.0, pipeline: Any = None) -> dict[str, Any]:
    """What a call of `pipeline` (the SD one where None is given) is told."""
    generator = torch.Generator().manual_seed(5)
    pooled = {}
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        pooled = {name: draws(batch, 9)[:, :, :2, :2].flatten(1) for name in POOLED}
        pooled |= {"height": SIZE, "width": SIZE}
    return {
        **pooled,
        "prompt_embeds": torch.randn(batch, 5, WIDTH, generator=generator),
        "negative_prompt_embeds": torch.randn(batch, 5, WIDTH, generator=generator),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "latents": draws(batch, 7),
        "output_type": "latent",
    }


@dataclass
class Cast:
    pipeline: Any
    student: Call
    teacher: Call
    itself: Call
    parameters: dict[str, nn.Parameter]
    teacher_parameters: dict[str, nn.Parameter]
    switch: AdapterSwitch

    def gradient(self) -> Tensor:
        """All student gradients, flat, and forget them."""
        flat = torch.cat([p.grad.flatten() for p in self.parameters.values()])
        for parameter in self.parameters.values():
            parameter.grad = None
        return flat


def cast_for(scheduler: Any, *, batch: int = 3, steps: int = 4, teacher_guidance: float = 3.0) -> Cast:
    """Student and teacher LoRA on one trunk; `itself` is the student's adapter in a teacher's place."""
    pipeline = pipeline_with(scheduler)
    denoiser, targets = denoiser_of(pipeline), ["to_q", "to_v", "conv1"]
    teacher_parameters = add_adapter(denoiser, "teacher", rank=4, lora_alpha=4, target_modules=targets)
    parameters = add_adapter(denoiser, STUDENT, rank=4, lora_alpha=8, target_modules=targets)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in teacher_parameters.values():
            parameter.requires_grad_(False).copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for parameter in parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    switch = AdapterSwitch(denoiser)
    switch.select(STUDENT)
    told = arguments(batch, steps, pipeline=pipeline)
    return Cast(
        pipeline,
        Call(pipeline, told),
        Call(shell(pipeline), {**told, "guidance_scale": teacher_guidance}, lambda: switch.bound("teacher")),
        Call(shell(pipeline), told, lambda: switch.bound(STUDENT)),
        parameters,
        teacher_parameters,
        switch,
    )
