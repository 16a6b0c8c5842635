"""The embedded world's image path: what it is trained on, and that stock code loads what it saves."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from from_scripts import script
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made():
    """The scripts' modules, and the base with an untrained image path."""
    from diffusers import StableDiffusionPipeline

    names = ("world_looks", "world_image_models", "world_image_sheet", "world_image", "world_models")
    modules = SimpleNamespace(**{name: script(name) for name in names})
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "pipelines" / "emoji", torch_dtype=torch.float32)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    torch.manual_seed(0)
    modules.pipe, modules.untouched = pipe, type(pipe)(**pipe.components | {"unet": _copy(pipe.unet)})
    modules.path = modules.world_image_models.ImagePath(pipe)
    modules.begins = [processor.to_v_ip[0].weight.clone() for processor in modules.path.trained["attention"]]
    return modules


def _copy(unet):
    from copy import deepcopy

    return deepcopy(unet)


@pytest.fixture
def told():
    """Noisy latents, timesteps, tokens and pictures of two rows."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(2, 3, 48, 48, generator=generator)
    tokens = torch.randint(0, 600, (2, 16), generator=generator)
    return torch.randn(2, 4, 12, 12, generator=generator), torch.tensor([10, 900]), tokens, pictures


def test_unchanged_drawings_make_the_worlds_own_pictures(made):
    looks, world = made.world_looks, made.world_models.world
    scene = {"task": "style", "thing": "rocket", "manner": "twemoji", "background": 2, "x": 8, "y": 16}
    assert (looks.render(scene, looks.plain_drawings(row=1)) == world.render(scene)).all()
    plain = looks.Look(nodes=None, flip=False, colors=np.eye(3), contrast=1, brightness=0, levels=0, light=0, angle=0,
                       tint=np.ones(3), pillow=0, gloss=0, blur=0, outline=0, ink=np.zeros(3))  # fmt: skip
    cells = looks.load_cells()[1]
    drawn = {thing: looks.redraw(cell, plain) for thing, cell in zip(world.THINGS, cells, strict=True)}
    assert np.abs(looks.render(scene, drawn).astype(int) - world.render(scene)).max() <= 4


def test_groups_are_reproducible_and_looks_differ(made):
    pictures = [made.world_looks.draw_group(3, np.random.default_rng(n), []).pictures for n in (4, 4, 5)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_objects_of_the_demonstration_and_things_are_never_among_training_drawings(made, tmp_path):
    looks = made.world_looks
    folder = tmp_path / looks.PACKAGES[0]
    folder.mkdir(parents=True)
    for code in ("1f419", "2602-fe0f", "1f680", "1f469-200d-1f680", "1f40c"):
        (folder / f"{code}.png").touch()
    assert [file.stem for file in looks.find_objects(tmp_path)] == ["1f40c"]
    with pytest.raises(FileNotFoundError, match="unpack"):
        looks.find_objects(tmp_path / "elsewhere")


def test_training_sees_pictures_as_the_stock_processor_gives_them(made):
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    expected = made.pipe.feature_extractor(Image.fromarray(picture), return_tensors="pt").pixel_values[0]
    assert torch.allclose(made.world_image_models.normalized(torch.from_numpy(picture)), expected, atol=1e-5)


@torch.no_grad()
def test_an_untrained_path_changes_nothing(made, told):
    for processor, begin in zip(made.path.trained["attention"], made.begins, strict=True):
        processor.to_v_ip[0].weight.copy_(begin)  # another test may have filled it before
    noisy, timesteps, tokens, pictures = told
    hidden, _ = made.path.encode(pictures)
    plain = made.untouched.unet(noisy, timesteps, made.pipe.text_encoder(tokens)[0]).sample
    assert torch.equal(made.path(noisy, timesteps, tokens, hidden), plain)


@torch.no_grad()
def let_it_speak(made):
    """An untrained path says nothing of its pictures: give it some values."""
    for processor in made.path.trained["attention"]:
        processor.to_v_ip[0].weight.normal_(std=0.05, generator=torch.Generator().manual_seed(2))


def test_a_saved_path_is_the_same_when_stock_code_loads_it(made, told, tmp_path):
    noisy, timesteps, tokens, pictures = told
    let_it_speak(made)
    made.world_image_models.save_image_path(made.path, tmp_path)
    other = made.untouched
    other.load_ip_adapter(str(tmp_path), subfolder="", weight_name=made.world_image_models.WEIGHTS)
    with torch.no_grad():
        expected = made.path(noisy, timesteps, tokens, made.path.encode(pictures)[0])
        seen = other.image_encoder(pictures, output_hidden_states=True).hidden_states[-2]
        embeds = {"image_embeds": [seen[:, None]]}
        found = other.unet(noisy, timesteps, other.text_encoder(tokens)[0], added_cond_kwargs=embeds).sample
        embeds = {"image_embeds": [0 * seen[:, None]]}
        blind = other.unet(noisy, timesteps, other.text_encoder(tokens)[0], added_cond_kwargs=embeds).sample
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert (found - blind).abs().max() > 0.05


def test_each_row_is_drawn_from_its_own_picture(made):
    let_it_speak(made)
    pictures = np.stack([np.full((48, 48, 3), shade, np.uint8) for shade in (0, 255)])
    draw = made.world_image_sheet.draw_from
    both = draw(made.pipe, ["a frog", "a star"], pictures, 2, 2.0)
    swapped = draw(made.pipe, ["a frog", "a star"], pictures[::-1].copy(), 2, 2.0)
    assert (both[0] != swapped[0]).any() and (both[1] != swapped[1]).any()
    same = draw(made.pipe, ["a frog", "a star"], np.stack([pictures[0], pictures[0]]), 2, 2.0)
    assert np.abs(same[0].astype(int) - both[0]).max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_draw_ahead_comes_in_order_and_is_the_same_without_them(made, workers):
    with script("world_training").drawn_ahead(lambda number: number**2, 3, workers) as drawn:
        assert [next(drawn) for _ in range(20)] == [number**2 for number in range(3, 23)]
