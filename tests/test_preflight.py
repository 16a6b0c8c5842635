import importlib.util
import json
import shutil
import sys

import pytest
import rehearsed
import tiny

from diffopd.errors import UserError
from diffopd.preflight import check
from diffopd.recipe import read_recipe


@pytest.fixture
def teachers(tiny_teachers, tmp_path):
    """Copies of the tiny teachers that a test may spoil."""
    return [shutil.copytree(folder, tmp_path / "mine" / folder.name) for folder in tiny_teachers]


@pytest.fixture
def recipe_file(tmp_path, tiny_sd, teachers):
    return tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, teachers)


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        check(read_recipe(path, list(overrides)), hash_weights=True)
    return str(caught.value)


def test_a_good_recipe_passes_and_its_parts_are_told(recipe_file, tiny_sd):
    parts = check(read_recipe(recipe_file), hash_weights=True)
    assert parts.base.folder == tiny_sd and [card.name for card in parts.cards] == ["dots", "lines"]
    assert parts.grid.timesteps == (999, 499) and parts.grid.sigmas[0] == pytest.approx(1.0)
    assert set(parts.hashes) >= {"dots/pytorch_lora_weights.safetensors", "lines/pytorch_lora_weights.safetensors"}
    assert len(parts.train_rows["lines"]) == 4


def test_weights_are_hashed_only_when_asked(recipe_file):
    assert check(read_recipe(recipe_file)).hashes == {}


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


def test_only_lora_teachers_are_averaged_and_a_start_is_said_once(tmp_path, tiny_sd, tiny_teachers):
    other = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full")
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [tiny_teachers[0], other])
    assert "'whole' is of form \"full\"" in refusal(recipe, 'student.begin_from="teacher_average"')
    recipe = tiny.write_recipe(tmp_path / "r2.toml", tiny_sd, tiny_teachers)
    check(read_recipe(recipe, ['student.begin_from="teacher_average"']))
    warm = f'student.init_weights="{tiny_teachers[0]}/pytorch_lora_weights.safetensors"'
    with pytest.raises(UserError, match="Remove one of the two"):
        read_recipe(recipe, ['student.begin_from="teacher_average"', warm])


def test_a_lora_of_another_unet_is_refused(recipe_file, teachers, tmp_path):
    wide = tiny.save_pipeline(tmp_path / "wide", cross=32)
    tiny.save_lora(teachers[1], wide, seed=4)
    edit(teachers[1], "sha256", "# ")
    assert "does not fit the base: its layer" in refusal(recipe_file)


def test_a_lora_for_a_transformer_is_refused(recipe_file, teachers):
    from safetensors.torch import load_file, save_file

    path = teachers[1] / "pytorch_lora_weights.safetensors"
    save_file({key.replace("unet.", "transformer.", 1): value for key, value in load_file(path).items()}, path)
    assert "for a transformer, the base has a unet" in refusal(recipe_file)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "cross_attention_dim", 32),
        ("unet/config.json", "in_channels", 9),
        ("unet/config.json", "layers_per_block", 2),
        ("vae/config.json", "scaling_factor", 0.5),
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
        ("text_encoder/config.json", "hidden_size", 64),
    ],
)
def test_a_teacher_of_another_architecture_latent_space_or_noise_schedule_is_refused(
    recipe_file, teachers, tiny_sd, tmp_path, file, key, value
):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    config = json.loads((other / file).read_text()) | {key: value}
    (other / file).write_text(json.dumps(config))
    edit(teachers[1], f'base = "{tiny_sd}"', f'base = "{other}"')
    text = refusal(recipe_file)
    assert "cannot stand at the student's states" in text and key in text and "'lines'" in text
    assert f"{recipe_file}:14" in text


def test_a_teacher_on_a_copy_of_the_base_passes(recipe_file, teachers, tiny_sd, tmp_path):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    edit(teachers[1], f'base = "{tiny_sd}"', f'base = "{other}"')
    check(read_recipe(recipe_file))


def test_full_teachers_fit_by_config_or_by_shapes(tmp_path, tiny_sd):
    full = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full")
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [full])
    check(read_recipe(path), hash_weights=True)
    (full / "unet" / "config.json").unlink()
    check(read_recipe(path))
    tiny.build_pipeline(cross=32).unet.save_pretrained(full / "unet")
    assert "cross_attention_dim is 32" in refusal(path)
    (full / "unet" / "config.json").unlink()
    assert "tensors differ" in refusal(path)


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


def test_grids_that_do_not_nest_are_refused(recipe_file):
    text = refusal(recipe_file, "objective.substeps=3", "student.scheduler.timestep_spacing=leading")
    assert "does not contain the student's timestep" in text and "trailing" in text
    check(read_recipe(recipe_file, ["objective.substeps=5"]))


