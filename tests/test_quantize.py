"""A frozen trunk in fewer bits: named by diffusers' configs, refused with the extra's name, trained like the whole."""

import importlib.util

import pytest
import torch
from run_helpers import NO_CLIP, gradients_of, prepared, recipe_with, run_to_end, weights_of
from test_precision import flat

from diffopd.assemble import quantization_config
from diffopd.errors import UserError
from diffopd.preflight import check
from diffopd.recipe import QUANTIZATIONS

INT8 = 'student.quantization="torchao-int8"'


def is_absent(package):
    return importlib.util.find_spec(package) is None


@pytest.mark.parametrize("name", QUANTIZATIONS[1:])
def test_a_package_that_is_absent_is_named_before_weights_are_loaded(tiny_recipe, monkeypatch, name):
    find = importlib.util.find_spec
    hidden = ("bitsandbytes", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in hidden else find(n, *a))
    with pytest.raises(UserError, match=r"student.quantization.*diffopd\[(bitsandbytes|torchao)\]"):
        check(recipe_with(tiny_recipe, f'student.quantization="{name}"'))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ('student.quantization="bnb4"', "one of none, bnb-4bit"),
        ("student.quantization={quant_kwargs = {load_in_8bit = true}}", "quant_backend"),
        ('student.quantization={quant_backend = "quanto", bits = 4}', "components_to_quantize"),
    ],
)
def test_unknown_quantizations_are_refused(tiny_recipe, setting, reason):
    with pytest.raises(UserError, match=reason):
        recipe_with(tiny_recipe, setting)


@pytest.mark.parametrize("setting", ['student.train="full"', "train.fuse_student=true", "train.fuse_teachers=true"])
def test_rounded_weights_are_neither_trained_nor_fused(tiny_recipe, setting):
    with pytest.raises(UserError, match="quantization rounds"):
        recipe_with(tiny_recipe, INT8, setting)


def test_without_quantization_there_is_no_config(tiny_recipe):
    assert quantization_config(recipe_with(tiny_recipe), "unet") is None


@pytest.mark.skipif(is_absent("torchao"), reason="needs the extra torchao")
@pytest.mark.parametrize("frozen_dtype", ["float32", "bf16"])
def test_an_int8_trunk_gives_nearly_the_same_gradients(tiny_recipe, frozen_dtype):
    plain = flat(gradients_of(recipe_with(tiny_recipe, NO_CLIP)))
    recipe = recipe_with(tiny_recipe, NO_CLIP, INT8, f'train.frozen_dtype="{frozen_dtype}"')
    run, _ = prepared(recipe)
    attention = run.student.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert type(attention.to_q.base_layer.weight).__module__.startswith("torchao")
    assert run.student.pipeline.text_encoder.dtype == {"float32": torch.float32, "bf16": torch.bfloat16}[frozen_dtype]
    rounded = flat(gradients_of(recipe))
    assert rounded.dtype == torch.float32 and not torch.equal(plain, rounded)
    assert float(torch.nn.functional.cosine_similarity(plain, rounded, dim=0)) > 0.97


@pytest.mark.skipif(is_absent("torchao"), reason="needs the extra torchao")
def test_a_run_on_an_int8_trunk_writes_a_plain_adapter(tiny_recipe):
    weights = weights_of(run_to_end(recipe_with(tiny_recipe, INT8)), 2)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    plain = weights_of(run_to_end(recipe_with(tiny_recipe, f'output_dir="{tiny_recipe.parent}/plain"')), 2)
    assert weights.keys() == plain.keys()


@pytest.mark.skipif(is_absent("bitsandbytes"), reason="needs the extra bitsandbytes")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_bitsandbytes_without_a_gpu_is_an_error_that_says_so(tiny_recipe, name):
    with pytest.raises(UserError, match="cannot be quantized here: No GPU found"):
        prepared(recipe_with(tiny_recipe, f'student.quantization="{name}"'))
