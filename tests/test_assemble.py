"""Student and teachers on one trunk: every form of teacher, fused ones, warm starts, averages."""

import shutil

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from run_helpers import BEGIN, NO_CLIP, gradients_of, prepared, recipe_with, rows_of, run_to_end
from safetensors.torch import load_file, save_file

from diffopd import distill as loop
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch


def test_a_student_keeps_its_guidance_and_its_negative_prompt(tiny_recipe):
    def told(*overrides):
        run, trained = prepared(recipe_with(tiny_recipe, NO_CLIP, *overrides))
        watch = Watch()
        loop.one_update(run, trained, watch)
        return watch.evaluations["student"], {name: p.grad.clone() for name, p in run.student.parameters.items()}

    alone, _ = told()
    guided, plain = told("student.guidance_scale=3.0")
    assert guided == 2 * alone
    _, negative = told("student.guidance_scale=3.0", 'student.negative_prompt="ugly"')
    _, taught = told("student.guidance_scale=3.0", 'teachers.0.call.negative_prompt="ugly"')
    for other in (negative, taught):
        assert any(not torch.allclose(other[name], plain[name], rtol=1e-3) for name in plain)


def test_a_broken_teacher_is_named_before_training(tiny_recipe, tiny_teachers, tmp_path):
    shelf = tmp_path / "shelf"
    shutil.copytree(tiny_teachers[0], shelf / "dots")
    file = shelf / "dots" / "pytorch_lora_weights.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    broken = {name: torch.full_like(value, float("nan")) for name, value in load_file(file).items()}
    save_file(broken, file, metadata=metadata)
    toml = (shelf / "dots" / "teacher.toml").read_text().splitlines()
    (shelf / "dots" / "teacher.toml").write_text("\n".join(x for x in toml if not x.startswith("sha256")) + "\n")
    base = recipe_with(tiny_recipe).student.pretrained_model_name_or_path
    recipe = recipe_with(tiny.write_recipe(tmp_path / "broken" / "r.toml", base, [shelf / "dots"]))
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    with pytest.raises(UserError, match="'dots' is not finite"):
        loop.distill(recipe, folder)
    assert folder.latest_checkpoint() is None


@pytest.mark.parametrize("form", ["full", "base", "ema"])
def test_every_teacher_form_teaches(form, tiny_sd, tiny_teachers, tmp_path):
    other = tiny.write_teacher(tmp_path / "shelf" / f"by_{form}", tiny_sd, form=form)
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [tiny_teachers[0], other])
    folder = run_to_end(recipe_with(path, "train.learning_rate=1e-2"))
    last = rows_of(folder, "update")[-1]
    assert last["loss_per_teacher"][f"by_{form}"] > 0


def test_fused_teachers_teach_what_their_adapters_do(tiny_recipe):
    shared = gradients_of(recipe_with(tiny_recipe))
    fused = recipe_with(tiny_recipe, "train.fuse_teachers=true")
    run, _ = prepared(fused)
    layers = [type(module).__name__ for t in run.teachers for module in t.call.pipeline.unet.modules()]
    assert not any(name.startswith("lora") or "Lora" in name for name in layers)
    own = gradients_of(fused)
    scale = max(float(g.abs().max()) for g in shared.values())
    assert max(float((own[name] - shared[name]).abs().max()) for name in shared) <= 1e-4 * scale
    base = gradients_of(recipe_with(tiny_recipe, "teachers.0.guidance_scale=9.0"))
    assert max(float((base[name] - shared[name]).abs().max()) for name in shared) > 1e-2 * scale


def test_a_fused_student_is_trained_as_its_adapter_is(tiny_recipe, tmp_path):
    ends = []
    for name, fuse in (("branch", "false"), ("fused", "true")):
        recipe = recipe_with(tiny_recipe, f"train.fuse_student={fuse}", f'output_dir="{tmp_path / name}"')
        folder = run_to_end(recipe)
        ends.append(rows_of(folder, "update"))
    for branch, fused in zip(*ends, strict=True):
        assert fused["loss"] == pytest.approx(branch["loss"], rel=1e-4)
        assert fused["grad_norm"] == pytest.approx(branch["grad_norm"], rel=1e-3)


def predictions(unet):
    told = torch.Generator().manual_seed(7)
    latents, states = torch.randn(2, 4, 8, 8, generator=told), torch.randn(2, 5, 16, generator=told)
    with torch.no_grad():
        return unet(latents, torch.tensor([500, 20]), states).sample