def test_substeps_of_a_scheduler_with_several_calls_a_step_are_refused(recipe_file):
    scheduler = 'student.scheduler={class="HeunDiscreteScheduler", timestep_spacing="trailing"}'
    assert "one call a step" in refusal(recipe_file, "objective.substeps=2", scheduler)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("student.scheduler.class=DDIMSchedular", 'Did you mean "DDIMScheduler"?'),
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
def test_settings_that_do_not_fit_are_refused_with_the_reason(recipe_file, option, reason):
    if reason is None:
        check(read_recipe(recipe_file, [option]))
    else:
        assert reason in refusal(recipe_file, option)


@pytest.mark.parametrize(
    ("kind", "solver"), [("Heun", "dpmpp_2m"), ("Heun", "ddim"), ("PNDM", "dpmpp_2m"), ("KDPM2", "dpmpp_2m")]
)
def test_a_named_solver_needs_a_scheduler_of_one_call_a_step(recipe_file, kind, solver):
    kind, more = ("PNDMScheduler", ", skip_prk_steps=true") if kind == "PNDM" else (f"{kind}DiscreteScheduler", "")
    scheduler = f'student.scheduler={{class="{kind}"{more}}}'
    four = "student.num_inference_steps=4"
    text = refusal(recipe_file, scheduler, four, f"student.solver={solver}")
    assert f"--set student.solver={solver}" in text and f"{kind} makes" in text and "one call" in text
    check(read_recipe(recipe_file, [four, f"student.solver={solver}"]))


@pytest.mark.parametrize(
    ("option", "name"), [("train.report_to=['wandb']", "wandb"), ("train.attention_backend=xformers", "xformers")]
)
def test_optional_packages_that_are_missing_are_named_with_their_extra(recipe_file, monkeypatch, option, name):
    monkeypatch.setitem(sys.modules, name, None)
    text = refusal(recipe_file, option)
    assert f"--set {option}" in text and f"Install diffopd[{name}]" in text


def test_a_folder_of_a_packages_name_is_not_the_package(recipe_file, monkeypatch, tmp_path):
    (tmp_path / "cwd" / "wandb").mkdir(parents=True)  # what a run of wandb leaves behind
    monkeypatch.syspath_prepend(tmp_path / "cwd")
    assert "Install diffopd[wandb]" in refusal(recipe_file, "train.report_to=['wandb']")


def test_a_kl_without_noise_is_refused(recipe_file):
    assert "draws no noise" in refusal(recipe_file, "objective.name=kl", "student.solver=ddim")
    assert "draws no noise" in refusal(recipe_file, "objective.name=kl")
    noisy = ["objective.name=kl", "student.solver=ddim", "student.noise_level=0.5"]
    assert "undefined at the last step" in refusal(recipe_file, *noisy)
    for remedy in ("objective.final_step=mean", "objective.query={indices=[0]}"):
        check(read_recipe(recipe_file, [*noisy, remedy]))
    native = ["objective.name=kl", "student.call.eta=0.5"]
    assert "undefined at the last step" in refusal(recipe_file, *native)
    check(read_recipe(recipe_file, [*native, "objective.final_step=skip"]))
    check(read_recipe(recipe_file, [*native, "student.scheduler.set_alpha_to_one=false"]))


def test_the_noise_at_alpha_zero_is_refused(recipe_file):
    assert "where alpha = 0" in refusal(recipe_file, "objective.name=noise")
    check(read_recipe(recipe_file, ["objective.name=noise", "objective.query={indices=[1]}"]))
    check(read_recipe(recipe_file, ["objective.name=noise", "student.scheduler.rescale_betas_zero_snr=false"]))
    assert "starts at alpha = 0" in refusal(recipe_file, "student.scheduler.prediction_type=epsilon")


def test_a_base_with_pickles_only_is_refused(recipe_file, tiny_sd, tmp_path):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "never loaded" in refusal(recipe_file, f'student.pretrained_model_name_or_path="{other}"')
    weights.with_suffix(".bin").unlink()
    assert "no .safetensors weights" in refusal(recipe_file, f'student.pretrained_model_name_or_path="{other}"')


