"""What is watched in the features of networks that the user names: real classes, random weights."""

from dataclasses import replace

import contexts
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from run_helpers import prepared
from torchmetrics.image.kid import poly_mmd
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)
from tuning import asked

from diffopd import cost
from diffopd.cost import measure_cost, told
from diffopd.errors import UserError
from diffopd.features import check_features, kid, load_features, nearest_cosine
from diffopd.looks import Looks
from diffopd.run_folder import RunFolder
from diffopd.teacher_check import check_teacher
from diffopd.tune import prepare, write_task

LAYERS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a tiny DINOv2 and a tiny CLIP."""
    dino, clip = (tmp_path_factory.mktemp(name) for name in ("dino", "clip"))
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(dino)
    words = tiny.build_tokenizer()
    text = {**LAYERS, "vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": words.eos_token_id}
    vision = {**LAYERS, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(clip)
    words.save_pretrained(clip)
    for folder in (dino, clip):
        CLIPImageProcessorPil(**SIZE).save_pretrained(folder)
    return {"dino": dino, "clip": clip}


def noisy(seed):
    values = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_kid_is_the_unbiased_kernel_distance():
    generator = np.random.default_rng(0)
    one, same, other = (generator.normal(shift, 1, (40, 4)) for shift in (0, 0, 1))
    assert abs(kid(one, same)) < 0.3 < 1.0 < kid(one, other)
    by_hand = float(poly_mmd(torch.as_tensor(other), torch.as_tensor(one)))
    assert kid(one, other) == pytest.approx(by_hand, rel=1e-4)
    assert kid(one, other[:9]) == kid(one, other[:9])  # its subsets are drawn alike each time


def test_the_nearest_picture_counts():
    features = np.eye(3)
    assert nearest_cosine(features[:2], features[1:]) == 0.5


def test_features_are_those_of_the_networks(tiny_sd, pictures, networks):
    options = [f'look.{name}="{folder}"' for name, folder in networks.items()]
    found = check_features(asked(tiny_sd, pictures, *options))
    assert found == networks
    features, images = load_features(found, "cpu"), [noisy(1), noisy(2).resize((32, 24))]
    pixels = CLIPImageProcessorPil.from_pretrained(networks["dino"])(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(networks["dino"]).eval()(pixels).last_hidden_state[:, 0]
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    torch.testing.assert_close(torch.as_tensor(features.of_dino(images)), wanted)
    seen, read = features.of_clip(images, ["a dot", "two longer dots"])
    assert seen.shape == read.shape == (2, 8)
    np.testing.assert_allclose((seen**2).sum(1), 1, rtol=1e-5)
    alone = features.of_clip(images[1:], ["two longer dots"])
    np.testing.assert_allclose(alone[1][0], read[1], atol=1e-5)
    assert np.abs(read[0] - read[1]).max() > 1e-3


@pytest.mark.parametrize("part", ["config.json", "preprocessor_config.json", "*.safetensors"])
def test_a_network_that_lacks_a_part_is_named_before_training(tiny_sd, pictures, networks, tmp_path, part):
    import shutil

    folder = shutil.copytree(networks["dino"], tmp_path / "copy")
    for file in folder.glob(part):
        file.unlink()
    with pytest.raises(UserError, match=r"--set look.dino.*look.dino = .*has no " + part.replace("*", r"\*")):
        check_features(asked(tiny_sd, pictures, f'look.dino="{folder}"'))


@pytest.fixture
def run(tiny_sd, pictures, tmp_path):
    file, encoder = contexts.save_ip_adapter(tmp_path / "ip", tiny.build_pipeline().unet)
    options = [f'context.ip_adapter="{file}"', f'context.image_encoder="{encoder}"']
    tuning = prepare(asked(tiny_sd, pictures, *options))
    write_task(tuning)
    folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    return prepared(tuning.recipe)[0], folder, tuning


def test_looks_measure_in_every_space_that_is_there_now_and_before(run, networks):
    run, folder, tuning = run
    files = [picture.path for picture in tuning.pictures]
    looks = Looks(tuning.asked.look.model_copy(update={"num_prompts": 3}), folder, files)
    looks.begin(run, is_new=True)
    plain = looks.look(run, 1)
    assert {"kid", "kid_before"} <= set(plain) and not {"dino", "clip"} & set(plain)
    assert plain["kid"] == pytest.approx(plain["kid_before"], abs=0.05)
    looks.features = load_features(networks, "cpu")
    full = looks.look(run, 1)
    assert {"dino", "dino_before", "clip", "clip_before", "kid"} <= set(full) and full["kid"] != plain["kid"]
    with torch.no_grad():
        for name, parameter in run.student.parameters.items():
            parameter.add_(2.0 if "lora_B" in name else 0.0)
    moved = looks.look(run, 2)
    assert moved["dino"] != full["dino"] and moved["dino_before"] == full["dino_before"]


def test_the_teacher_is_judged_by_dino_where_it_is_there(run, networks):
    run, folder, _ = run
    own = check_teacher(run, folder, force=True)
    by_dino = check_teacher(run, folder, load_features({"dino": networks["dino"]}, "cpu"), force=True)
    assert (own.measure, by_dino.measure) == ("image encoder", "DINO")
    assert by_dino.pixels_with_context == own.pixels_with_context and by_dino.with_context != own.with_context


def test_the_cost_is_timed_without_a_trace(run):
    run, folder, _ = run
    before = {name: parameter.detach().clone() for name, parameter in run.student.parameters.items()}
    found = measure_cost(run, folder, 1.0, 10)
    assert {"teacher", "student", "backward"} <= set(found["own"])
    assert {"passing", "student", "backward"} <= set(found["sft"]) and "pictures" not in found["sft"]
    assert all(
        value > 0 for side in found.values() for stage, value in side.items() if stage in ("student", "backward")
    )
    assert all(parameter.grad is None for parameter in run.student.parameters.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in run.student.parameters.items())
    assert (folder.path / "cost.json").is_file() and run.recipe.objective.states == "student"


def test_prompts_to_keep_are_part_of_the_cost(run, monkeypatch):
    run, folder, _ = run
    monkeypatch.setattr(cost, "_seconds", lambda run, teacher: {"student": 1.0, "teacher": 0.5})
    assert measure_cost(run, folder, 1.0, 10)["own"] == {"student": 1.0, "teacher": 0.5}
    kept = replace(run, teachers=[*run.teachers, run.teachers[0]])
    found = measure_cost(kept, folder, 1.0, 10)
    assert found == {"own": {"student": 2.0, "teacher": 1.0}, "sft": {"student": 1.0, "teacher": 0.5}}


def test_the_cost_is_told_as_a_multiple():
    said = told({"own": {"student": 0.5, "teacher": 0.5}, "sft": {"student": 0.5}})
    assert said == "A picture costs 1 s here, 2.0 times as much as in ordinary fine-tuning (0.5 s)."
