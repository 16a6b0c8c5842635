"""Every form of an export is what the student draws, in the eyes of a process that does not know us."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffopd import distill as loop
from diffopd import export as exporting
from diffopd import model_card as cards_of
from diffopd.cli import app
from diffopd.dialects import Layer, read_lora
from diffopd.errors import UserError
from diffopd.export import export_run
from diffopd.forms import kohya_tensors
from diffopd.load import load_pipeline, student_pipeline
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.stranger import Form, ask
from diffopd.teacher import teacher_card


def train(recipe_path, *overrides):
    recipe = read_recipe(recipe_path, list(overrides))
    folder = RunFolder.create(recipe.output_dir, recipe, check(recipe, hash_weights=True).hashes)
    loop.distill(recipe, folder)
    return folder.path


AWKWARD = 'a "dot"\n{b} \\n\'s ```'


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_sd, tiny_teachers):
    """A trained run whose LoRA is on attention and convolutions; alpha is twice the rank, a test prompt `AWKWARD`."""
    place = tmp_path_factory.mktemp("trained")
    teachers = [shutil.copytree(folder, place / folder.name) for folder in tiny_teachers]
    rows = [json.dumps({"prompt": prompt}) for prompt in (AWKWARD, "a dot")]
    (teachers[0] / "prompts" / "test.jsonl").write_text("\n".join(rows))
    recipe = tiny.write_recipe(place / "r.toml", tiny_sd, teachers)
    targets = 'student.target_modules=["to_q","to_out.0","ff.net.0.proj","conv1","conv_shortcut","time_emb_proj"]'
    return train(recipe, "train.learning_rate=3e-2", targets)


@pytest.fixture(scope="module")
def all_forms(trained):
    """The export of `trained` in every form, and what was told. Read only."""
    said = []
    target = export_run(trained, ["kohya", "single-file", "lora", "diffusers"], tell=said.append)
    return shutil.copytree(target, trained.parent / "all"), said


def test_every_form_draws_the_students_pictures_for_a_stranger(all_forms):
    checks = json.loads((all_forms[0] / "checks.json").read_text())
    assert checks["diffusers"] == checks["single-file"] == 0
    assert 0 < checks["lora"] < 1e-3 and 0 < checks["kohya"] < 1e-3


def test_the_student_is_not_its_base(trained, tiny_sd):
    """Else every comparison of pictures above would hold for a LoRA that does nothing."""
    told = {"prompt": "a dot", "num_inference_steps": 2, "guidance_scale": 1.0}
    images = [exporting.draw(pipe, told) for pipe in (student_pipeline(trained), load_pipeline(str(tiny_sd)))]
    assert abs(images[0] - images[1]).max() > 0.02


def test_kohyas_file_has_its_keys_and_the_alpha_of_the_recipe(all_forms, tiny_sd):
    file = all_forms[0] / "kohya" / "tiny.safetensors"
    tensors = load_file(file)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 32)
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {4.0}
    assert all(key.startswith("lora_unet_") for key in tensors)
    ours = read_lora(all_forms[0] / "lora" / "pytorch_lora_weights.safetensors", load_pipeline(str(tiny_sd)))
    again = read_lora(file, load_pipeline(str(tiny_sd)))
    assert again.layers.keys() == ours.layers.keys() and again.layers[next(iter(ours.layers))].scale == 2.0


def test_layers_of_different_scale_carry_it_in_their_weights():
    layers = {"a": Layer(torch.ones(2, 3), torch.ones(3, 2), 0.5), "b": Layer(torch.ones(1, 3), torch.ones(3, 1), 2.0)}
    tensors = kohya_tensors(layers)
    assert not any(key.endswith(".alpha") for key in tensors)
    assert float(tensors["lora_unet_a.lora_up.weight"][0, 0]) == 0.5
    assert float(tensors["lora_unet_b.lora_up.weight"][0, 0]) == 2.0


def test_one_file_says_what_its_network_predicts(all_forms):
    with safe_open(all_forms[0] / "single-file" / "tiny.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"
        assert any(key.startswith("model.diffusion_model.input_blocks.") for key in opened.keys())


def test_licences_are_told_before_anything_is_written(all_forms):
    assert all_forms[1][0] == "Licences: base tiny-sd not stated; teacher dots CC0-1.0; teacher lines CC0-1.0."


def blocks(card):
    return re.findall(r"```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


@pytest.fixture
def seeded(monkeypatch):
    """Calls of the tiny pipeline draw from one seed, whatever was drawn before; the prompts that were asked."""
    from diffusers import StableDiffusionPipeline

    asked, original = [], StableDiffusionPipeline.__call__

    def call(self, prompt, **told):
        asked.append(prompt)
        torch.manual_seed(0)
        return original(self, prompt, **told)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    return asked


def test_each_of_the_cards_blocks_of_code_draws_what_the_student_does(
    trained, all_forms, seeded, tiny_sd, tmp_path, monkeypatch
):
    found = blocks((all_forms[0] / "README.md").read_text())
    assert len(found) == 4
    wanted = student_pipeline(trained)(AWKWARD, num_inference_steps=2, guidance_scale=1.0).images[0]
    monkeypatch.chdir(tmp_path)
    for code in found:
        assert len(code.splitlines()) <= 4
        code = code.replace("PATH/TO/export", str(all_forms[0])).replace("PATH/TO/tiny-sd", str(tiny_sd))
        exec(code, {})
        with Image.open("picture.png") as drawn:
            assert abs(np.asarray(drawn, float) - np.asarray(wanted, float)).max() <= 1
        (tmp_path / "picture.png").unlink()
    assert seeded == [AWKWARD] * 5


@pytest.mark.parametrize(
    ("base", "repo", "revision", "by_diffusers"),
    [
        ("owner/model", "owner/model", None, ["lora", "single-file"]),
        ("owner/model@v1.0", "owner/model", "v1.0", ["lora"]),
        ("owner/model/sub/base", "owner/model", None, []),
        ("owner/model/sub/base@refs/pr/1", "owner/model", "refs/pr/1", []),
    ],
)
@pytest.mark.usefixtures("seeded")
def test_the_cards_code_takes_the_very_base_of_a_hub_id(
    trained, all_forms, tiny_sd, tmp_path, monkeypatch, base, repo, revision, by_diffusers
):
    """A repository that has the base in its subfolder, or at its top, and the hub that would give it."""
    from diffusers import DiffusionPipeline
    from diffusers.loaders import single_file

    asked = []
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base").symlink_to(tiny_sd)
    top = tmp_path if "/sub" in base else tiny_sd

    def give(name, revision=None, **told):
        asked.append((name, revision))
        return str(top)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    monkeypatch.setattr(DiffusionPipeline, "download", give)
    monkeypatch.setattr(single_file, "_download_diffusers_model_config_from_hub", give)
    monkeypatch.chdir(tmp_path)
    forms = [
        Form("lora", "", lora=str(all_forms[0] / "lora" / "pytorch_lora_weights.safetensors")),
        Form("single-file", "", file=str(all_forms[0] / "single-file" / "tiny.safetensors")),
    ]
    exported = exported_as(trained, forms=forms)
    card = cards_of.model_card(replace(exported, recipe=other_student(trained, pretrained_model_name_or_path=base)))
    assert f"base_model: {repo}\n" in card and f"Base: `{base}`" in card
    asked.clear()
    for code in blocks(card):
        exec(code.replace("PATH/TO/export", str(all_forms[0])), {})
    assert asked == [(repo, revision)] * 2
    assert [form.name for form, code in zip(forms, blocks(card), strict=True) if "snapshot" not in code] == by_diffusers


def test_a_base_that_is_not_on_the_hub_is_not_named_to_it(all_forms):
    assert "base_model" not in (all_forms[0] / "README.md").read_text()


def test_the_card_names_base_licences_teachers_grid_and_the_default_that_would_draw_worse(all_forms, tiny_teachers):
    card = (all_forms[0] / "README.md").read_text()
    for said in (
        "Base: `tiny-sd`, license not stated. Licenses inherited from base and teachers: CC0-1.0.",
        "license: other",  # the base's is not known
        "| grid (timesteps) | 999, 499 |",
        "the default of StableDiffusionPipeline (guidance_scale 7.5) would draw worse",
        "| trained | LoRA, rank 2, alpha 4 |",
    ):
        assert said in card, said
    for folder in tiny_teachers:
        assert teacher_card(str(folder), folder).digest() in card


@pytest.mark.parametrize(
    ("base", "teachers", "head"),
    [
        ("apache-2.0", "Apache-2.0", {"license": "apache-2.0"}),
        ("apache-2.0", "MIT", {"license": "other"}),
        ("not stated", "Apache-2.0", {"license": "other"}),
        ("other", "other", {"license": "other"}),
        (
            "FLUX.1 [dev]: Non-Commercial License",
            "FLUX.1 [dev]: Non-Commercial License",
            {"license": "other", "license_name": "flux.1-dev-non-commercial-license"},
        ),
    ],
)
def test_the_cards_head_has_a_licence_that_the_hub_knows_or_the_name_of_another(
    trained, monkeypatch, base, teachers, head
):
    import yaml

    monkeypatch.setattr(cards_of, "base_license", lambda recipe: base)
    exported = exported_as(trained)
    cards = [card.model_copy(update={"license": teachers}) for card in exported.cards]
    for card, original in zip(cards, exported.cards, strict=True):
        card._source = original._source
    said = yaml.safe_load(cards_of.model_card(replace(exported, cards=cards)).split("---")[1])
    assert {key: value for key, value in said.items() if key.startswith("license")} == head


def exported_as(trained, **changes):
    """What a card of `trained` would speak of, with other parts."""
    from diffusers import StableDiffusionPipeline

    folder = RunFolder.open(trained)
    recipe = folder.recipe()
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    return cards_of.Exported(recipe, cards, folder, **{"pipeline_class": StableDiffusionPipeline} | changes)


def other_student(trained, **changes):
    recipe = RunFolder.open(trained).recipe()
    other = recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})
    other._source = recipe._source
    return other


def test_the_card_says_that_a_named_solver_is_not_what_the_student_is_deployed_with(trained):
    exported = exported_as(trained)
    exported = cards_of.Exported(other_student(trained, solver="lcm"), exported.cards, exported.folder, object)
    assert "the student walked with the solver `lcm`. Stock" in cards_of.model_card(exported)


def test_the_card_has_the_geometry_of_the_lora_that_was_trained_not_that_of_the_recipe(trained):
    exported = exported_as(trained)
    started = other_student(trained, rank=64, lora_alpha=64, init_weights="some/lora")
    card = cards_of.model_card(replace(exported, recipe=started))
    assert "| trained | LoRA, rank 2, alpha 4, starting as `lora` |" in card


def test_the_card_says_at_how_many_steps_the_student_was_scored(trained):
    exported = exported_as(trained)
    assert "Its scores below are" not in cards_of.model_card(exported)
    recipe = exported.recipe
    other = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"student_steps": 40})})
    other._source = recipe._source
    assert "Its scores below are those of 40 steps" in cards_of.model_card(replace(exported, recipe=other))


@pytest.mark.parametrize(
    ("student", "train", "said"),
    [
        ({}, {}, "float32"),
        ({}, {"mixed_precision": "bf16"}, "bf16 autocast"),
        ({}, {"frozen_dtype": "bf16"}, "float32, frozen weights in bf16; scored and exported on the base in float32"),
        ({"quantization": "bnb-4bit"}, {}, "float32, the base's denoiser quantized (bnb-4bit); scored and"),
        ({"quantization": {"quant_backend": "quanto"}}, {}, "float32, the base's denoiser quantized (quanto); scored"),
    ],
)
def test_the_card_says_in_which_precision_the_student_was_trained(trained, student, train, said):
    recipe = other_student(trained, **student)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    other._source = recipe._source
    assert f"| precision | {said}" in cards_of.model_card(replace(exported_as(trained), recipe=other))
    rounded = other.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"dtype": "bf16"})})
    rounded._source = recipe._source
    assert "scored on the base in bf16, exported in float32" in cards_of.model_card(
        replace(exported_as(trained), recipe=rounded)
    )


@pytest.mark.parametrize(
    ("family", "told", "expected"),
    [
        ("StableDiffusion3Pipeline", {}, "StableDiffusion3Pipeline (guidance_scale 7)"),
        ("ZImagePipeline", {"guidance_scale": 0.0}, "guidance_scale=0.0"),
        ("QwenImagePipeline", {"call": {"true_cfg_scale": 1.0}}, "true_cfg_scale=1.0"),
        ("FluxPipeline", {"call": {"height": 512}}, "height=512"),
        (
            "WanPipeline",
            {},
            f"export_to_video(pipeline({AWKWARD!r}, num_inference_steps=2, guidance_scale=1.0).frames[0]",
        ),
    ],
)
def test_the_cards_code_is_the_students_own_call_in_every_family(trained, family, told, expected):
    import diffusers

    kind = getattr(diffusers, family)
    exported = exported_as(trained)
    exported = cards_of.Exported(
        other_student(trained, **told), exported.cards, exported.folder, kind,
        forms=[Form("diffusers", "somewhere")], is_video=exporting.is_video(kind),
    )  # fmt: skip
    assert expected in cards_of.model_card(exported)


@pytest.mark.usefixtures("soon")
def test_a_scheduler_of_the_recipe_is_set_where_the_form_does_not_carry_it(tmp_path, tiny_sd, tiny_teachers):
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, tiny_teachers[:1])
    scheduler = 'student.scheduler={class="EulerDiscreteScheduler", use_karras_sigmas=true}'
    target = export_run(train(recipe, scheduler, "train.max_train_steps=1"), ["lora", "single-file"])
    assert json.loads((target / "checks.json").read_text())["single-file"] == 0
    assert not (target / "pipeline").exists()
    for code in blocks((target / "README.md").read_text()):
        assert "EulerDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)" in code
        code = code.replace("PATH/TO/export", str(target)).replace("PATH/TO/tiny-sd", str(tiny_sd))
        exec(code.replace("picture.png", str(tmp_path / "picture.png")), {})


@pytest.fixture
def agreeing(monkeypatch):
    """A stranger that draws what it should, without its process: for tests of what is around the comparison."""

    def compare(pipeline, arguments, forms, folder):
        return {form.name: 0.0 for form in forms}

    monkeypatch.setattr(exporting, "compare", compare)


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_a_stranger_that_draws_something_else_stops_the_export(trained, all_forms, monkeypatch, form):
    before = {path: path.stat().st_mtime_ns for path in (trained / "export").rglob("*")}

    def ask(forms, arguments, folder):
        drawn = exporting.draw(student_pipeline(trained), arguments)
        return {asked.name: drawn + 0.01 * (asked.name == form) for asked in forms}

    monkeypatch.setattr(exporting, "ask", ask)
    with pytest.raises(UserError, match=f"The exported {form} draws other pictures"):
        export_run(trained, ["diffusers", "lora"])
    assert {path: path.stat().st_mtime_ns for path in (trained / "export").rglob("*")} == before


def test_what_an_interrupted_export_left_is_removed_with_a_word(trained, agreeing):
    left = trained / ".export.partial"
    left.mkdir(exist_ok=True)
    (left / "half.safetensors").write_bytes(b"half")
    said = []
    target = export_run(trained, ["lora"], tell=said.append)
    assert any("interrupted; removed" in line for line in said)
    assert not left.exists() and not (target / "half.safetensors").exists()


@pytest.mark.usefixtures("soon")
def test_a_form_that_stock_diffusers_cannot_load_is_told_with_its_reason(tmp_path):
    with pytest.raises(UserError, match=r"(?s)Stock diffusers cannot reload the export:.*model_index\.json"):
        ask([Form("diffusers", str(tmp_path))], {}, tmp_path / "probe")


def test_the_stranger_cannot_import_us():
    import subprocess
    import sys

    from diffopd.stranger import PROGRAM

    head = PROGRAM.split("import diffusers")[0]
    done = subprocess.run([sys.executable, "-I", "-c", head + "\nprint('alone')"], capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr
    without = head.replace("sys.meta_path.insert(0, Refuse())", "sys.path.insert(0, sys.argv[1])")
    root = str(loop.__file__).rsplit("/diffopd/", 1)[0]
    done = subprocess.run([sys.executable, "-I", "-c", without, root], capture_output=True, text=True)
    assert "diffopd could be imported" in done.stderr


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_student_that_was_trained_whole_has_no_lora_form(trained, form):
    with pytest.raises(UserError, match="has no LoRA"):
        exporting.check_formats([form], other_student(trained, train="full"))


def test_an_unknown_format_is_refused_by_the_command(trained):
    done = CliRunner().invoke(app, ["export", str(trained), "--format", "gguf"])
    assert done.exit_code == 2 and "single-file" in done.output


def test_a_push_without_a_token_or_to_no_repository_is_refused_before_anything_is_made(trained, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    shutil.rmtree(trained / "export", ignore_errors=True)
    for repo, reason in (("me/tiny", "hf auth login"), ("tiny", "Give owner/name"), ("a/b/c", "Give owner/name")):
        done = CliRunner().invoke(app, ["export", str(trained), "--push-to-hub", repo])
        assert done.exit_code == 2 and reason in done.output, done.output
    assert not (trained / "export").exists()


@pytest.fixture
def online(monkeypatch):
    """Logged in and not offline."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")


