"""Frozen weights in bfloat16: what is trained, its gradients and all states stay float32, gradients agree."""

import pytest
import tiny
import torch
from cast import arguments, cast_for, scheduler_named
from run_helpers import NO_CLIP, gradients_of, prepared, recipe_with, run_to_end, weights_of

from diffopd import distill as loop
from diffopd.adapters import autocast_forward
from diffopd.drawing import draw
from diffopd.drive import Call, denoiser_of, rollout
from diffopd.precision import answer_in_float32
from diffopd.supervise import Watch

BF16 = 'train.frozen_dtype="bf16"'


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def assert_close_as_bf16(a, b):
    a, b = flat(a), flat(b)
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99
    assert abs(float(a.norm() / b.norm()) - 1) < 0.05


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ['train.mixed_precision="bf16"'],
        ["train.gradient_checkpointing=true"],
        ['student.solver="ddim"'],
        ["train.fuse_teachers=true"],
        ['student.train="full"'],
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_gradients_agree_with_float32_to_bf16_precision(tiny_recipe, settings):
    plain = [s for s in settings if "mixed" not in s]
    assert_close_as_bf16(
        gradients_of(recipe_with(tiny_recipe, NO_CLIP, *plain)),
        gradients_of(recipe_with(tiny_recipe, NO_CLIP, BF16, *settings)),
    )


def test_what_is_frozen_is_bf16_and_what_is_trained_float32(tiny_recipe):
    run, trained = prepared(recipe_with(tiny_recipe, BF16))
    unet = run.student.pipeline.unet
    frozen = {p.dtype for name, p in unet.named_parameters() if ".lora_" not in name}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in run.student.pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.student.pipeline.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in trained.parameters.values()} == {torch.float32}
    assert all(".student." in name for name in trained.parameters)
    loop.one_update(run, trained, Watch())
    assert {p.grad.dtype for p in trained.parameters.values()} == {torch.float32}


def test_a_fully_trained_student_is_float32_beside_bf16_teachers(tiny_sd, tmp_path):
    other = tiny.write_teacher(tmp_path / "shelf" / "own", tiny_sd, form="full")
    recipe = recipe_with(tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [other]), BF16, 'student.train="full"')
    run, _ = prepared(recipe)
    assert {p.dtype for p in run.student.pipeline.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in run.teachers[0].call.pipeline.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["ddim", "flow euler"])
def test_states_and_predictions_stay_float32_on_a_bf16_trunk(name):
    """A stock call rounds its states to bf16; here two states may differ by less than bf16 can tell."""
    cast = cast_for(scheduler_named(name))
    pipeline = cast.pipeline.to(dtype=torch.bfloat16)
    denoiser = denoiser_of(pipeline)
    seen = []
    denoiser.register_forward_pre_hook(lambda m, a, k: seen.append((a or tuple(k.values()))[0].dtype), with_kwargs=True)
    answer_in_float32(denoiser, torch.bfloat16)
    told = arguments(pipeline=pipeline) | {"latents": cast.student.arguments["latents"]}
    visits = list(rollout(Call(pipeline, told)))
    for visit in visits[1:]:
        assert visit.sample.dtype == visit.model_output.dtype == torch.float32
        assert not torch.equal(visit.sample, visit.sample.bfloat16().float())


def test_a_run_with_a_bf16_trunk_goes_to_its_end_and_exports_a_float32_adapter(tiny_recipe):
    weights = weights_of(run_to_end(recipe_with(tiny_recipe, BF16)), 2)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_no_weights_of_a_swapped_adapter_or_average_are_left_over(tiny_recipe):
    run, trained = prepared(recipe_with(tiny_recipe, BF16, "train.ema_decay=0.5", "train.learning_rate=1e-1"))
    call = run.student.call.prompted(["a dot"], latents=torch.zeros(1, 4, 8, 8))
    before = [visit.model_output for visit in rollout(call)]
    loop.one_update(run, trained, Watch())
    after = [visit.model_output for visit in rollout(call)]
    with loop.averaged(trained):
        average = [visit.model_output for visit in rollout(call)]
    again = [visit.model_output for visit in rollout(call)]
    assert not torch.equal(before[0], after[0]) and not torch.equal(after[0], average[0])
    assert all(map(torch.equal, after, again))


@pytest.mark.parametrize("settings", [[], ['student.train="full"']], ids=["lora", "full"])
def test_a_stock_call_under_autocast_keeps_float32_states_which_its_float32_vae_decodes(tiny_recipe, settings):
    """Some schedulers answer in the dtype of what the network said."""
    euler = 'student.scheduler={class="EulerDiscreteScheduler"}'
    run, _ = prepared(recipe_with(tiny_recipe, 'train.mixed_precision="bf16"', euler, *settings))
    call = run.student.call
    with autocast_forward(denoiser_of(call.pipeline), torch.bfloat16):
        (image,) = draw(run, call, ["a dot"], [0], None)
        (visit, *_) = rollout(call.prompted(["a dot"]))
    assert image.size == (16, 16) and visit.model_output.dtype == torch.float32
    assert torch.equal(visit.model_output, visit.model_output.bfloat16().float()), "it was computed in bfloat16"
