"""The stock models of the embedded world, untrained."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "teachers"))

import world  # noqa: E402


def build_vae() -> torch.nn.Module:
    """An AutoencoderKL of 1.1 million weights: a 48 x 48 picture becomes 4 x 12 x 12 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32,
        mid_block_add_attention=False, sample_size=world.SIZE,
    )  # fmt: skip


def byte_alphabet() -> dict[int, str]:
    """CLIP's printable stand-in for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def merge_word(symbols: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge first."""
    while True:
        pairs = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in merges]
        if not pairs:
            return symbols
        best, merged, index = min(pairs, key=merges.__getitem__), [], 0
        while index < len(symbols):
            is_pair = tuple(symbols[index : index + 2]) == best
            merged.append("".join(best) if is_pair else symbols[index])
            index += 2 if is_pair else 1
        symbols = merged


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token and leave three-letter sign words almost all in single letters.

    Each word starts from one pair of letters; few such pairs, shared by many words, are chosen, since only
    they can join letters of a sign's word. All later merges extend what is already joined.
    """
    symbols = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    inner = {word: set(zip(parts, parts[1:], strict=False)) for word, parts in symbols.items()}
    left, merges = set(words), {}
    while left:
        counts = {pair: sum(pair in inner[word] for word in left) for word in left for pair in inner[word]}
        pair = max(sorted(counts), key=counts.__getitem__)
        merges[pair] = len(merges)
        left -= {word for word in left if pair in inner[word]}
    for word in words:
        while len(parts := merge_word(symbols[word], merges)) > 1:
            start = next(n for n, part in enumerate(parts) if len(part.removesuffix("</w>")) > 1)
            start = min(start, len(parts) - 2)
            merges[parts[start], parts[start + 1]] = len(merges)
    return list(merges)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, built there first if there is none (weights belong to one vocabulary)."""
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists():
        build_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer of about 700 tokens, written to `folder` with vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(0)
    texts = [text for task in world.TASKS for _ in range(3000) for text in plain_captions(task, rng)]
    words = sorted({word for text in texts for word in text.split() if len(word) > 1})
    merges = learn_merges(words)
    letters = list(byte_alphabet().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def plain_captions(task: str, rng: np.random.Generator) -> list[str]:
    """Captions of one scene without the sign's word."""
    scene = world.sample_scene(task, rng)
    return [text.replace(scene.get("word", "\0"), "").strip() for text in world.training_captions(task, scene)]


def build_text_encoder(tokenizer: Any) -> torch.nn.Module:
    """A CLIPTextModel of 0.6 million weights.

    Its embeddings start at unit size: at CLIP's 0.02 the blocks' outputs drown a token's identity, and letters were
    not used at all after 180,000 pictures.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter)
    return encoder


def build_unet() -> torch.nn.Module:
    """A UNet2DConditionModel of 5.6 million weights for 4 x 12 x 12 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=12, block_out_channels=(64, 96, 128), layers_per_block=1, cross_attention_dim=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=32,
    )  # fmt: skip


def build_scheduler() -> Any:
    """The shipped scheduler: v prediction, zero terminal signal, trailing grid."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip


class Base(torch.nn.Module):
    """The jointly trained part: text encoder and denoiser."""

    def __init__(self, text_encoder: torch.nn.Module, unet: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample


LORA_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv",
    "conv_shortcut", "time_emb_proj", "conv_in", "conv_out",
)  # fmt: skip


def add_lora(unet: torch.nn.Module, rank: int) -> None:
    """Adds a trainable adapter to convolutions and attention of the denoiser."""
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_LAYERS), init_lora_weights="gaussian")
    )
