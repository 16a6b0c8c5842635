"""Weights arrive whole or not at all."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffopd.adapters import adapter_parameters
from diffopd.assemble import assemble
from diffopd.errors import UserError
from diffopd.load import load_full_denoiser, load_lora, load_pipeline
from diffopd.plan import make_plan
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.teacher import teacher_card


@pytest.fixture
def copied(tiny_teacher, tmp_path):
    """A copy of the teacher's folder and its file; the card's hash is dropped so that the file may change."""
    folder = tmp_path / "dots"
    shutil.copytree(tiny_teacher, folder)
    lines = (folder / "teacher.toml").read_text().splitlines()
    (folder / "teacher.toml").write_text("\n".join(line for line in lines if not line.startswith("sha256")) + "\n")
    return folder, folder / "pytorch_lora_weights.safetensors"


def rewrite(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata=metadata)


def latents_of(pipeline):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    return pipeline(prompt="a dot", latents=noise, **told).images


def test_a_teachers_lora_changes_the_pipeline_as_diffusers_own_loading_does(tiny_sd, tiny_teacher):
    card = teacher_card(str(tiny_teacher), tiny_teacher)
    ours, theirs = load_pipeline(str(tiny_sd)), tiny.load_pipeline(tiny_sd)
    plain = latents_of(ours)
    load_lora(ours, card, "dots")
    theirs.load_lora_weights(str(tiny_teacher))
    assert torch.equal(latents_of(ours), latents_of(theirs))
    assert not torch.equal(latents_of(ours), plain)


def test_lora_alpha_of_the_file_is_honoured_and_the_adapter_is_frozen(tiny_sd, tiny_teacher):
    pipeline = load_pipeline(str(tiny_sd))
    load_lora(pipeline, teacher_card(str(tiny_teacher), tiny_teacher), "dots")
    config = pipeline.unet.peft_config["dots"]
    assert (config.r, config.lora_alpha) == (2, 4)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["dots"] == 2.0
    assert not any(p.requires_grad for p in adapter_parameters(pipeline.unet, "dots").values())


def test_a_file_without_the_denoisers_prefix_is_the_same_adapter_instead_of_doing_nothing(tiny_sd, copied):
    folder, file = copied
    whole, bare = load_pipeline(str(tiny_sd)), load_pipeline(str(tiny_sd))
    load_lora(whole, teacher_card(str(folder), folder), "dots")
    rewrite(file, lambda tensors: {key.removeprefix("unet."): value for key, value in tensors.items()})
    load_lora(bare, teacher_card(str(folder), folder), "dots")
    assert torch.equal(latents_of(bare), latents_of(whole))


def test_an_unused_tensor_is_refused(tiny_sd, copied):
    folder, file = copied
    rewrite(file, lambda tensors: tensors | {"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="1 of its 17 layers|no part of a LoRA layer"):
        load_lora(load_pipeline(str(tiny_sd)), teacher_card(str(folder), folder), "dots")


def test_a_lora_of_another_width_is_refused(tiny_sd, copied):
    folder, file = copied

    def wider(tensors):
        return {
            key: torch.cat([value, value], dim=int(key.endswith("lora_A.weight"))) for key, value in tensors.items()
        }

    rewrite(file, wider)
    with pytest.raises(UserError, match="does not fit the base"):
        load_lora(load_pipeline(str(tiny_sd)), teacher_card(str(folder), folder), "dots")
    rewrite(file, lambda tensors: {key: torch.cat([value, value]) for key, value in tensors.items()})
    with pytest.raises(UserError, match="the two matrices of"):
        load_lora(load_pipeline(str(tiny_sd)), teacher_card(str(folder), folder), "dots")


def test_a_full_teacher_is_its_own_denoiser(tiny_sd, tmp_path):
    folder = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full", seed=9)
    base = load_pipeline(str(tiny_sd))
    own = load_full_denoiser(base, teacher_card(str(folder), folder))
    expected = tiny.build_pipeline(seed=9).unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize("weights", ["unet", "unet/diffusion_pytorch_model.safetensors"])
def test_a_full_teacher_without_a_config_has_the_bases_shape(tiny_sd, tmp_path, weights):
    folder = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full", seed=9)
    (folder / "unet" / "config.json").unlink()
    card = folder / "teacher.toml"
    card.write_text(card.read_text().replace('weights = "unet"', f'weights = "{weights}"'))
    base = load_pipeline(str(tiny_sd))
    before = {key: value.clone() for key, value in base.unet.state_dict().items()}
    own = load_full_denoiser(base, teacher_card(str(folder), folder))
    expected = tiny.build_pipeline(seed=9).unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in own.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in base.unet.state_dict().items())


def test_a_full_teacher_without_a_config_and_of_another_shape_is_refused(tiny_sd, tmp_path):
    folder = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full", seed=9)
    tiny.build_pipeline(cross=32).unet.save_pretrained(folder / "unet")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded as UNet2DConditionModel"):
        load_full_denoiser(load_pipeline(str(tiny_sd)), teacher_card(str(folder), folder))


@pytest.mark.parametrize("name", ["conv1", "0", "weight", "unet"])
def test_a_teacher_may_be_called_like_a_part_of_the_network(tiny_sd, tiny_teacher, name):
    plain, pipeline = load_pipeline(str(tiny_sd)), load_pipeline(str(tiny_sd))
    load_lora(plain, str(tiny_teacher), "dots")
    load_lora(pipeline, str(tiny_teacher), name)
    found, expected = adapter_parameters(pipeline.unet, name), adapter_parameters(plain.unet, "dots")
    assert list(found) == [key.replace(".dots.", f".{name}.") for key in expected]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


def test_a_network_that_takes_no_adapters_is_named(tiny_pipeline, tiny_teacher):
    tiny_pipeline.register_modules(unet=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="no LoRA on Linear"):
        load_lora(tiny_pipeline, str(tiny_teacher), "dots")


def test_pickled_weights_are_never_loaded(tiny_sd, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sd, folder)
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded.* no .safetensors that are loaded for unet: pickled"):
        load_pipeline(str(folder))


@pytest.fixture
def checked_base(tiny_sd, tmp_path):
    """A base with a safety checker that cannot be loaded: it lacks the feature extractor that a pipeline then wants."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    base = shutil.copytree(tiny_sd, tmp_path / "checked")
    layer = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(text_config=layer, vision_config={**layer, "image_size": 8, "patch_size": 4}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(base / "safety_checker")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (base / "model_index.json").write_text(json.dumps(index))
    return base


def test_training_loads_and_counts_no_safety_checker_and_everyone_else_keeps_it(checked_base, tiny_teachers, tmp_path):
    recipe = read_recipe(tiny.write_recipe(tmp_path / "r.toml", checked_base, tiny_teachers))
    student, teachers = assemble(recipe, "cpu")
    pipelines = [student.pipeline, *(teacher.call.pipeline for teacher in teachers)]
    assert all(pipeline.safety_checker is None for pipeline in pipelines)
    memory = make_plan(check(recipe)).memory
    assert "base vae" in memory and "base safety_checker" not in memory
    with pytest.raises(ValueError, match="feature extractor"):  # so it was not left out
        load_pipeline(str(checked_base))
