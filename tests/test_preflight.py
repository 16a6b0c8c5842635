import importlib.util
import shutil

import pytest
import tiny
from refused import edit, refusal

from diffopd.errors import UserError
from diffopd.load import load_pipeline
from diffopd.preflight import check
from diffopd.recipe import read_recipe


def test_a_good_recipe_passes_and_its_parts_are_told(own_recipe, tiny_sd):
    parts = check(read_recipe(own_recipe), hash_weights=True)
    assert parts.base.folder == tiny_sd and [card.name for card in parts.cards] == ["dots", "lines"]
    assert parts.grid.timesteps == (999, 499) and parts.grid.sigmas[0] == pytest.approx(1.0)
    assert set(parts.hashes) >= {"dots/pytorch_lora_weights.safetensors", "lines/pytorch_lora_weights.safetensors"}
    assert len(parts.train_rows["lines"]) == 4


def test_weights_are_hashed_only_when_asked(own_recipe):
    assert check(read_recipe(own_recipe)).hashes == {}


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("base/unet/diffusion_pytorch_model.safetensors", "base/unet/diffusion_pytorch_model.safetensors"),
        ("base/vae/diffusion_pytorch_model.safetensors", "base/vae/diffusion_pytorch_model.safetensors"),
        ("base/text_encoder/model.safetensors", "base/text_encoder/model.safetensors"),
        ("base/scheduler/scheduler_config.json", "base/scheduler/scheduler_config.json"),
        ("dots/prompts/train.jsonl", "dots: train prompts"),
        ("lines/prompts/test.jsonl", "lines: test prompts"),
        ("dots/reward.py", "dots: reward.py"),
        ("warm/pytorch_lora_weights.safetensors", "init_weights"),
    ],
)
def test_the_hashes_cover_all_that_a_run_begins_with(tmp_path, tiny_sd, tiny_teachers, file, named):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    own = [shutil.copytree(folder, tmp_path / folder.name) for folder in tiny_teachers]
    warm = shutil.copytree(tiny_teachers[0], tmp_path / "warm")
    path = tiny.write_recipe(tmp_path / "r.toml", base, own)
    recipe = read_recipe(path, [f'student.init_weights="{warm}/pytorch_lora_weights.safetensors"'])
    before = check(recipe, hash_weights=True).hashes
    with (tmp_path / file).open("ab") as opened:
        opened.write(b'{"prompt": "more"}\n' if file.endswith("jsonl") else b"\n")  # another file, still valid
    after = check(recipe, hash_weights=True).hashes
    assert {key for key in before if before[key] != after[key]} == {named} and set(after) == set(before)


@pytest.mark.parametrize("form", ["base", "ema"])
def test_teachers_without_weights_pass(tmp_path, tiny_sd, form):
    teacher = tiny.write_teacher(tmp_path / "itself", tiny_sd, form=form)
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [teacher])
    named = [key for key in check(read_recipe(path), hash_weights=True).hashes if not key.startswith("base/")]
    assert named == ["itself: train prompts", "itself: test prompts", "itself: reward.py"]


def test_two_averages_of_the_student_are_refused(tmp_path, tiny_sd):
    selves = [tiny.write_teacher(tmp_path / name, tiny_sd, form="ema") for name in ("me", "myself")]
    text = refusal(tiny.write_recipe(tmp_path / "r.toml", tiny_sd, selves))
    assert f"{tmp_path / 'r.toml'}:14" in text and "'me' and 'myself' are both of form" in text


def test_grids_that_do_not_nest_are_refused(own_recipe):
    text = refusal(own_recipe, "objective.substeps=3", "student.scheduler.timestep_spacing=leading")
    assert "does not contain the student's timestep" in text and "trailing" in text
    check(read_recipe(own_recipe, ["objective.substeps=5"]))


