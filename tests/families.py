"""One table of pipeline families: a tiny random instance of each, what its call is told, and its forms of guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from family_parts import (
    LENGTH,
    WIDTH,
    clip_encoder,
    deep_vae,
    flux2_vae,
    gemma_encoder,
    image_vae,
    mistral_encoder,
    qwen3_encoder,
    qwen_vl_encoder,
    shifted_vae,
    t5_encoder,
    video_vae,
)
from torch import nn

from diffopd.adapters import freeze

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SIZE = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 32}
PLAIN = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": LENGTH}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NEGATIVE = {"negative_prompt": "grey noise"}


@dataclass(frozen=True)
class Row:
    """One family: how to build it, what its call is told, and each form of guidance as call arguments.

    forms: the first is the form without guidance (or the only one); embedded: the value goes into the network.
    rounding: the relative distance that is to be expected between bf16 and fp32 weights, dozens of roundings to 8 bits.
    refusal: what the driver says, as a pattern, where it cannot be taught.
    targets: layers for LoRA, none where its denoiser takes no adapters. note: what a user should know.
    """

    name: str
    build: Callable[[], Any]
    forms: Mapping[str, Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=lambda: SIZE)
    targets: tuple[str, ...] = ATTENTION
    steps: int = 2
    rounding: float = 0.1
    refusal: str = ""
    note: str = ""


def unet(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": WIDTH, **options},
    )


def stable_diffusion(prediction_type: str = "epsilon", **options: Any) -> Any:
    tokenizer, text_encoder = clip_encoder()
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False, **options)
    return diffusers.StableDiffusionPipeline(
        image_vae(), text_encoder, tokenizer, unet(), scheduler, None, None, requires_safety_checker=False
    )


def latent_consistency() -> Any:
    tokenizer, text_encoder = clip_encoder()
    scheduler = diffusers.LCMScheduler(**{**BETAS, "steps_offset": 0})
    denoiser = unet(time_cond_proj_dim=8)
    return diffusers.LatentConsistencyModelPipeline(
        image_vae(), text_encoder, tokenizer, denoiser, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl() -> Any:
    tokenizer, text_encoder = clip_encoder()
    tokenizer_2, text_encoder_2 = clip_encoder(projected=True)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
    denoiser = unet(cross_attention_dim=2 * WIDTH, projection_class_embeddings_input_dim=WIDTH + 6 * 4, **added)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        image_vae(), text_encoder, text_encoder_2, tokenizer, tokenizer_2, denoiser, scheduler, add_watermarker=False
    )


def stable_diffusion_3() -> Any:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip_encoder(projected=True), clip_encoder(projected=True)
    tokenizer_3, encoder_3 = t5_encoder(width=2 * WIDTH)  # the CLIP halves are padded to this width
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        denoiser,
        FlowScheduler(shift=3.0),
        shifted_vae(),
        encoder,
        tokenizer,
        encoder_2,
        tokenizer_2,
        encoder_3,
        tokenizer_3,
    )


def flux() -> Any:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip_encoder(), t5_encoder()
    denoiser = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        FlowScheduler(shift=3.0, **DYNAMIC), shifted_vae(), encoder, tokenizer, encoder_2, tokenizer_2, denoiser
    )


def flux_2_transformer(layers: int, guidance_embeds: bool) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=layers * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def flux_2() -> Any:
    tokenizer, encoder = mistral_encoder()
    return diffusers.Flux2Pipeline(
        FlowScheduler(shift=3.0, **DYNAMIC), flux2_vae(), encoder, tokenizer, flux_2_transformer(2, True)
    )


def flux_2_klein() -> Any:
    tokenizer, encoder = qwen3_encoder(headed=True)
    return diffusers.Flux2KleinPipeline(
        FlowScheduler(shift=3.0, **DYNAMIC), flux2_vae(), encoder, tokenizer, flux_2_transformer(2, False)
    )


def chroma() -> Any:
    tokenizer, encoder = t5_encoder()
    denoiser = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(FlowScheduler(shift=3.0), shifted_vae(), encoder, tokenizer, denoiser)


def z_image() -> Any:
    tokenizer, encoder = qwen3_encoder(headed=False)
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 32, 32],
    )
    for token in (denoiser.x_pad_token, denoiser.cap_pad_token):  # left uninitialised in a fresh model
        nn.init.normal_(token)
    return diffusers.ZImagePipeline(FlowScheduler(shift=3.0), shifted_vae(), encoder, tokenizer, denoiser)


def qwen_image() -> Any:
    tokenizer, encoder = qwen_vl_encoder()
    denoiser = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        FlowScheduler(shift=1.0, **DYNAMIC), video_vae("AutoencoderKLQwenImage"), encoder, tokenizer, denoiser
    )


def sana_transformer(**options: Any) -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        **options,
    )


def sana() -> Any:
    tokenizer, encoder = gemma_encoder()
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    return diffusers.SanaPipeline(tokenizer, encoder, deep_vae(), sana_transformer(), scheduler)


def sana_sprint() -> Any:
    tokenizer, encoder = gemma_encoder()
    denoiser = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintPipeline(tokenizer, encoder, deep_vae(), denoiser, diffusers.SCMScheduler())


def pixart_sigma() -> Any:
    tokenizer, encoder = t5_encoder()
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return diffusers.PixArtSigmaPipeline(tokenizer, encoder, image_vae(), denoiser, scheduler)


def lumina_2() -> Any:
    tokenizer, encoder = gemma_encoder()
    denoiser = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(denoiser, FlowScheduler(shift=3.0), shifted_vae(), encoder, tokenizer)


def wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )


def wan(**options: Any) -> Any:
    tokenizer, encoder = t5_encoder("UMT5")
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    vae = video_vae("AutoencoderKLWan")
    return diffusers.WanPipeline(tokenizer, encoder, vae, scheduler, wan_transformer(), **options)


NONE, GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 3.0, **NEGATIVE}
BY_CAT = {"none": NONE, "one call, concatenated": GUIDED}
BY_TWO = {"none": NONE, "two calls": GUIDED}
LONG = {**SIZE, "max_sequence_length": LENGTH}
ROWS = [
    Row("StableDiffusion", stable_diffusion, BY_CAT),
    Row("StableDiffusion (v)", lambda: stable_diffusion("v_prediction"), BY_CAT),
    Row("StableDiffusion (zero-SNR v)", lambda: stable_diffusion("v_prediction", **ZERO_SNR), BY_CAT),
    Row("StableDiffusionXL", stable_diffusion_xl, BY_CAT),
    Row("LatentConsistencyModel", latent_consistency, {"embedded": {"guidance_scale": 8.5}}),
    Row("StableDiffusion3", stable_diffusion_3, BY_CAT, LONG),
    Row(
        "Flux",
        flux,
        {
            "embedded": {"guidance_scale": 3.5},
            "embedded and two calls": {"guidance_scale": 3.5, "true_cfg_scale": 3.0, **NEGATIVE},
        },
        LONG,
        rounding=0.3,
    ),
    Row(
        "Flux2",
        flux_2,
        {"embedded": {"guidance_scale": 4.0}},
        {**LONG, "text_encoder_out_layers": (1, 2)},
    ),
    Row(
        "Flux2Klein",
        flux_2_klein,
        {"none": {"guidance_scale": 1.0}, "two calls": {"guidance_scale": 3.0}},
        {**LONG, "text_encoder_out_layers": (1, 2)},
    ),
    Row("Chroma", chroma, BY_TWO, LONG, rounding=0.3, note="no gradient checkpointing: diffusers drops a mask"),
    Row(
        "ZImage",
        z_image,
        {"none": {"guidance_scale": 0.0}, "pos + w (pos - neg)": {"guidance_scale": 2.0, **NEGATIVE}},
        LONG,
        note="guidance_scale = 0 is off; 1 already guides",
    ),
    Row(
        "QwenImage",
        qwen_image,
        {"none": {"true_cfg_scale": 1.0}, "two calls, norm rescaled": {"true_cfg_scale": 3.0, **NEGATIVE}},
        LARGER,
        note="guidance is true_cfg_scale with a negative_prompt",
    ),
    Row("Sana", sana, BY_CAT, {**LARGER, **PLAIN, "complex_human_instruction": None}, steps=3),
    Row(
        "SanaSprint",
        sana_sprint,
        {"embedded": {"guidance_scale": 4.5}},
        {**LARGER, **PLAIN, "complex_human_instruction": None},
        steps=3,
        note="in 2 steps its grid is one of its own, which has no substeps",
    ),
    Row(
        "PixArtSigma",
        pixart_sigma,
        BY_CAT,
        {**SIZE, **PLAIN},
        targets=(),
        steps=3,
        note="takes no adapters in diffusers: teach and train it in full",
    ),
    Row("Lumina2", lumina_2, BY_TWO, {**LARGER, "max_sequence_length": 2 * LENGTH, "system_prompt": "draw"}),
    Row("Wan", wan, BY_TWO, {**LONG, **LARGER, "num_frames": 5}, steps=3, note="video"),
]
FAMILIES: dict[str, Row] = {row.name: row for row in ROWS}
TWO_EXPERTS = Row(
    "Wan (two experts)",
    lambda: wan(transformer_2=wan_transformer(), boundary_ratio=0.9),
    BY_TWO,
    {**LONG, **LARGER, "num_frames": 5},
    steps=3,
    refusal="one of its two denoisers",
    note="only the first of its two denoisers would be trained, so low-noise states have no gradient; it can teach",
)
REFUSED: dict[str, Row] = {TWO_EXPERTS.name: TWO_EXPERTS}


def build(name: str, seed: int = 0) -> Any:
    """A fresh frozen pipeline of the family, its random weights a function of `seed`; the progress bar is off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = {**FAMILIES, **REFUSED}[name].build()
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    return pipeline
