"""A full teacher as a LoRA: exact where the delta has that rank, the best cut elsewhere, the error as measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from cast import arguments, pipeline_with, scheduler_named
from torch import nn

from diffopd.adapters import add_adapter
from diffopd.drive import denoiser_of
from diffopd.errors import UserError
from diffopd.load import load_lora
from diffopd.lowrank import begin_at, low_rank, reloaded_error, save_lora

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "lowrank_teacher.py"


def changed(pipeline, rank, *, also=()):
    """A copy of the pipeline's denoiser with a delta of this rank on every linear and convolution layer."""
    import copy

    teacher = copy.deepcopy(denoiser_of(pipeline))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in teacher.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                rows, columns = layer.weight.flatten(1).shape
                down, up = (torch.randn(*size, generator=generator) for size in ((rank, columns), (rows, rank)))
                layer.weight += (up @ down).view_as(layer.weight) * 0.02
            if any(name.endswith(end) for end in also) and getattr(layer, "bias", None) is not None:
                layer.bias += 0.5
    return teacher


def answer(pipeline):
    told = arguments(pipeline=pipeline)
    return pipeline(**told).images


@pytest.mark.parametrize("scheduler", ["ddim", "flow euler"])
def test_a_delta_of_that_rank_comes_back_exactly_and_draws_the_same(scheduler, tmp_path):
    pipeline = pipeline_with(scheduler_named(scheduler))
    teacher = changed(pipeline, 3)
    found = low_rank(denoiser_of(pipeline), teacher, 3)
    convolutions = [name for name, (a, _) in found.factors.items() if a.ndim == 4]
    assert convolutions and len(found.layers) > len(convolutions)
    assert found.error < 1e-4 and not found.kept_out
    file = save_lora(found, pipeline, tmp_path)
    base = answer(pipeline)
    load_lora(pipeline, str(file), adapter_name="back")
    assert reloaded_error(found, denoiser_of(pipeline), teacher, "back") < 1e-4
    learned = answer(pipeline)
    other = pipeline_with(scheduler_named(scheduler))
    denoiser_of(other).load_state_dict(teacher.state_dict())
    torch.testing.assert_close(learned, answer(other), rtol=1e-3, atol=1e-3)
    assert float((learned - base).abs().max()) > 0.05


def test_a_higher_rank_is_cut_best_and_what_is_left_is_said(tmp_path):
    pipeline = pipeline_with(scheduler_named("ddim"))
    teacher = changed(pipeline, 8, also=("conv_norm_out", "conv_in"))
    denoiser = denoiser_of(pipeline)
    found = {rank: low_rank(denoiser, teacher, rank) for rank in (1, 4, 8)}
    assert 1 > found[1].error > found[4].error > found[8].error > 0
    assert set(found[8].kept_out) == {"conv_norm_out.bias", "conv_in.bias"}
    name = "mid_block.attentions.0.proj_in"
    delta = (teacher.get_submodule(name).weight - denoiser.get_submodule(name).weight).detach().flatten(1)
    a, b = found[4].factors[name]
    left = float((delta - b.flatten(1) @ a.flatten(1)).norm())
    assert left == pytest.approx(found[4].layers[name].left, rel=1e-3)
    assert left == pytest.approx(float(torch.linalg.svdvals(delta)[4:].norm()), rel=1e-3)
    load_lora(pipeline, str(save_lora(found[4], pipeline, tmp_path)), adapter_name="back")
    assert reloaded_error(found[4], denoiser, teacher, "back") == pytest.approx(found[4].error, rel=1e-4)


def test_directions_that_a_delta_does_not_need_can_still_be_learnt():
    """Where B = 0 and A = 0 there is no gradient, ever: only what the delta needs is overwritten."""
    unet = pipeline_with(scheduler_named("ddim")).unet
    add_adapter(unet, "student", rank=4, lora_alpha=4, target_modules=["to_q", "to_k"])
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "lora_A") and n.split(".")[-1] in ("to_q", "to_k")}
    one, none = list(layers)[:2]
    fresh = {name: layers[name].lora_A["student"].weight.clone() for name in (one, none)}
    rows, columns = layers[one].weight.shape
    delta = torch.ones(rows, 1) @ torch.arange(1.0, columns + 1)[None]
    assert begin_at(unet, "student", {one: delta, none: torch.zeros_like(layers[none].weight)}) < 1e-5
    torch.testing.assert_close(layers[one].get_delta_weight("student"), delta, rtol=1e-4, atol=1e-4)
    assert torch.equal(layers[one].lora_A["student"].weight[1:], fresh[one][1:])
    assert torch.equal(layers[none].lora_A["student"].weight, fresh[none])


def test_layers_of_a_lower_rank_keep_their_scale(tmp_path):
    """conv_out has four outputs: its rank is four where others have eight."""
    pipeline = pipeline_with(scheduler_named("ddim"))
    teacher = changed(pipeline, 8)
    found = low_rank(denoiser_of(pipeline), teacher, 8)
    assert found.layers["conv_out"].rank == 4
    load_lora(pipeline, str(save_lora(found, pipeline, tmp_path)), adapter_name="back")
    layer = denoiser_of(pipeline).conv_out
    torch.testing.assert_close(
        layer.base_layer.weight + layer.get_delta_weight("back"), teacher.conv_out.weight, rtol=1e-4, atol=1e-5
    )


def test_other_architectures_and_equal_weights_are_refused(tmp_path):
    pipeline, other = tiny.build_pipeline(), tiny.build_pipeline(cross=32)
    with pytest.raises(UserError, match="one architecture"):
        low_rank(pipeline.unet, other.unet, 2)
    with pytest.raises(UserError, match="nothing to write"):
        save_lora(low_rank(pipeline.unet, pipeline.unet, 2), pipeline, tmp_path)


def test_the_script_writes_a_lora_that_diffusers_loads_and_prints_its_error(tiny_sd, tmp_path):
    other = tiny.save_pipeline(tmp_path / "teacher", seed=7)
    command = [sys.executable, str(SCRIPT), str(tiny_sd), str(other), "--rank", "4", "--output", str(tmp_path / "lora")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert 0 < said["error"] < 1 and said["layers"]["conv_in"]["rank"] == 4
    pipeline = tiny.load_pipeline(tiny_sd)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}
