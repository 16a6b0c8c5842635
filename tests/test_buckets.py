"""Aspect buckets: whole multiples, about one area, nearest shape."""

from dataclasses import replace

import pytest

from diffopd.blueprint import read_blueprint
from diffopd.buckets import autoencoder_factor, bucket_sizes, bucket_step, native_resolution, nearest_bucket


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 16), (16, 4), (48, 16), (1000, 64)])
def test_buckets_are_multiples_of_about_one_area_in_both_orientations(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert sizes[0] == (resolution // step * step,) * 2
    for width, height in sizes:
        assert width % step == height % step == 0
        assert 0.5 * (resolution - step) ** 2 < width * height <= resolution**2
        assert 0.5 <= width / height <= 2
        assert (height, width) in sizes
    assert len(set(sizes)) == len(sizes)


def test_a_picture_goes_to_the_bucket_of_its_shape():
    sizes = bucket_sizes(512, 64)
    assert nearest_bucket((700, 700), sizes) == (512, 512)
    wide, tall = nearest_bucket((1600, 900), sizes), nearest_bucket((900, 1600), sizes)
    assert wide == tall[::-1] and 1.4 < wide[0] / wide[1] < 2
    assert nearest_bucket((5000, 100), sizes) == max(sizes, key=lambda size: size[0] / size[1])


def test_sizes_come_from_the_pipelines_configs(tiny_sd):
    base = read_blueprint(str(tiny_sd))
    assert (native_resolution(base), bucket_step(base)) == (16, 8)
    deep = replace(read_blueprint(str(tiny_sd)), configs={"vae": {"encoder_block_out_channels": [8] * 6}})
    assert autoencoder_factor(deep) == 32  # as Sana's
    shipped = read_blueprint("emoji")
    assert native_resolution(shipped) == 48