def test_a_push_is_one_commit_of_the_forms_asked_for_whose_card_loads_from_the_hub(
    trained, agreeing, online, monkeypatch
):
    """The one test in which the network is mocked."""
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: calls.append(repo))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_commit", lambda self, repo, operations, commit_message: calls.append(operations)
    )
    export_run(trained, ["kohya"])
    (trained / "export" / "mine.txt").write_text("not for the hub")
    done = CliRunner().invoke(
        app, ["export", str(trained), "--format", "diffusers", "--format", "lora", "--push-to-hub", "me/tiny"]
    )
    assert done.exit_code == 0, done.output
    uploaded = "Uploaded diffusers, lora to https://huggingface.co/me/tiny"
    assert done.output.index("Licences: base tiny-sd") < done.output.index(uploaded)
    assert "hf_secret" not in done.output
    repo, operations = calls
    found = {operation.path_in_repo: operation for operation in operations}
    assert repo == "me/tiny" and len(found) == len(operations)
    assert {"model_index.json", "README.md", "lora/pytorch_lora_weights.safetensors"} < set(found)
    assert not {"checks.json", "weights.json", "mine.txt", "kohya/tiny.safetensors"} & set(found)
    card = found["README.md"].path_or_fileobj.decode()
    assert 'from_pretrained("me/tiny")' in card and "kohya" not in card
    assert 'load_lora_weights("me/tiny", weight_name="lora/pytorch_lora_weights.safetensors")' in card
    assert "me/tiny" not in (trained / "export" / "README.md").read_text()


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_users(trained, agreeing, online, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = CliRunner().invoke(app, ["export", str(trained), "--format", "lora", "--push-to-hub", "me/tiny"])
    assert done.exit_code == 2, done.output
    assert "the hub could not be reached or refused (ConnectError" in done.output.replace("\n", " ")


def test_a_card_that_the_hub_refuses_is_an_error_of_the_users(trained, agreeing, online, monkeypatch):
    import huggingface_hub

    def refuse(*args, **told):
        raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [apache-2.0, mit]')

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", refuse)
    done = CliRunner().invoke(app, ["export", str(trained), "--format", "lora", "--push-to-hub", "me/tiny"])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert 'refused the model card (Invalid metadata in README.md. - "license" must be one of' in said
    assert "The repository is there and got nothing." in said


def test_a_form_stays_beside_those_that_come_later(trained, agreeing):
    shutil.rmtree(trained / "export", ignore_errors=True)
    export_run(trained, ["kohya"])
    (trained / "export" / "mine.txt").write_text("mine")
    before = (trained / "export" / "kohya" / "tiny.safetensors").stat().st_mtime_ns
    said = []
    target = export_run(trained, ["lora"], tell=said.append)
    assert (target / "kohya" / "tiny.safetensors").stat().st_mtime_ns == before
    assert (target / "mine.txt").read_text() == "mine" and not (target / "pipeline").exists()
    assert set(json.loads((target / "checks.json").read_text())) == {"kohya", "lora"}
    assert len(blocks((target / "README.md").read_text())) == 2
    assert said[-1].endswith("export: kohya, lora; stock diffusers reloads each to the student's pictures.")
    shutil.rmtree(target / "kohya")
    assert set(json.loads((export_run(trained, ["lora"]) / "checks.json").read_text())) == {"lora"}


@pytest.mark.parametrize("state", ["of other weights", "never checked"])
def test_a_form_of_other_weights_is_named_and_made_again(trained, agreeing, state):
    shutil.rmtree(trained / "export", ignore_errors=True)
    target = export_run(trained, ["kohya"])
    file = target / "kohya" / "tiny.safetensors"
    right = file.read_bytes()
    file.write_bytes(b"former weights")
    for name in ("weights.json",) if state == "of other weights" else ("weights.json", "checks.json"):
        (target / name).write_text('{"kohya": "0"}' if state == "of other weights" else "{}")
    said = []
    export_run(trained, ["lora"], tell=said.append)
    assert any("export/kohya: was not made of the weights of checkpoint-" in line for line in said)
    assert file.read_bytes() == right
    assert set(json.loads((target / "weights.json").read_text())) == {"kohya", "lora"}


@pytest.mark.usefixtures("soon")
def test_the_same_command_after_the_end_says_so_and_makes_nothing_again(tmp_path, tiny_recipe):
    command = ["distill", str(tiny_recipe), "--set", "train.max_train_steps=1"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and "Done:" in first.output, first.output
    assert "Licences: base tiny-sd" in first.output
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and "is finished and nothing has changed" in again.output, again.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert RunFolder.open(run).is_finished(read_recipe(tiny_recipe, ["train.max_train_steps=1"]))
    assert not RunFolder.open(run).is_finished(read_recipe(tiny_recipe, ["train.max_train_steps=2"]))
    shutil.rmtree(run / "export")
    assert not RunFolder.open(run).is_finished(read_recipe(tiny_recipe, ["train.max_train_steps=1"]))
