"""A picture in the prompt of Z-Image's teacher: Qwen3-VL over the text encoder's own weights."""

import contexts
import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from family_parts import shifted_vae
from PIL import Image
from torch import nn
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffopd.adapters import freeze
from diffopd.context import ContextSettings, check_context, choose_kind, in_context
from diffopd.data import PromptRow
from diffopd.drive import Call, rollout, shell
from diffopd.errors import UserError
from diffopd.image_prompt import MOST_TOKENS, PLACE

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", PLACE]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "head_dim": 8}
LAYERS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def tokenizer():
    words = [*bytes_to_unicode().values(), *MARKS]
    made = Qwen2Tokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=2048)
    made.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def pipeline():
    words = tokenizer()
    torch.manual_seed(0)
    rope = {"rope_theta": 5e3, "rope_type": "default"}
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(words), rope_parameters=rope, **LAYERS))
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[2, 2, 4], axes_lens=[2048, 64, 64],
    )  # fmt: skip
    for token in (denoiser.x_pad_token, denoiser.cap_pad_token):  # left uninitialised in a fresh model
        nn.init.normal_(token)
    made = diffusers.ZImagePipeline(FlowScheduler(shift=3.0), shifted_vae(), encoder, words, denoiser)
    made.set_progress_bar_config(disable=True)
    freeze(made)
    return made


def save_qwen(folder, words, **text):
    """A random Qwen3-VL with other language weights and other positions than the pipeline's encoder."""
    torch.manual_seed(1)
    sections = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(words), "rope_parameters": sections, **LAYERS, **text},
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids(PLACE),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 2**20}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(pipeline, tmp_path_factory):
    folder = save_qwen(tmp_path_factory.mktemp("qwen"), pipeline.tokenizer)
    return ContextSettings(kind="image_prompt", vision_language=str(folder))


TOLD = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent", "height": 16, "width": 16}


def test_without_the_picture_teacher_and_student_are_told_the_same(pipeline, settings):
    """Bit for bit the same weights, the same positions and the same layer, although the checkpoint's are others."""
    _, context = in_context(Call(shell(pipeline), TOLD), settings, None, "here")
    for prompt in ("a red dot", "x"):
        (told,), _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
        found = context.encode(prompt, None)
        assert found.shape == told.shape
        torch.testing.assert_close(found, told, atol=1e-5, rtol=1e-4)
    for name, value in pipeline.text_encoder.state_dict().items():
        shared = context._encoder.language_model.state_dict()[name]
        assert shared.data_ptr() == value.data_ptr()


def test_a_picture_adds_its_tokens_and_changes_what_the_teacher_says(pipeline, settings, tmp_path):
    rows = contexts.draw_rows(tmp_path, ((32, 32), (48, 32)))
    call, context = in_context(Call(shell(pipeline), TOLD), settings, None, "here")
    embeds = context.arguments(rows)["prompt_embeds"]
    for row, found, tokens in zip(rows, embeds, (16, 24), strict=True):
        assert found.shape == (len(context.encode(row.prompt, None)) + tokens + 2, 16)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    student = Call(shell(pipeline), TOLD).prompted([row.prompt for row in rows], latents=latents)
    seeing = call.prompted(context.prompts(rows), latents=latents, **context.arguments(rows))
    said, taught = (next(iter(rollout(side))).model_output for side in (student, seeing))
    assert (said - taught).abs().max() > 1e-4
    other = call.prompted(context.prompts(rows), latents=latents, **context.arguments(rows[::-1]))
    assert (next(iter(rollout(other))).model_output - taught).abs().max() > 1e-5
    alone = call.prompted([rows[1].prompt], latents=latents[1:], **context.arguments(rows[1:]))
    torch.testing.assert_close(next(iter(rollout(alone))).model_output[0], taught[1], atol=1e-5, rtol=1e-4)


def test_a_picture_is_read_at_its_bucket_and_a_large_one_smaller(pipeline, settings, tmp_path):
    _, context = in_context(Call(shell(pipeline), TOLD), settings, None, "here")
    (row,) = contexts.draw_rows(tmp_path, ((48, 32),))
    sized = PromptRow(row.prompt, row.metadata | {"bucket": [32, 16]})
    text = len(context.encode(row.prompt, None)) + 2
    assert len(context._embeds(sized)) == text + 8 and len(context._embeds(row)) == text + 24
    long = context.encode("x" * 3000, Image.new("RGB", (32, 32)))
    assert len(long) == MOST_TOKENS


@pytest.mark.parametrize("broken", ["missing", "other size", "other tokens"])
def test_a_model_that_cannot_read_for_this_pipeline_is_refused(pipeline, tmp_path, broken):
    words, text = pipeline.tokenizer, {}
    if broken == "other size":
        text = {"num_hidden_layers": 2}
    if broken != "missing":
        save_qwen(tmp_path, words, **text)
    if broken == "other tokens":
        config = Qwen3VLConfig.from_pretrained(tmp_path)
        config.image_token_id = 0
        config.save_pretrained(tmp_path)
    settings = ContextSettings(kind="image_prompt", vision_language=str(tmp_path))
    reason = "was made for another" if broken == "other tokens" else "cannot read for this pipeline's text encoder"
    with pytest.raises(UserError, match=f"here: .*{reason}"):
        in_context(Call(shell(pipeline), TOLD), settings, None, "here")


def test_the_kind_is_z_images_and_names_its_model():
    assert choose_kind("ZImagePipeline", is_enhanced=False, place="here") == "image_prompt"
    check_context("image_prompt", "ZImagePipeline", is_enhanced=False, place="here")
    with pytest.raises(UserError, match="takes no image prompt"):
        check_context("image_prompt", "FluxPipeline", is_enhanced=False, place="here")
    with pytest.raises(ValueError, match="needs vision_language"):
        ContextSettings(kind="image_prompt")
    with pytest.raises(ValueError, match="vision_language belongs"):
        ContextSettings(kind="enhanced_prompt", vision_language="x")