def averaged_unet(tiny_sd, folders):
    """Base plus the mean of what diffusers' own loader and fusing make of each teacher."""
    base, total = tiny.load_pipeline(tiny_sd).unet, {}
    for folder in folders:
        pipeline = tiny.load_pipeline(tiny_sd)
        pipeline.load_lora_weights(str(folder))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        for name, value in pipeline.unet.state_dict().items():
            total[name] = total.get(name, 0) + value / len(folders)
    base.load_state_dict(total)
    return base


@pytest.mark.parametrize("options", [["student.rank=4"], ['student.train="full"']])
@pytest.mark.parametrize("fuse", ["true", "false"])
def test_a_student_can_begin_as_its_teachers_average(tiny_recipe, tiny_sd, tiny_teachers, options, fuse):
    untouched, _ = prepared(recipe_with(tiny_recipe, *options))
    run, _ = prepared(recipe_with(tiny_recipe, BEGIN, f"train.fuse_teachers={fuse}", *options))
    begun, expected = predictions(run.student.pipeline.unet), predictions(averaged_unet(tiny_sd, tiny_teachers))
    assert torch.allclose(begun, expected, atol=1e-5)
    assert not torch.allclose(predictions(untouched.student.pipeline.unet), expected, atol=1e-3)
    assert run.student.left_out == pytest.approx(0.0, abs=1e-5)


def test_teachers_teach_the_same_whatever_the_student_begins_from(tiny_recipe):
    told = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 5, 16)
    answers = []
    for options in ([], [BEGIN]):
        run, _ = prepared(recipe_with(tiny_recipe, *options))
        teacher = run.teachers[0].call
        with teacher.binding(), torch.no_grad():
            answers.append(teacher.pipeline.unet(*told).sample)
    assert torch.equal(*answers)


def test_what_the_rank_leaves_out_of_the_average_is_logged_and_the_run_resumes(tiny_recipe, tmp_path):
    folder = run_to_end(recipe_with(tiny_recipe, BEGIN, "student.rank=1"))
    (begin,) = rows_of(folder, "begin")
    assert 0.01 < begin["left_out"] < 1
    recipe = recipe_with(tiny_recipe, BEGIN, "student.rank=1", "train.max_train_steps=3")
    trained = dict(load_file(folder.latest_checkpoint() / "pytorch_lora_weights.safetensors"))
    loop.distill(recipe, folder)
    assert len(rows_of(folder, "begin")) == 1 and len(rows_of(folder, "update")) == 3
    assert any(
        not torch.equal(value, trained[name])
        for name, value in load_file(folder.latest_checkpoint() / "pytorch_lora_weights.safetensors").items()
    )


def test_an_average_on_layers_without_a_student_lora_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"begin_from.*no LoRA.*student\.target_modules"):
        prepared(recipe_with(tiny_recipe, BEGIN, 'student.target_modules=["to_q"]'))


def test_an_ema_teacher_follows_the_student(tiny_sd, tmp_path):
    other = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema", guidance_scale=3.0)
    recipe = recipe_with(tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [other]), "teachers.0.ema_decay=0.5")
    run, trained = prepared(recipe)
    average, written = run.teachers[0].follow
    start = {name: p.detach().clone() for name, p in run.student.parameters.items()}
    assert all(torch.equal(written[name], start[name]) for name in start)
    loop.one_update(run, trained, Watch())
    moved = [name for name, p in run.student.parameters.items() if not torch.equal(p, start[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(written[name], 0.5 * start[name] + 0.5 * run.student.parameters[name].detach())
        assert not written[name].requires_grad


def test_an_ema_teacher_of_a_warm_start_with_ranks_and_alphas_by_layer_is_the_student(tiny_sd, tiny_recipe, tmp_path):
    pipeline, other = tiny.load_pipeline(tiny_sd), tiny.load_pipeline(tiny_sd)
    config = LoraConfig(
        r=4, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}, alpha_pattern={"to_q": 16}, lora_alpha=4
    )
    other.unet.add_adapter(config)
    for name, parameter in other.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = get_peft_model_state_dict(other.unet)
    pipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=config.to_dict())
    me = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema")
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [me])
    run, _ = prepared(recipe_with(recipe, f'student.init_weights="{tmp_path}"'))
    with run.teachers[0].call.binding():
        follower = predictions(run.teachers[0].call.pipeline.unet)
    assert torch.equal(follower, predictions(run.student.pipeline.unet))
    assert torch.allclose(follower, predictions(other.unet), atol=1e-6), "the file's alphas and ranks are honoured"
