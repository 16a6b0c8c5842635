"""What a pipeline folder holds, told from its files alone, is what diffusers would load from it."""

import shutil

import pytest
import tiny

from diffopd.blueprint import loaded_weights, num_stored, read_blueprint
from diffopd.load import load_pipeline


@pytest.fixture
def own_base(tiny_sd, tmp_path):
    """A copy of the base with variants of every component beside its weights."""
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    for file in sorted(base.glob("*/*.safetensors")):
        for variant in ("fp16", "non_ema"):
            shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    return base


def test_variants_beside_the_weights_are_not_counted(own_base, tiny_sd):
    sizes = read_blueprint(str(own_base)).component_sizes()
    assert sizes == read_blueprint(str(tiny_sd)).component_sizes()
    loaded = load_pipeline(str(own_base))
    assert {name: num_stored(getattr(loaded, name)) for name in sizes} == sizes


def test_the_shards_of_an_index_are_counted_and_nothing_beside_them(own_base, tiny_sd):
    tiny.load_pipeline(tiny_sd).unet.save_pretrained(own_base / "unet", max_shard_size="100KB")
    assert len(loaded_weights(own_base / "unet")) == len(list((own_base / "unet").glob("*-of-*"))) > 1
    assert read_blueprint(str(own_base)).component_sizes() == read_blueprint(str(tiny_sd)).component_sizes()
    next((own_base / "unet").glob("*-of-*")).unlink()
    assert loaded_weights(own_base / "unet") == []
