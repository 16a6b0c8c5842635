"""Builders of tiny random worlds: a stock pipeline, a teacher folder and a recipe, in milliseconds and offline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

TASK_PROMPTS = {
    "train": ("a red dot", "a blue dot", "two red dots", "a green line"),
    "test": ("a dot", "a line"),
}
REWARD = '''"""A trivial reward."""


def brightness(images, prompts, metadata):
    """Mean brightness of each picture, in [0, 1]."""
    return [sum(image.convert("L").tobytes()) / (255.0 * image.width * image.height) for image in images]
'''


def build_tokenizer():
    """A CLIP tokenizer whose vocabulary is the byte alphabet."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def build_pipeline(*, seed: int = 0, prediction_type: str = "v_prediction", in_channels: int = 4, cross: int = 16):
    """A random stock StableDiffusionPipeline on 8 x 8 latents (16 x 16 pixels), trailing zero-SNR DDIM."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=cross,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=in_channels,
            norm_num_groups=8,
            sample_size=16,
        )
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=cross,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction_type != "epsilon",
        steps_offset=1,
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for module in (unet, vae, text_encoder):
        module.eval()
    return pipeline


def save_pipeline(folder: Path, **options) -> Path:
    """`build_pipeline(**options)` saved as a safetensors folder."""
    build_pipeline(**options).save_pretrained(folder, safe_serialization=True)
    return folder


def load_pipeline(folder: Path):
    """A fresh pipeline object from a folder, progress bar off."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_lora(folder: Path, base: Path, *, seed: int, rank: int = 2, scale: float = 0.2) -> Path:
    """A random LoRA on the attention of the base's UNet, as stock diffusers saves it; returns the file."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def write_prompts(folder: Path, *, task: str | None = None) -> None:
    """prompts/train.jsonl and prompts/test.jsonl of a teacher folder."""
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for split, prompts in TASK_PROMPTS.items():
        rows = [{"prompt": prompt, "number": index} for index, prompt in enumerate(prompts)]
        rows = [row | {"task": task} for row in rows] if task else rows
        lines = [json.dumps(row) for row in rows]
        (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_teacher(
    folder: Path, base: Path | str, *, seed: int = 1, form: str = "lora", guidance_scale: float = 2.0
) -> Path:
    """A teacher folder: teacher.toml, weights (for lora and full), prompts and a reward; its name is the folder's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    lines = [f'name = "{folder.name}"', f'base = "{base}"', f'form = "{form}"']
    if form == "lora":
        file = save_lora(folder, Path(base), seed=seed)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        lines += [f'weights = "{file.name}"', f'sha256 = "{digest}"']
    if form == "full":
        build_pipeline(seed=seed).unet.save_pretrained(folder / "unet")
        lines += ['weights = "unet"']
    lines += [
        f"guidance_scale = {guidance_scale}",
        "num_inference_steps = 8",
        'reward = "reward.py:brightness"',
    ]
    lines += [
        'license = "CC0-1.0"',
        "",
        "[prompts]",
        'train = "prompts/train.jsonl"',
        'test = "prompts/test.jsonl"',
    ]
    (folder / "teacher.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def recipe_text(base: Path | str, teachers: list[Path], output_dir: Path, *, substeps: int = 1) -> str:
    """A recipe of two updates, two steps, batch two."""
    parts = [
        'name = "tiny"\nseed = 3',
        f'output_dir = "{output_dir}"',
        f'[student]\npretrained_model_name_or_path = "{base}"\ntrain = "lora"\nrank = 2\nlora_alpha = 4',
        "num_inference_steps = 2\nguidance_scale = 1.0",
        *(f'[[teachers]]\nname = "{teacher}"' for teacher in teachers),
        f'[objective]\nname = "mean"\nsubsteps = {substeps}',
        "[train]\nlearning_rate = 1e-3\nbatch_size = 2\nmax_train_steps = 2\ncheckpointing_steps = 1",
        "[evaluate]\nnum_prompts = 2\nbatch_size = 2\nseeds = [0]\nguidance_scales = [1.0, 2.0]",
    ]
    return "\n".join(parts) + "\n"


def write_recipe(path: Path, base: Path | str, teachers: list[Path], **options) -> Path:
    """`recipe_text` in a file; runs go to a folder beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(base, teachers, path.parent / "run", **options), encoding="utf-8")
    return path
