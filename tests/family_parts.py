"""Tiny random parts of stock pipelines, built offline: real tokenizer classes over bytes, text encoders, VAEs."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tiny import build_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 16  # of every text encoder
LENGTH = 24  # of every padded prompt
CHAT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] if m['content'] is string else "
CHAT += "m['content'][0]['text'] }}{% endif %}{% endfor %}<|im_end|>"


def qwen_tokenizer() -> Any:
    """Qwen2's byte-level BPE without merges; its chat template keeps the user's words alone."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: index for index, word in enumerate([*bytes_to_unicode().values(), *specials])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def t5_tokenizer() -> Any:
    """T5's unigram model whose pieces are the printable ASCII characters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def gemma_tokenizer() -> Any:
    """Gemma's BPE that falls back to bytes for everything."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{code:02X}>" for code in range(256))]
    vocab = {word: index for index, word in enumerate(words)}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=512)


def clip_encoder(*, projected: bool = False) -> tuple[Any, Any]:
    """(CLIP tokenizer, CLIP text model of two layers), with a projection where asked."""
    tokenizer = build_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return tokenizer, kind(config)


def t5_encoder(kind: str = "T5", width: int = WIDTH) -> tuple[Any, Any]:
    """(T5 tokenizer, T5 or UMT5 encoder)."""
    tokenizer = t5_tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, getattr(transformers, f"{kind}EncoderModel")(config)


def _decoder(tokenizer: Any, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3_encoder(*, headed: bool) -> tuple[Any, Any]:
    """(Qwen2 tokenizer, Qwen3 of three layers), with its language head where the pipeline wants one."""
    tokenizer = qwen_tokenizer()
    kind = transformers.Qwen3ForCausalLM if headed else transformers.Qwen3Model
    return tokenizer, kind(transformers.Qwen3Config(**_decoder(tokenizer, 3)))


def gemma_encoder() -> tuple[Any, Any]:
    """(Gemma tokenizer, Gemma2 of two layers)."""
    tokenizer = gemma_tokenizer()
    return tokenizer, transformers.Gemma2Model(transformers.Gemma2Config(**_decoder(tokenizer, 2)))


def qwen_vl_encoder() -> tuple[Any, Any]:
    """(Qwen2 tokenizer, Qwen2.5-VL of one text layer and one vision layer)."""
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_decoder(tokenizer, 1), "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
        | {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0], "window_size": 56},
    )
    return tokenizer, transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral_encoder() -> tuple[Any, Any]:
    """(a byte tokenizer with a chat template, Mistral 3 of three text layers and one vision layer)."""
    tokenizer = qwen_tokenizer()
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_decoder(tokenizer, 3)},
        vision_config={"model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": WIDTH}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8},
        image_token_index=10,
    )
    return tokenizer, transformers.Mistral3ForConditionalGeneration(config)


def image_vae(channels: int = 4, **options: Any) -> Any:
    """An AutoencoderKL that halves the picture."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def shifted_vae(channels: int = 4) -> Any:
    """`image_vae` as the flow families have it: with a shift and without quantisation convolutions."""
    return image_vae(channels, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def flux2_vae() -> Any:
    """FLUX.2's autoencoder with batch statistics of patched latents, which halves the picture."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def video_vae(kind: str) -> Any:
    """Qwen-Image's or Wan's causal video autoencoder, of three halvings."""
    options = {"temperal_downsample": [False, True, True], "latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}
    return getattr(diffusers, kind)(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **options)


def deep_vae() -> Any:
    """Sana's deep compression autoencoder, of two halvings."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    )
