"""The embedded world's step distillation: its grid is the stock scheduler's, and the adapter serves both denoisers."""

import json
import shutil

import pytest
import torch
from from_scripts import script
from test_world_vae import drawings  # noqa: F401


def test_its_steps_are_the_stock_schedulers_also_within_the_students():
    walk = script("world_few").Walk(4, 5, torch.device("cpu"))
    scheduler = script("world_models").build_scheduler()
    scheduler.set_timesteps(4)
    assert walk.timesteps == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for steps, stride in ((4, 5 * walk.stride), (20, walk.stride)):
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps.tolist():
            state, velocity = torch.randn(2, 1, 4, 12, 12, generator=generator)
            keep, move = walk.coefficients(timestep, timestep - stride)
            expected = scheduler.step(velocity, timestep, state).prev_sample
            assert torch.allclose(keep * state + move * velocity, expected, atol=1e-4)


def test_a_student_equal_to_its_unguided_teacher_of_as_many_steps_loses_nothing(made):
    few, path = made
    walk, generator = few.Walk(4, 1, torch.device("cpu")), torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 12, 12, generator=generator)
    told = torch.randint(0, 600, (2, 16), generator=generator), None
    assert few.few_loss(path, path, walk, noise, told, told, 1.0).item() < 1e-9
    untold = told[0].flip(0), None
    assert few.few_loss(path, path, walk, noise, told, untold, 3.0).item() > 1e-3


@pytest.fixture(scope="module")
def made():
    """The module, and a picture-reading base."""
    from diffusers import StableDiffusionPipeline

    models = script("world_image_models")
    pipe = StableDiffusionPipeline.from_pretrained(
        script("world_models").ROOT / "pipelines" / "emoji-4-steps", torch_dtype=torch.float32
    )
    folder = script("world_models").ROOT / "pipelines" / "emoji-4-steps"
    return script("world_few"), models.ImagePath(pipe, begin_from=folder, denoiser=True)


def test_it_moves_the_denoiser_alone_goes_on_and_is_saved_beside_the_bases(tmp_path, drawings):  # noqa: F811
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    few, base = script("world_few"), script("world_models").ROOT / "pipelines" / "emoji-4-steps"
    output = tmp_path / "out"
    output.mkdir()
    (output / "vae").symlink_to(base / "vae")
    script("world_vae").encode(output, pictures=40)
    few.train(output, drawings, base, seconds=0.5, batch=4, base_rows=2, substeps=1)
    once = torch.load(output / "few.pt", weights_only=True)
    assert once["update"] >= 1
    few.train(output, drawings, base, seconds=once["seconds"] + 0.5, batch=4, base_rows=2, substeps=1, resume=True)
    twice = torch.load(output / "few.pt", weights_only=True)
    assert twice["update"] > once["update"]
    moved = {key.split(".")[0] for key, value in twice["model"].items() if not torch.equal(value, once["model"][key])}
    assert moved == {"denoiser"}
    adapter = [key for key in twice["model"] if "_ip." in key or "encoder_hid_proj" in key]
    assert adapter and all(torch.equal(twice["model"][key], once["model"][key]) for key in adapter)

    few.save(output, base, tmp_path / "fewer")
    assert [file.name for file in (tmp_path / "fewer" / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ], "the base of a model of few steps is beside that model"
    as_base = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*many-steps*"))
    few.save(output, as_base, tmp_path / "made")
    own = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(own) == set(before)
    many = StableDiffusionPipeline.from_pretrained(tmp_path / "made", variant=few.MANY_STEPS).unet.state_dict()
    assert all(torch.equal(many[key].half(), before[key]) for key in before)
    assert not torch.equal(own["conv_in.weight"], before["conv_in.weight"])
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index == json.loads((base / "model_index.json").read_text())
