"""Single-file checkpoints hold what diffusers' own reader of them takes, tensor by tensor."""

import pytest
import tiny
import torch
from safetensors import safe_open

from diffopd.errors import UserError
from diffopd.load import load_pipeline
from diffopd.single_file import open_clip_weights, single_file_weights, write_single_file


def reloaded(pipeline, folder, tmp_path):
    """The pipeline after a road through one file and diffusers' `from_single_file`."""
    file = write_single_file(pipeline, tmp_path / "one.safetensors")
    return type(pipeline).from_single_file(str(file), config=str(folder), local_files_only=True)


def assert_equal_weights(found, expected):
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(expected, name, None) is None:
            continue
        ours, theirs = (getattr(side, name).state_dict() for side in (expected, found))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_the_shipped_base_survives_the_road_through_one_file(tmp_path):
    pipeline = load_pipeline("emoji")
    from diffopd.locate import find_pipeline

    assert_equal_weights(reloaded(pipeline, find_pipeline("emoji"), tmp_path), pipeline)
    with safe_open(tmp_path / "one.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"


def test_so_does_a_pipeline_with_attention_in_its_autoencoder_and_two_layers_a_block(tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    pipeline = tiny.build_pipeline()
    assert pipeline.vae.config.mid_block_add_attention
    config = {**pipeline.unet.config, "layers_per_block": 2}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    pipeline.save_pretrained(tmp_path / "folder")
    assert_equal_weights(reloaded(pipeline, tmp_path / "folder", tmp_path), pipeline)


@pytest.fixture(scope="module")
def tiny_sdxl():
    """A random SDXL pipeline: two text encoders of different width, added conditions."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    base = tiny.build_pipeline()
    config = {**base.text_encoder.config.to_dict(), "hidden_size": 24, "projection_dim": 24, "num_hidden_layers": 2}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        cross_attention_dim=40, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=base.text_encoder, text_encoder_2=second, tokenizer=base.tokenizer,
        tokenizer_2=tiny.build_tokenizer(), unet=unet.eval(), scheduler=base.scheduler, add_watermarker=False,
    )  # fmt: skip


def test_sdxl_has_the_names_of_its_original_for_all_of_its_tensors(tiny_sdxl):
    """diffusers knows SDXL's second encoder by a layer that only the full size has: its converter is asked itself."""
    from diffusers.loaders import single_file_utils as theirs

    weights = single_file_weights(tiny_sdxl)
    unet = theirs.convert_ldm_unet_checkpoint(weights, tiny_sdxl.unet.config)
    vae = theirs.convert_ldm_vae_checkpoint(weights, tiny_sdxl.vae.config)
    second = theirs.convert_open_clip_checkpoint(
        tiny_sdxl.text_encoder_2, weights, prefix="conditioner.embedders.1.model."
    )
    first = theirs.convert_ldm_clip_checkpoint(weights)
    first = {key.removeprefix("text_model."): value for key, value in first.items()}
    for found, name in ((unet, "unet"), (vae, "vae"), (second, "text_encoder_2"), (first, "text_encoder")):
        expected = getattr(tiny_sdxl, name).state_dict()
        plain = {key.removeprefix("text_model."): value for key, value in found.items()}
        wanted = {key.removeprefix("text_model."): value for key, value in expected.items()}
        assert plain.keys() == wanted.keys(), name
        assert all(torch.equal(plain[key], wanted[key]) for key in wanted), name


def test_open_clip_keeps_q_k_and_v_in_one_matrix(tiny_sdxl):
    own = tiny_sdxl.text_encoder_2.state_dict()
    found = open_clip_weights(own)
    assert found["transformer.resblocks.1.attn.in_proj_weight"].shape == (72, 24)
    assert torch.equal(found["text_projection"], own["text_projection.weight"].T)


def test_what_has_no_name_in_one_file_is_refused(tiny_sdxl):
    from diffusers import FluxPipeline, UNet2DConditionModel

    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    with pytest.raises(UserError, match="not for FluxPipeline"):
        single_file_weights(FluxPipeline(transformer=None, **parts))
    pipeline = tiny.build_pipeline()
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.register_modules(unet=UNet2DConditionModel(**config | {"time_cond_proj_dim": 8}))
    with pytest.raises(UserError, match="time_embedding.cond_proj.weight has no name"):
        single_file_weights(pipeline)


def test_a_pipeline_of_the_class_but_not_of_the_family_is_refused(tiny_sdxl):
    """SD 2.x has SD 1's class, SDXL's refiner that of SDXL; their files have other names."""
    from diffusers import UNet2DConditionModel

    pipeline = tiny.build_pipeline()
    pipeline.text_encoder.config.hidden_act = "gelu"
    with pytest.raises(UserError, match=r"neither: its text encoder is OpenCLIP's \(hidden_act gelu\)\. Clients"):
        single_file_weights(pipeline)
    pipeline = tiny.build_pipeline()
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.register_modules(unet=UNet2DConditionModel(**config | {"use_linear_projection": True}))
    with pytest.raises(UserError, match="neither: its UNet has use_linear_projection"):
        single_file_weights(pipeline)
    refiner = type(tiny_sdxl)(**{**tiny_sdxl.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(UserError, match="neither: it has no text_encoder"):
        single_file_weights(refiner)