def test_a_truncated_weights_file_is_refused(recipe_file, teachers):
    (teachers[0] / "pytorch_lora_weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "header is broken" in refusal(recipe_file)


def test_a_weights_file_that_was_not_copied_to_its_end_is_refused(recipe_file, teachers):
    file = teachers[0] / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut short (" in refusal(recipe_file)


def test_a_warm_start_is_checked(recipe_file, tiny_teacher, tmp_path):
    check(read_recipe(recipe_file, [f'student.init_weights="{tiny_teacher}/pytorch_lora_weights.safetensors"']))
    assert "no .safetensors" in refusal(recipe_file, f'student.init_weights="{tmp_path}/none.safetensors"')
    wide = tiny.save_pipeline(tmp_path / "wide", cross=32)
    lora = tiny.save_lora(tmp_path / "wide-lora", wide, seed=0)
    assert "does not fit the base: its layer" in refusal(recipe_file, f'student.init_weights="{lora}"')


def test_more_test_prompts_than_there_are_is_refused(recipe_file):
    assert "'dots' has 2 test prompts" in refusal(recipe_file, "evaluate.num_prompts=3")


def test_two_teachers_of_one_name_are_refused(recipe_file, teachers):
    edit(teachers[1], 'name = "lines"', 'name = "dots"')
    assert "two teachers are called 'dots'" in refusal(recipe_file)


def edit(folder, before, after):
    path = folder / "teacher.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_pictures_of_data_states_are_checked_before_anything_is_written(recipe_file, teachers, tmp_path):
    data = "objective.states=data"
    train = teachers[0] / "prompts" / "train.jsonl"
    assert f"{train}:1: the row names no picture" in refusal(recipe_file, data)
    rows = [{"prompt": f"dot {n}", "file_name": "dot.png"} for n in range(3)]
    (train.parent / "dots.png").write_bytes(b"")
    for teacher in teachers:
        file = teacher / "prompts" / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refusal(recipe_file, data)
    assert f"{train}:1: there is no picture" in text and f'Did you mean "{train.parent / "dots.png"}"?' in text
    for teacher in teachers:
        (teacher / "prompts" / "dot.png").write_bytes(b"")
    check(read_recipe(recipe_file, [data]))
    assert "test.jsonl:1: the row names no picture" in refusal(recipe_file, data, "train.validate_every=1")
    assert not (tmp_path / "run").exists()


def test_all_sides_draw_at_one_size(recipe_file):
    size = "student.call={height=32}"
    text = refusal(recipe_file, size)
    assert "teacher 'dots' is called with height = the default, the student with 32" in text
    check(read_recipe(recipe_file, [size, *(f"teachers.{name}.call={{height=32}}" for name in ("dots", "lines"))]))


def test_an_attention_backend_that_the_run_would_refuse_is_refused_by_the_plan(recipe_file):
    text = refusal(recipe_file, "train.attention_backend=native")
    assert "--set train.attention_backend=native: " in text and "has no effect on UNet2DConditionModel" in text


def test_a_quantization_that_diffusers_would_refuse_is_refused_by_the_plan(recipe_file):
    text = refusal(recipe_file, 'student.quantization={quant_backend="seven_bit", quant_kwargs={bits=7}}')
    assert "student.quantization" in text and "quant_backend=seven_bit was not found" in text


def test_a_scheduler_whose_package_is_absent_names_it(recipe_file, monkeypatch):
    from diffusers.schedulers import scheduling_euler_discrete as euler

    monkeypatch.setattr(euler, "is_scipy_available", lambda: False)
    text = refusal(recipe_file, 'student.scheduler={class="EulerDiscreteScheduler", use_beta_sigmas=true}')
    assert "EulerDiscreteScheduler needs a package that is not installed: Make sure to install scipy" in text
    assert "could not be driven" not in text


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="says what happens without scipy")
def test_an_absent_package_is_not_recommended_for_a_scheduler_that_cannot_be_driven_anyway(recipe_file):
    text = refusal(recipe_file, 'student.scheduler={class="LMSDiscreteScheduler", use_karras_sigmas=true}')
    assert "LMSDiscreteScheduler requires the scipy library" in text
    assert "could not be driven even then; known are DDIMScheduler" in text


def test_a_family_without_adapters_is_told_so_before_weights_are_loaded(tmp_path):
    rehearsed.pipeline("pixart").save_pretrained(tmp_path / "pixart")
    itself = tiny.write_teacher(tmp_path / "itself", tmp_path / "pixart", form="base")
    path = tiny.write_recipe(tmp_path / "pixart.toml", tmp_path / "pixart", [itself])
    text = refusal(path)
    assert "takes no adapters in diffusers" in text and "pixart.toml:" in text
    card = itself / "teacher.toml"
    card.write_text(card.read_text().replace('form = "base"', 'form = "lora"\nweights = "owner/adapter"'))
    text = refusal(path, "student.train=full")
    assert "takes no adapters in diffusers" in text and "teacher.toml:" in text


def test_a_student_is_scored_only_at_a_number_of_steps_that_it_can_be_called_with(recipe_file):
    check(read_recipe(recipe_file, ["evaluate.student_steps=8"]))
    text = refusal(recipe_file, "evaluate.student_steps=60", 'student.scheduler={class="LCMScheduler"}')
    assert "--set evaluate.student_steps=60: " in text and "LCMScheduler refuses 60 steps" in text
