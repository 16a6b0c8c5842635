import sys

import pytest
import rehearsed
import tiny
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


def recipe_of(folder, family):
    """A recipe whose teacher is the base itself, at guidance 1."""
    rehearsed.pipeline(family).save_pretrained(folder / "base")
    itself = tiny.write_teacher(folder / "itself", folder / "base", form="base", guidance_scale=1.0)
    return tiny.write_recipe(folder / "r.toml", folder / "base", [itself])


SCALE = "guidance_scale=4"
TRUE = "call={true_cfg_scale=4.0, height=16, width=16}"
SIZED = ["student.call={height=16, width=16}", "teachers.itself.call={height=16, width=16}"]


def test_a_guidance_scale_that_does_nothing_is_refused_with_what_guides(tmp_path):
    qwen, klein = recipe_of(tmp_path / "qwen", "qwen"), recipe_of(tmp_path / "klein", "klein distilled")
    text = refusal(qwen, *SIZED, f"student.{SCALE}")
    assert text.startswith(f"--set student.{SCALE}: guidance_scale = 4 has no effect on student: QwenImagePipeline")
    assert "needs student.call.true_cfg_scale above 1 and student.negative_prompt, if only a space" in text
    assert "needs teachers.itself.call.true_cfg_scale" in refusal(qwen, *SIZED, f"teachers.itself.{SCALE}")
    check(read_recipe(qwen, [f"student.{TRUE}", SIZED[1], f"student.{SCALE}", 'student.negative_prompt=" "']))
    assert "It cannot be guided: set guidance_scale to 1" in refusal(klein, *SIZED, f"student.{SCALE}")
    card = tmp_path / "klein" / "itself" / "teacher.toml"
    card.write_text(card.read_text().replace("guidance_scale = 1.0", "guidance_scale = 4.0"))
    assert f"{card}:" in refusal(klein, *SIZED)


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_a_true_cfg_scale_without_a_negative_prompt_is_refused(tmp_path, family):
    recipe = recipe_of(tmp_path, family)
    text = refusal(recipe, f"student.{TRUE}", SIZED[1])
    assert "student.call" in text and "true_cfg_scale = 4 has no effect on student" in text
    assert "It needs student.negative_prompt, if only a space, or remove it." in text
    text = refusal(recipe, SIZED[0], f"teachers.itself.{TRUE}")
    assert "It needs teachers.itself.call.negative_prompt" in text
    check(read_recipe(recipe, [f"student.{TRUE}", SIZED[1], 'student.negative_prompt=" "']))


@pytest.mark.parametrize("family", ["flux", "z-image", "lcm", "sd3"])
def test_guidance_that_a_network_is_told_or_that_asks_it_twice_is_not_refused(tmp_path, family):
    recipe = recipe_of(tmp_path, family)
    check(read_recipe(recipe, [*SIZED, f"student.{SCALE}", f"teachers.itself.{SCALE}"]))


def test_a_negative_prompt_that_is_not_used_is_refused(own_recipe):
    for side, key in (("student", "negative_prompt"), ("teachers.dots", "call.negative_prompt")):
        option, guided = f'{side}.{key}="ugly"', f"{side}.guidance_scale"
        text = refusal(own_recipe, option, f"{guided}=1")
        assert text.startswith(f"--set {option}: ") and "has no effect" in text and f"Set {guided} so that" in text
        check(read_recipe(own_recipe, [option, f"{guided}=3"]))
