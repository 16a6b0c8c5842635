import json
import shutil

import pytest
import rehearsed
import tiny
from refused import edit, refusal

from diffopd.errors import UserError
from diffopd.preflight import check
from diffopd.recipe import read_recipe


def test_only_lora_teachers_are_averaged_and_a_start_is_said_once(tmp_path, tiny_sd, tiny_teachers):
    other = tiny.write_teacher(tmp_path / "whole", tiny_sd, form="full")
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [tiny_teachers[0], other])
    assert "'whole' is of form \"full\"" in refusal(recipe, 'student.begin_from="teacher_average"')
    recipe = tiny.write_recipe(tmp_path / "r2.toml", tiny_sd, tiny_teachers)
    check(read_recipe(recipe, ['student.begin_from="teacher_average"']))
    warm = f'student.init_weights="{tiny_teachers[0]}/pytorch_lora_weights.safetensors"'
    with pytest.raises(UserError, match="Remove one of the two"):
        read_recipe(recipe, ['student.begin_from="teacher_average"', warm])


def test_a_lora_of_another_unet_is_refused(own_recipe, own_teachers, tmp_path):
    wide = tiny.save_pipeline(tmp_path / "wide", cross=32)
    tiny.save_lora(own_teachers[1], wide, seed=4)
    edit(own_teachers[1], "sha256", "# ")
    assert "does not fit the base: its layer" in refusal(own_recipe)


def test_a_lora_for_a_transformer_is_refused(own_recipe, own_teachers):
    from safetensors.torch import load_file, save_file

    path = own_teachers[1] / "pytorch_lora_weights.safetensors"
    save_file({key.replace("unet.", "transformer.", 1): value for key, value in load_file(path).items()}, path)
    assert "for a transformer, the base has a unet" in refusal(own_recipe)


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
    own_recipe, own_teachers, tiny_sd, tmp_path, file, key, value
):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    config = json.loads((other / file).read_text()) | {key: value}
    (other / file).write_text(json.dumps(config))
    edit(own_teachers[1], f'base = "{tiny_sd}"', f'base = "{other}"')
    text = refusal(own_recipe)
    assert "cannot stand at the student's states" in text and key in text and "'lines'" in text
    assert f"{own_recipe}:14" in text


def test_a_teacher_on_a_copy_of_the_base_passes(own_recipe, own_teachers, tiny_sd, tmp_path):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    edit(own_teachers[1], f'base = "{tiny_sd}"', f'base = "{other}"')
    check(read_recipe(own_recipe))


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


def test_a_warm_start_is_checked(own_recipe, tiny_teacher, tmp_path):
    check(read_recipe(own_recipe, [f'student.init_weights="{tiny_teacher}/pytorch_lora_weights.safetensors"']))
    assert "no .safetensors" in refusal(own_recipe, f'student.init_weights="{tmp_path}/none.safetensors"')
    wide = tiny.save_pipeline(tmp_path / "wide", cross=32)
    lora = tiny.save_lora(tmp_path / "wide-lora", wide, seed=0)
    assert "does not fit the base: its layer" in refusal(own_recipe, f'student.init_weights="{lora}"')


def test_a_truncated_weights_file_is_refused(own_recipe, own_teachers):
    (own_teachers[0] / "pytorch_lora_weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "header is broken" in refusal(own_recipe)


def test_a_weights_file_that_was_not_copied_to_its_end_is_refused(own_recipe, own_teachers):
    file = own_teachers[0] / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut short (" in refusal(own_recipe)


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
