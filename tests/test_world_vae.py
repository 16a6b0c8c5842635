"""The embedded world's autoencoder, trained on with other drawings."""

import json

import diffusers
import numpy as np
import pytest
import torch
from from_scripts import script
from PIL import Image


@pytest.fixture
def drawings(tmp_path):
    """Two drawings where the unpacked packages have them."""
    rng = np.random.default_rng(0)
    for number, package in enumerate(script("world_looks").PACKAGES):
        (tmp_path / "drawings" / package).mkdir(parents=True)
        picture = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(picture, "RGBA").save(tmp_path / "drawings" / package / f"1f40{number}.png")
    return tmp_path / "drawings"


def rows(output):
    return [json.loads(line) for line in (output / "wide.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_wider_autoencoder_is_a_stock_one_with_normal_latents_and_its_training_goes_on(tmp_path, drawings):
    module, output = script("world_vae"), tmp_path / "out"
    module.widen(output, drawings, seconds=0.5)
    done = torch.load(output / "wide.pt", weights_only=True)
    assert done["update"] == rows(output)[-1]["update"] >= 1 and done["seconds"] >= 0.5

    made = diffusers.AutoencoderKL.from_pretrained(output / "vae")
    before = diffusers.AutoencoderKL.from_pretrained(module.ROOT / "pipelines" / "emoji" / "vae")
    assert not torch.equal(made.decoder.conv_out.weight, before.decoder.conv_out.weight.float())
    assert not torch.equal(made.encoder.conv_in.weight, before.encoder.conv_in.weight.float())
    latents = made.encode(module.draw_pictures(64, np.random.default_rng(2))).latent_dist.mean
    assert made.config.scaling_factor == 1.0 and abs(float(latents.detach().std()) - 1) < 0.1

    module.widen(output, drawings, seconds=done["seconds"] + 0.5, resume=True)
    again = torch.load(output / "wide.pt", weights_only=True)
    assert again["update"] == rows(output)[-1]["update"] > done["update"]
    assert Image.open(output / "unseen.png").width == 3 * 12 * 48
