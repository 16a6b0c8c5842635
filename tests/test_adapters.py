"""Adapters bound by switch: the same answers as peft's set_adapter, none of its side effects."""

from contextlib import nullcontext

import pytest
import torch
from cast import arguments, cast_for, draws, scheduler_named

from diffopd.adapters import STUDENT, AdapterSwitch, Average, add_adapter, autocast_forward, fused_forward
from diffopd.drive import Call, rollout


def answer(unet, *, grad=False):
    told = arguments()
    with torch.set_grad_enabled(grad):
        return unet(draws(3, 1), torch.tensor(500), told["prompt_embeds"]).sample


@pytest.fixture
def cast():
    return cast_for(scheduler_named("ddim"))


@pytest.mark.parametrize("name", [STUDENT, "teacher"])
def test_a_bound_adapter_answers_as_after_set_adapter(cast, name):
    unet = cast.pipeline.unet
    with cast.switch.bound(name):
        bound = answer(unet)
    unet.set_adapter(name)
    assert torch.equal(bound, answer(unet))


def test_no_adapter_is_the_base(cast):
    unet = cast.pipeline.unet
    with cast.switch.bound(None):
        bound = answer(unet)
    unet.disable_adapters()
    assert torch.equal(bound, answer(unet))
    unet.enable_adapters()
    assert not torch.equal(bound, answer(unet))


def test_binding_keeps_requires_grad_and_is_undone_even_by_an_error(cast):
    before = {name: p.requires_grad for name, p in cast.pipeline.unet.named_parameters()}
    plain = answer(cast.pipeline.unet)
    with pytest.raises(ZeroDivisionError), cast.switch.bound("teacher"):
        _ = 1 / 0
    assert {name: p.requires_grad for name, p in cast.pipeline.unet.named_parameters()} == before
    assert torch.equal(answer(cast.pipeline.unet), plain)


def test_an_unknown_adapter_is_refused_and_the_known_ones_are_named(cast):
    with pytest.raises(KeyError, match="student.*teacher"):
        cast.switch.select("nobody")


def test_a_fresh_adapter_changes_nothing_and_is_float32(cast):
    unet = cast.pipeline.unet
    with cast.switch.bound(None):
        base = answer(unet)
    parameters = add_adapter(unet.to(torch.float32), "fresh", rank=2, lora_alpha=2, target_modules=["to_k"])
    with AdapterSwitch(unet).bound("fresh"):
        assert torch.equal(answer(unet), base)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())


def test_autocast_keeps_no_stale_weights_across_an_adapter_change(cast):
    unet = cast.pipeline.unet
    with autocast_forward(unet, torch.bfloat16):
        before = answer(unet)
        with torch.no_grad():
            for parameter in cast.parameters.values():
                parameter.mul_(3)
        after = answer(unet)
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before, after)
    with autocast_forward(unet, torch.bfloat16):
        assert torch.equal(answer(unet), after)
    assert "forward" not in vars(unet)


def test_autocast_is_that_of_the_device_where_the_denoiser_is_when_it_is_asked(monkeypatch):
    """An offloaded denoiser is on the CPU when autocast is put around its forward."""
    denoiser, seen = torch.nn.Linear(2, 2), []
    entered = torch.autocast

    def noted(device_type, **options):
        seen.append(device_type)
        return entered("cpu", **options)

    monkeypatch.setattr(torch, "autocast", noted)
    with autocast_forward(denoiser, torch.bfloat16):
        denoiser(torch.zeros(1, 2))
        denoiser.to("meta")
        denoiser(torch.zeros(1, 2, device="meta"))
    assert seen == ["cpu", "meta"]


def test_a_fused_forward_is_every_adapters_own_function_with_its_gradient(cast):
    unet = cast.pipeline.unet

    def answers_and_gradient():
        with cast.switch.bound("teacher"):
            taught = answer(unet)
        with cast.switch.bound(None):
            base = answer(unet)
        with cast.switch.averaged([STUDENT, "teacher"]):
            averaged = answer(unet)
        said = answer(unet, grad=True)
        said.square().sum().backward()
        return (taught, base, averaged, said.detach()), cast.gradient()

    plain, gradient = answers_and_gradient()
    with fused_forward(unet):
        fused, fused_gradient = answers_and_gradient()
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert "forward" not in vars(unet)


def test_one_fold_for_many_forwards_gives_the_gradient_of_a_fold_each(cast):
    unet, folds = cast.pipeline.unet, []

    def gradient(once):
        for parameter in cast.parameters.values():
            parameter.grad = None
        with fused_forward(unet) as fold:
            whole = fold._folded
            fold._folded = lambda: folds.append(whole()) or folds[-1]
            with fold.once() if once else nullcontext():
                for scale in (1.0, 2.0, 3.0):
                    with cast.switch.bound("teacher"):
                        taught = answer(unet)
                    ((answer(unet, grad=True) - taught) * scale).square().sum().backward()
        return cast.gradient()

    each, made = gradient(once=False), len(folds)
    torch.testing.assert_close(gradient(once=True), each, rtol=1e-4, atol=1e-5 * float(each.abs().max()))
    assert (made, len(folds) - made) == (6, 2), "the student's weights and the teacher's are folded once each"
    with fused_forward(unet) as fold:
        with fold.once():
            before = answer(unet)
        with torch.no_grad():
            for parameter in cast.parameters.values():
                parameter.mul_(3)
        with fold.once():
            assert not torch.equal(answer(unet), before), "the next update folds the weights that it finds"


def test_an_average_of_decay_d_reaches_the_known_value_and_lends_itself_only_for_a_while(cast):
    average = Average(cast.parameters, decay=0.9)
    start = {name: value.clone() for name, value in average.values.items()}
    with torch.no_grad():
        for parameter in cast.parameters.values():
            parameter.add_(1.0)
    for _ in range(3):
        average.update(cast.parameters)
    name = next(iter(start))
    torch.testing.assert_close(average.values[name], start[name] + (1 - 0.9**3))
    kept = cast.parameters[name].detach().clone()
    with average.applied(cast.parameters):
        torch.testing.assert_close(cast.parameters[name].detach(), average.values[name])
    assert torch.equal(cast.parameters[name], kept)


def test_a_teacher_walk_binds_its_adapter_only_between_pauses(cast):
    call = Call(cast.teacher.pipeline, cast.teacher.arguments, cast.teacher.binding)
    layer = cast.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    for visit in rollout(call):
        assert layer._active_adapter == [STUDENT]
        assert visit.index < 4


def test_the_average_of_adapters_is_the_average_of_their_fused_weights(cast):
    unet = cast.pipeline.unet
    with cast.switch.averaged([STUDENT, "teacher"]):
        averaged = answer(unet)
    layers = [m for m in unet.modules() if hasattr(m, "get_delta_weight") and "teacher" in m.lora_A]
    before = [layer.base_layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.weight += 0.5 * (layer.get_delta_weight(STUDENT) + layer.get_delta_weight("teacher"))
    with cast.switch.bound(None):
        fused = answer(unet)
    torch.testing.assert_close(averaged, fused, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer, weight in zip(layers, before, strict=True):
            layer.base_layer.weight.copy_(weight)
    with cast.switch.bound(None):
        assert not torch.allclose(answer(unet), fused, atol=1e-4)
