"""Tiny random pipelines whose teachers see pictures, and a tiny IP-Adapter on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import build_tokenizer

from diffopd.data import PromptRow

CLIP_WIDTH = 8
PICTURE_PROMPTS = ("a red dot", "a blue dot", "a green dot", "a black dot")
COLORS = ("red", "blue", "green", "black")
# Keeps the user's words alone; FLUX.2's text encoder is a chat model.
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def draw_rows(folder: Path, sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 16))) -> list[PromptRow]:
    """Rows with a picture each, of (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, size in enumerate(sizes):
        file = folder / f"{number}.png"
        image = Image.new("RGB", size, COLORS[number])
        image.paste("white", (2 + number, 2, 8, 9))
        image.save(file)
        rows.append(PromptRow(PICTURE_PROMPTS[number], {"file_name": str(file)}))
    return rows


def save_ip_adapter(folder: Path, unet: Any, *, seed: int = 0) -> tuple[Path, Path]:
    """(file of a random IP-Adapter for this UNet, folder of a tiny CLIP image encoder)."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    cross, tensors = unet.config.cross_attention_dim, {}

    def tensor(name: str, *shape: int) -> None:
        tensors[name] = 0.5 * torch.randn(shape, generator=generator)

    tensor("image_proj.proj.weight", 4 * cross, CLIP_WIDTH)
    tensor("image_proj.proj.bias", 4 * cross)
    tensor("image_proj.norm.weight", cross)
    tensor("image_proj.norm.bias", cross)
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossed):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for kind in ("to_k_ip", "to_v_ip"):
            tensor(f"ip_adapter.{2 * number + 1}.{kind}.weight", width, cross)
    save_file(tensors, folder / "ip-adapter.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, projection_dim=CLIP_WIDTH, num_hidden_layers=1,
            num_attention_heads=2, image_size=16, patch_size=8,
        )  # fmt: skip
        CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return folder / "ip-adapter.safetensors", folder / "image_encoder"


def build_klein() -> Any:
    """A random stock Flux2KleinPipeline; its call needs text_encoder_out_layers = (1, 2)."""
    import diffusers
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=256)
    tokenizer.chat_template = CHAT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=3, head_dim=8,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
            )
        )  # fmt: skip
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = diffusers.Flux2KleinPipeline(scheduler, vae, encoder, tokenizer, transformer, is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_xl() -> Any:
    """A random stock StableDiffusionXLPipeline on 8 x 8 latents."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        encoders = {"text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler, **encoders
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
