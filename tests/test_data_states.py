"""Pictures as latents of every family that takes them: decoded, they are what the autoencoder makes of them."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from family_cast import PROMPTS, cast_of
from PIL import Image

from diffopd.data_states import as_latents, as_states, can_encode, encode_images
from diffopd.drive import decode
from diffopd.errors import UserError

KNOWN = [name for name in FAMILIES if name.partition(" ")[0] not in ("QwenImage", "Wan")]


def pictures(width, height):
    """One smooth picture a prompt, of given size."""
    rise = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return [Image.fromarray(np.roll(rise, turn, axis=1).astype(np.uint8)) for turn in range(len(PROMPTS))]


def rebuilt(pipeline, images):
    """What the autoencoder itself makes of pictures, as the pipeline's output holds them."""
    pixels = torch.stack([torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) for image in images])
    coded = pipeline.vae.encode(pixels / 127.5 - 1)
    latents = coded.latent if type(pipeline.vae).__name__ == "AutoencoderDC" else coded.latent_dist.mean
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="np")


@pytest.mark.parametrize("name", KNOWN)
def test_encoded_pictures_are_states_of_the_walk_and_decode_to_themselves(name):
    cast = cast_of(name)
    shape = (len(PROMPTS), *cast.survey.shape)
    with torch.no_grad():
        size = decode(cast.call(), torch.zeros(shape))[0].size
        images = pictures(*size)
        latents = encode_images(cast.pipeline, images)
        states = as_states(cast.pipeline, latents)
        shown = np.stack([np.asarray(image) / 255 for image in decode(cast.call(), states)])
        wanted = rebuilt(cast.pipeline, images)
    assert torch.equal(as_latents(cast.pipeline, states, cast.survey.latents_shape), latents)
    assert latents.shape[1:] == cast.survey.latents_shape and states.shape == shape
    assert np.abs(shown - wanted).max() < 0.01 < wanted.std()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in KNOWN])
def test_a_family_that_is_not_known_is_explained(name):
    pipeline = cast_of(name).pipeline
    assert not can_encode(type(pipeline).__name__, type(pipeline.vae).__name__)
    with pytest.raises(UserError, match="not known to make latents"):
        encode_images(pipeline, pictures(16, 16))