def test_substeps_of_a_scheduler_with_several_calls_a_step_are_refused(own_recipe):
    scheduler = 'student.scheduler={class="HeunDiscreteScheduler", timestep_spacing="trailing"}'
    assert "one call a step" in refusal(own_recipe, "objective.substeps=2", scheduler)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("student.scheduler.class=DDIMSchedular", 'Did you mean "DDIMScheduler"?'),
        ("student.scheduler.class=VQDiffusionScheduler", "VQDiffusionScheduler cannot be driven; known are DDIM"),
        ("student.scheduler.timestep_spacin=trailing", 'Did you mean "timestep_spacing"?'),
        ("student.scheduler.timestep_spacing=sideways", "sideways"),
        ("student.scheduler.clip_sample=true", "clip_sample"),
        ("student.call.etta=0.5", 'Did you mean "eta"?'),
        ("teachers.lines.call.guidance_rescal=0.5", 'Did you mean "guidance_rescale"?'),
        ("objective.step_weights=[1, 2, 3]", "3 weights for 2 steps"),
        ("objective.query={indices=[0, 2]}", "steps 0 to 1"),
        ("student.num_inference_steps=1000", None),
        ("student.solver=flow_sde", "flow"),
        ("teachers.0.ema_decay=0.9", 'form "ema"'),
        ("student.pretrained_model_name_or_path=emojy", "student.pretrained_model_name_or_path=emojy"),
        ("student.target_modules=[to_k]", "not TOML"),
        ("student.target_modules=['nothing']", "gives no LoRA on the base's UNet2DConditionModel"),
        ("student.target_modules=['to_q', 'to_zz', 'conv3']", "has no layer called to_zz or conv3. Correct or remove"),
        ("student.target_modules=['to_q', 'attn1.to_k', 'mid_block.resnets.0.conv1', 'conv_in']", None),
        ("student.target_modules='('", "gives no LoRA on the base's UNet2DConditionModel"),
        ("student.target_modules='.*conv1'", None),
        ("student.call.eta=-1.0", "from 0 (none) to 1"),
        ("student.call.eta=1.5", "from 0 (none) to 1"),
        ("student.call.eta=true", "from 0 (none) to 1"),
        ("teachers.dots.call.eta=2", "from 0 (none) to 1"),
        ("student.call.eta=1", None),
        ("objective.final_step=skip", "has no effect on objective 'mean'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(own_recipe, option, reason):
    if reason is None:
        check(read_recipe(own_recipe, [option]))
    else:
        assert reason in refusal(own_recipe, option)


@pytest.mark.parametrize(
    ("kind", "solver"), [("Heun", "dpmpp_2m"), ("Heun", "ddim"), ("PNDM", "dpmpp_2m"), ("KDPM2", "dpmpp_2m")]
)
def test_a_named_solver_needs_a_scheduler_of_one_call_a_step(own_recipe, kind, solver):
    kind, more = ("PNDMScheduler", ", skip_prk_steps=true") if kind == "PNDM" else (f"{kind}DiscreteScheduler", "")
    scheduler = f'student.scheduler={{class="{kind}"{more}}}'
    four = "student.num_inference_steps=4"
    text = refusal(own_recipe, scheduler, four, f"student.solver={solver}")
    assert f"--set student.solver={solver}" in text and f"{kind} makes" in text and "one call" in text
    check(read_recipe(own_recipe, [four, f"student.solver={solver}"]))


def test_an_objective_of_two_answers_needs_guidance_on_both_sides(own_recipe):
    asked, names = "objective.name=positive_direction", [card.name for card in check(read_recipe(own_recipe)).cards]
    teachers = [f"teachers.{name}.guidance_scale=2" for name in names]
    text = refusal(own_recipe, asked, *teachers)
    assert "--set objective.name=positive_direction" in text and "the student gives one (guidance_scale = 1)" in text
    assert "Set student.guidance_scale" in text
    guided = [asked, "student.guidance_scale=2", *teachers]
    check(read_recipe(own_recipe, guided))
    text = refusal(own_recipe, *guided, teachers[0].replace("=2", "=1"))
    assert f"teacher {names[0]!r} gives one" in text and f"Set teachers.{names[0]}.guidance_scale" in text


def test_a_kl_without_noise_is_refused(own_recipe):
    assert "draws no noise" in refusal(own_recipe, "objective.name=kl", "student.solver=ddim")
    still = refusal(own_recipe, "objective.name=kl")
    assert "draws no noise" in still and "student.solver = 'ddim' with student.noise_level above 0. ddim also" in still
    noisy = ["objective.name=kl", "student.solver=ddim", "student.noise_level=0.5"]
    assert "undefined at the last step" in refusal(own_recipe, *noisy)
    for remedy in ("objective.final_step=mean", "objective.query={indices=[0]}"):
        check(read_recipe(own_recipe, [*noisy, remedy]))
    native = ["objective.name=kl", "student.call.eta=0.5"]
    assert "undefined at the last step" in refusal(own_recipe, *native)
    check(read_recipe(own_recipe, [*native, "objective.final_step=skip"]))
    check(read_recipe(own_recipe, [*native, "student.scheduler.set_alpha_to_one=false"]))


def test_the_noise_at_alpha_zero_is_refused(own_recipe):
    assert "where alpha = 0" in refusal(own_recipe, "objective.name=noise")
    check(read_recipe(own_recipe, ["objective.name=noise", "objective.query={indices=[1]}"]))
    check(read_recipe(own_recipe, ["objective.name=noise", "student.scheduler.rescale_betas_zero_snr=false"]))
    assert "starts at alpha = 0" in refusal(own_recipe, "student.scheduler.prediction_type=epsilon")


def test_a_base_with_pickles_only_is_refused(own_recipe, tiny_sd, tmp_path):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "never loaded" in refusal(own_recipe, f'student.pretrained_model_name_or_path="{other}"')
    weights.with_suffix(".bin").unlink()
    assert "no .safetensors weights" in refusal(own_recipe, f'student.pretrained_model_name_or_path="{other}"')


def test_two_teachers_of_one_name_are_refused(own_recipe, own_teachers):
    edit(own_teachers[1], 'name = "lines"', 'name = "dots"')
    assert "two teachers are called 'dots'" in refusal(own_recipe)


def test_a_scheduler_whose_package_is_absent_names_it(own_recipe, monkeypatch):
    from diffusers.schedulers import scheduling_euler_discrete as euler

    monkeypatch.setattr(euler, "is_scipy_available", lambda: False)
    text = refusal(own_recipe, 'student.scheduler={class="EulerDiscreteScheduler", use_beta_sigmas=true}')
    assert "EulerDiscreteScheduler needs a package that is not installed: Make sure to install scipy" in text
    assert "could not be driven" not in text


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="says what happens without scipy")
def test_an_absent_package_is_not_recommended_for_a_scheduler_that_cannot_be_driven_anyway(own_recipe):
    text = refusal(own_recipe, 'student.scheduler={class="LMSDiscreteScheduler", use_karras_sigmas=true}')
    assert "LMSDiscreteScheduler requires the scipy library" in text
    assert "could not be driven even then; known are DDIMScheduler" in text


def test_a_student_is_scored_only_at_a_number_of_steps_that_it_can_be_called_with(own_recipe):
    check(read_recipe(own_recipe, ["evaluate.student_steps=8"]))
    text = refusal(own_recipe, "evaluate.student_steps=60", 'student.scheduler={class="LCMScheduler"}')
    assert "--set evaluate.student_steps=60: " in text and "LCMScheduler refuses 60 steps" in text


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_base_of_variants_alone_is_refused_as_loading_would_refuse_it(tmp_path, tiny_sd, component):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    (file,) = (base / component).glob("*.safetensors")
    file.rename(file.with_suffix(".fp16.safetensors"))
    teacher = tiny.write_teacher(tmp_path / "itself", base, form="base")
    text = refusal(tiny.write_recipe(tmp_path / "r.toml", base, [teacher]))
    assert f"r.toml:5: {base / component} has {file.stem}.fp16.safetensors, but the weights that are loaded" in text
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(base))
