"""Attention backends: taken by name where layers dispatch, refused where diffusers would accept them without effect."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from cast import arguments, pipeline_with, scheduler_named
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from run_helpers import recipe_with, run_to_end

from diffopd.attention import check_attention_backend, dispatches, proof_of_use, use_attention_backend
from diffopd.drive import Call, Walk, denoiser_of
from diffopd.errors import UserError
from diffopd.recipe import ATTENTION_BACKENDS


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def answer(denoiser):
    generator = torch.Generator().manual_seed(2)
    told = {
        "hidden_states": torch.randn(1, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return denoiser(**told).sample


def test_every_backend_of_diffusers_is_a_name_here_but_those_without_gradients():
    known = {backend.value for backend in AttentionBackendName}
    trainable = {name for name in known if not name.lstrip("_").startswith(("sage", "flex"))}
    assert set(ATTENTION_BACKENDS.__args__) == trainable | {"default"}


@pytest.mark.parametrize("name", ["sage", "_sage_qk_int8_pv_fp16_triton", "flex"])
def test_a_backend_without_gradients_is_refused(tiny_recipe, name):
    with pytest.raises(UserError, match="computes no gradients"):
        recipe_with(tiny_recipe, f"train.attention_backend={name}")


@pytest.mark.parametrize("name", ["_native_math", "native"])
def test_a_dispatching_denoiser_really_uses_the_backend_and_no_other_model_does(name):
    denoiser, other = flux(), flux()
    before = _AttentionBackendRegistry._active_backend
    with torch.no_grad():
        plain = answer(denoiser)
    use_attention_backend(denoiser, name)
    assert _AttentionBackendRegistry._active_backend == before
    with torch.no_grad(), proof_of_use(name, denoiser):
        chosen = answer(denoiser)
    torch.testing.assert_close(chosen, plain, rtol=1e-4, atol=1e-5)
    if name != before.value:  # which every other model uses anyway
        with torch.no_grad(), pytest.raises(UserError, match="never called"), proof_of_use(name, denoiser):
            answer(other)


def test_each_denoiser_must_call_the_backend_itself():
    chosen, other = flux(), flux()
    use_attention_backend(chosen, "_native_math")
    with pytest.raises(UserError, match="never called"), torch.no_grad(), proof_of_use("_native_math", chosen, other):
        answer(chosen), answer(other)
    use_attention_backend(other, "_native_math")
    with torch.no_grad(), proof_of_use("_native_math", chosen, other):
        answer(chosen), answer(other)


@pytest.mark.parametrize("scheduler", ["ddim", "flow euler"])
def test_on_unets_and_sd3_the_calls_of_xformers_own_kernel_are_counted(scheduler, monkeypatch):
    """Its kernel needs a GPU: torch's own stands in for it, behind the processors that diffusers has for xformers."""
    from diffusers.models import attention_processor as processors

    def kernel(query, key, value, attn_bias=None, **options):  # (B, L, [heads,] C)
        heads = [x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value)]
        found = torch.nn.functional.scaled_dot_product_attention(*heads)
        return found.transpose(1, 2) if query.ndim == 4 else found

    monkeypatch.setattr(processors, "xformers", SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=kernel)))
    pipeline = pipeline_with(scheduler_named(scheduler))
    denoiser = denoiser_of(pipeline)
    call = Call(pipeline, arguments(1, 2, pipeline=pipeline))
    with pytest.raises(UserError, match="never called"), proof_of_use("xformers", denoiser), Walk(call) as walk:
        walk.advance()
    is_unet = scheduler == "ddim"
    kind = processors.XFormersAttnProcessor if is_unet else processors.XFormersJointAttnProcessor
    for module in denoiser.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(kind())
    with proof_of_use("xformers", denoiser), Walk(call) as walk:
        walk.advance()


def test_gradients_flow_through_a_chosen_backend():
    gradients = []
    for name in ("default", "_native_math"):
        denoiser = flux()
        use_attention_backend(denoiser, name)
        answer(denoiser).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "flow euler"])
def test_unets_and_sd3_would_ignore_the_name_so_it_is_refused(scheduler):
    denoiser = denoiser_of(pipeline_with(scheduler_named(scheduler)))
    assert not dispatches(denoiser)
    with pytest.raises(UserError, match=f"no effect on {type(denoiser).__name__}"):
        use_attention_backend(denoiser, "native")


def test_a_plan_says_of_a_backend_what_the_run_would_say():
    for denoiser, name in ((flux(), "flash"), (denoiser_of(pipeline_with(scheduler_named("ddim"))), "xformers")):
        with pytest.raises(UserError, match="cannot be used here") as of_the_run:
            use_attention_backend(denoiser, name)
        with pytest.raises(UserError) as of_the_plan:
            check_attention_backend(denoiser.to("meta"), name)
        assert str(of_the_plan.value) == str(of_the_run.value)
    check_attention_backend(flux().to("meta"), "native")


def test_a_backend_that_is_not_installed_is_named(tiny_recipe):
    with pytest.raises(UserError, match='"flash" cannot be used here'):
        use_attention_backend(flux(), "flash")
    with pytest.raises(UserError, match=r"xformers.*diffopd\[xformers\]"):
        run_to_end(recipe_with(tiny_recipe, 'train.attention_backend="xformers"'))
