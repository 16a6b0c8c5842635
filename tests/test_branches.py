"""The two answers of a guided prediction, read beside the sum that a scheduler receives."""

import contexts
import pytest
import tiny
import torch

from diffopd.adapters import STUDENT, add_adapter, freeze
from diffopd.branches import split
from diffopd.context import ReferenceImage
from diffopd.drive import Call, Walk, shell
from diffopd.objective import get_objective
from diffopd.supervise import Manner, supervise


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", ["two", "two, negative first", "one of 2B"])
def test_answers_are_believed_where_they_add_up(form, sign):
    positive, negative = drawn(2, 6, 3), drawn(2, 6, 3, seed=1)
    answers = {"two": [positive, negative], "two, negative first": [negative, positive]}
    answers = answers.get(form, [torch.cat([negative, positive])])
    cut = [answer[:, :4] for answer in (positive, negative)]
    guided = sign * (cut[1] + 3.5 * (cut[0] - cut[1]))
    for found, wanted in zip(split(answers, guided, 3.5), cut, strict=True):
        torch.testing.assert_close(found, sign * wanted)
    with pytest.raises(ValueError, match="Guide both sides"):
        split(answers, guided + 0.1, 3.5)
    with pytest.raises(ValueError, match="Guide both sides"):
        split(answers[:1] if len(answers) == 2 else [], guided, 3.5)


def klein(folder):
    """A guided klein and, for its teacher, a picture in both branches."""
    pipeline = contexts.build_klein()
    pipeline.register_to_config(is_distilled=False)
    (row,), context = contexts.draw_rows(folder, ((64, 64),)), ReferenceImage()
    told = {
        "num_inference_steps": 2, "output_type": "latent", "latents": drawn(1, 16, 4, 4), "height": 16, "width": 16,
        "text_encoder_out_layers": (1, 2), "max_sequence_length": 128,
    }  # fmt: skip
    seeing = {"prompt": context.prompts([row]), **context.arguments([row])}
    return pipeline, told | {"prompt": [row.prompt]}, told | seeing


def sd(folder):
    told = {"num_inference_steps": 2, "output_type": "latent", "latents": drawn(2, 4, 8, 8)}
    return tiny.build_pipeline(), told | {"prompt": ["a", "b"]}, told | {"prompt": ["a dot", "two dots"]}


def first(pipeline, told, guidance_scale, **options):
    """Velocities at the first state: of the two branches where the walk keeps them, else of its prediction."""
    with torch.no_grad(), Walk(Call(shell(pipeline), told | {"guidance_scale": guidance_scale}), **options) as walk:
        visit = walk.advance()
        if options:
            return [branch.velocity for branch in visit.branches(guidance_scale)]
        return visit.prediction.velocity


@pytest.mark.parametrize("build", [sd, klein])
def test_each_branch_is_what_an_unguided_call_says(tmp_path, build):
    pipeline, _, told = build(tmp_path)
    freeze(pipeline)
    positive, negative = first(pipeline, told, 4.0, keeps_answers=True)
    unguided = first(pipeline, told, 1.0)
    empty = first(pipeline, told | {"prompt": [""] * len(told["prompt"])}, 1.0)
    torch.testing.assert_close(positive, unguided, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(negative, empty, atol=1e-5, rtol=1e-4)
    assert (positive - negative).abs().max() > 1e-3


def test_the_gradient_is_that_of_four_unguided_answers(tmp_path):
    """With a picture in both of the teacher's branches: klein, guided on both sides."""
    pipeline, told, seeing = klein(tmp_path)
    freeze(pipeline)
    parameters = add_adapter(pipeline.transformer, STUDENT, rank=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    sides = [Call(shell(pipeline), {**side, "guidance_scale": 4.0}) for side in (told, seeing)]
    manner = Manner(get_objective("positive_direction"), [0], needs_branches=True)
    (state,) = supervise(*sides, manner=manner, noise=lambda index: None, backward=lambda loss: loss.sum().backward())
    found = [parameter.grad.clone() for parameter in parameters.values()]
    taught = [first(pipeline, seeing | {"prompt": prompt}, 1.0) for prompt in (seeing["prompt"], [""])]
    with Walk(Call(shell(pipeline), told | {"guidance_scale": 1.0})) as a:
        positive = a.advance(grad=True).prediction.velocity
    with Walk(Call(shell(pipeline), told | {"guidance_scale": 1.0, "prompt": [""]})) as b:
        negative = b.advance(grad=True).prediction.velocity
    loss = (positive - taught[0]).square().mean() + ((positive - negative) - (taught[0] - taught[1])).square().mean()
    torch.testing.assert_close(state.loss, loss.detach()[None], atol=1e-6, rtol=1e-4)
    for one, other in zip(found, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_streaming_and_two_pass_gradients_are_equal_of_two_guided_answers():
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    parameters = add_adapter(pipeline.unet, STUDENT, rank=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05)
    _, told, others = sd(None)
    sides = [
        Call(shell(pipeline), {**side, "guidance_scale": 2.0, "num_inference_steps": 3}) for side in (told, others)
    ]
    gradients = []
    for two_pass in (False, True):
        manner = Manner(get_objective("positive_direction"), [0, 2], needs_branches=True, two_pass=two_pass)
        states = supervise(*sides, manner=manner, noise=lambda index: None, backward=lambda loss: loss.sum().backward())
        assert [state.index for state in states] == [0, 2]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters.values()]))
        pipeline.unet.zero_grad()
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_a_side_without_guidance_is_explained():
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    sides = [Call(shell(pipeline), {**sd(None)[1], "guidance_scale": scale}) for scale in (2.0, 1.0)]
    manner = Manner(get_objective("positive_direction"), [0], needs_branches=True)
    with pytest.raises(ValueError, match="Guide both sides"):
        supervise(*sides, manner=manner, noise=lambda index: None, backward=None)
