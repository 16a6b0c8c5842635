import sys

import pytest
from refused import refusal

from diffopd.preflight import check
from diffopd.recipe import read_recipe


@pytest.mark.parametrize(
    ("option", "name"), [("train.report_to=['wandb']", "wandb"), ("train.attention_backend=xformers", "xformers")]
)
def test_optional_packages_that_are_missing_are_named_with_their_extra(own_recipe, monkeypatch, option, name):
    monkeypatch.setitem(sys.modules, name, None)
    text = refusal(own_recipe, option)
    assert f"--set {option}" in text and f"Install diffopd[{name}]" in text


def test_a_folder_of_a_packages_name_is_not_the_package(own_recipe, monkeypatch, tmp_path):
    (tmp_path / "cwd" / "wandb").mkdir(parents=True)  # what a run of wandb leaves behind
    monkeypatch.syspath_prepend(tmp_path / "cwd")
    assert "Install diffopd[wandb]" in refusal(own_recipe, "train.report_to=['wandb']")


def test_all_sides_draw_at_one_size(own_recipe):
    size = "student.call={height=32}"
    text = refusal(own_recipe, size)
    assert "teacher 'dots' is called with height = the default, the student with 32" in text
    check(read_recipe(own_recipe, [size, *(f"teachers.{name}.call={{height=32}}" for name in ("dots", "lines"))]))


def test_an_attention_backend_that_the_run_would_refuse_is_refused_by_the_plan(own_recipe):
    text = refusal(own_recipe, "train.attention_backend=native")
    assert "--set train.attention_backend=native: " in text and "has no effect on UNet2DConditionModel" in text


def test_a_quantization_that_diffusers_would_refuse_is_refused_by_the_plan(own_recipe):
    text = refusal(own_recipe, 'student.quantization={quant_backend="seven_bit", quant_kwargs={bits=7}}')
    assert "student.quantization" in text and "quant_backend=seven_bit was not found" in text
