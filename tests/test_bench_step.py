"""scripts/bench_step.py times what the recipe says."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    return importlib.import_module("bench_step")


def rewrite(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.fixture
def recipe(tiny_recipe):
    """Five substeps, LoRA on convolutions too, fused teachers."""
    rewrite(tiny_recipe, "rank = 2", 'rank = 2\ntarget_modules = ["to_q", "conv1"]')
    rewrite(tiny_recipe, "substeps = 1", "substeps = 5")
    rewrite(tiny_recipe, "[train]", "[train]\nfuse_teachers = true")
    return tiny_recipe


def test_the_setting_is_the_recipes_and_options_replace_it(bench, recipe, tiny_sd):
    setting = bench.setting_of(str(recipe), batch=None, steps=7)
    assert setting == bench.Setting(str(tiny_sd), 2, 7, 2, ["to_q", "conv1"], True, False, 5, [2.0, 1.0])
    rewrite(recipe, '/dots"', '/dots"\nguidance_scale = 1.0')
    assert bench.setting_of(str(recipe)).teacher_guidance == [1.0, 1.0]


def test_the_prediction_counts_substeps_and_the_share_of_guided_teachers(bench, recipe):
    stages = {"teacher": 1.0, "student": 2.0, "backward": 3.0, "objective": 0.0, "optimizer": 0.5, "rollout": 1.3}
    streaming = 5 * 1.5 * 1.0 + 5.5  # one of two teachers is guided: two forwards there, one at the other
    assert bench.predicted(stages, bench.setting_of(str(recipe))) == pytest.approx((streaming + 1.3) / streaming)


@pytest.mark.parametrize("is_fused", [True, False])
def test_teachers_are_fused_copies_where_the_recipe_fuses_them(bench, recipe, is_fused):
    if not is_fused:
        rewrite(recipe, "fuse_teachers = true", "fuse_teachers = false")
    setting = bench.setting_of(str(recipe))
    student, teacher = bench.build(setting, torch.float32, "cpu")
    shared = teacher.pipeline.unet is student.pipeline.unet
    assert shared is not is_fused
    layers = {name.split(".lora_")[0] for name, _ in student.pipeline.unet.named_parameters() if ".student." in name}
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"to_q", "conv1"}
    assert any("lora" in name for name, _ in teacher.pipeline.unet.named_parameters()) is not is_fused
    run = {"batch": 2, "steps": 2, "fuse_student": is_fused, "device": "cpu"}
    one, two = (bench.one_step(student, teacher, two_pass=two_pass, **run)[2] for two_pass in (False, True))
    assert sum(float(g.abs().sum()) for g in one) > 0
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_measuring_process_that_dies_ends_the_benchmark(bench):
    with pytest.raises(SystemExit, match="ended with exit code 1 and no result"):
        bench.measured_peak()  # without a setting it fails at once
