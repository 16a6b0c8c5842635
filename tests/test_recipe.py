import math

import pytest

from diffopd.errors import UserError
from diffopd.recipe import OBJECTIVE_NAMES, SOLVER_NAMES, Recipe, from_resolved, read_recipe
from diffopd.settings import key_lines

TEXT = """\
name = "mine"
[student]
pretrained_model_name_or_path = "emoji"
[[teachers]]
name = "text"
[[teachers]]
name = "./style"
weight = 2.0
[train]
max_train_steps = 3
"""


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "style").mkdir()
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    return path


def message(path, *overrides, text=None):
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(path, list(overrides))
    return str(caught.value)


def test_reading_fills_defaults_and_keeps_the_file_verbatim(recipe_file):
    recipe = read_recipe(recipe_file)
    assert recipe.source_text == TEXT and recipe.path == recipe_file
    assert recipe.output_dir == "runs/mine" and recipe.train.learning_rate == 3e-4
    assert [teacher.weight for teacher in recipe.teachers] == [1.0, 2.0]


def test_relative_paths_are_taken_from_the_recipes_folder(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    assert recipe.teachers[0].name == "text" and recipe.teachers[1].name == str(tmp_path / "style")


def test_the_resolved_form_reads_back_to_the_same_recipe(recipe_file):
    recipe = read_recipe(recipe_file, ["objective.query={indices=[0, 2]}"])
    again = from_resolved(recipe.resolved(), recipe._source)
    assert isinstance(again, Recipe) and again.resolved() == recipe.resolved()


def test_a_recipe_is_frozen(recipe_file):
    with pytest.raises(ValueError):
        read_recipe(recipe_file).train.batch_size = 3


@pytest.mark.parametrize(
    ("option", "section", "key", "value"),
    [
        ("train.batch_size=5", "train", "batch_size", 5),
        ("objective.name=kl", "objective", "name", "kl"),
        ('objective.name="kl"', "objective", "name", "kl"),
        ("evaluate.seeds=[3, 4]", "evaluate", "seeds", [3, 4]),
        ("student.call.eta=0.5", "student", "call", {"eta": 0.5}),
        ("student.scheduler={class = 'DDIMScheduler'}", "student", "scheduler", {"class": "DDIMScheduler"}),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
    ],
)
def test_overrides_are_toml_values(recipe_file, option, section, key, value):
    assert getattr(getattr(read_recipe(recipe_file, [option]), section), key) == value


def test_a_shape_beside_a_lora_to_start_from_is_refused(recipe_file):
    begun = 'student.init_weights="owner/lora"'
    for option in ("student.rank=16", "student.lora_alpha=16", 'student.target_modules=["to_q"]'):
        said = message(recipe_file, begun, option)
        assert said.startswith(f"--set {option}: ") and "has no effect beside student.init_weights" in said
    text = TEXT.replace('"emoji"\n', '"emoji"\nrank = 16\n')
    recipe_file.write_text(text)
    assert read_recipe(recipe_file, [begun]).student.init_weights == "owner/lora", "no option takes the file's rank out"
    held = text.replace("rank = 16\n", 'rank = 16\ninit_weights = "owner/lora"\n')
    assert message(recipe_file, text=held).startswith(f"{recipe_file}:4: student.rank has no effect")


@pytest.mark.parametrize("option", ["teachers.1.weight=7.5", "teachers.style.weight=7.5"])
def test_a_teacher_is_overridden_by_index_or_name(recipe_file, option):
    assert [teacher.weight for teacher in read_recipe(recipe_file, [option]).teachers] == [1.0, 7.5]


def test_an_unknown_key_is_named_with_file_line_and_nearest(recipe_file):
    text = message(recipe_file, text=TEXT.replace("weight", "wieght"))
    assert f"{recipe_file}:8: unknown key teachers.1.wieght" in text and 'Did you mean "weight"?' in text


def test_an_unknown_section_is_named_with_nearest(recipe_file):
    text = message(recipe_file, text=TEXT.replace("[train]", "[trian]"))
    assert f"{recipe_file}:9: unknown key trian" in text and 'Did you mean "train"?' in text


def test_a_wrong_word_is_refused_with_the_allowed_ones(recipe_file):
    text = message(recipe_file, "student.solver=dimm")
    assert "--set student.solver=dimm" in text and 'Did you mean "ddim"?' in text and "dpmpp_2m" in text


def test_toml_syntax_errors_name_file_and_line(recipe_file):
    assert f"{recipe_file}:3: is not valid TOML" in message(recipe_file, text=TEXT.replace('"emoji"', "emoji"))


def test_a_byte_order_mark_is_no_syntax_error(recipe_file):
    recipe_file.write_text("\ufeff" + recipe_file.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_recipe(recipe_file).name


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("train=3", "it must be a table. Change it there."),
        ("teachers=[]", "it must have at least 1 and has 0"),
        ('name="a b"', "it must match ^[A-Z"),
    ],
)
def test_errors_speak_of_toml_not_of_classes(recipe_file, option, said):
    text = message(recipe_file, option)
    assert said in text and "Settings" not in text and "validation" not in text


def test_several_errors_are_reported_at_once(recipe_file):
    text = message(recipe_file, "train.batch_size=0", "train.learning_rate=-1")
    assert "train.batch_size" in text and "train.learning_rate" in text


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", '"1e-3"', "true"])
def test_learning_rates_are_finite_positive_numbers(recipe_file, value):
    text = message(recipe_file, f"train.learning_rate={value}")
    assert "train.learning_rate" in text and "it must be" in text


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("train.max_train_steps=0", "never end"),
        ("train.patience=3", "validate_every"),
        ("student.noise_level=0.5", "no effect"),
        ("student.num_inference_steps=0", "greater than 0"),
        ("objective.query={fraction=1.5}", "0 < F <= 1"),
        ("objective.query={indices=[]}", "different step numbers"),
        ("objective.step_weights=[0, 0]", "all 0"),
        ("evaluate.seeds=[1, 1]", "each once"),
        ("student.call.latents=3", "set by diffopd"),
        ("train.tasks_per_update=0", "above 0"),
        ("student.rank.x=1", "valid integer"),
        ("name.x=1", "no keys"),
        ("teachers.2.weight=1", "no item"),
        ("teachers.stile.weight=1", 'Did you mean "style"?'),
        ("nonsense", "section.key=value"),
        ("train.batch_size=a b", "two quotes: --set 'train.batch_size=\"two words\"'"),
        ("teachers=[]", "at least 1 and has 0"),
        ("objectiv.name=kl", 'Did you mean "objective"?'),
    ],
)
def test_bad_values_are_refused_with_the_reason(recipe_file, option, reason):
    assert reason in message(recipe_file, option)


def test_an_adapter_is_not_folded_into_weights_that_would_round_it_away(recipe_file):
    assert "round it away" in message(recipe_file, "train.fuse_student=true", "train.frozen_dtype=bf16")


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("student.call.eta=nan", "student.call.eta"),
        ("student.call.sigmas=[1.0, inf]", "student.call.sigmas"),
        ("student.scheduler.beta_start=nan", "student.scheduler.beta_start"),
        ("teachers.1.call={guidance_rescale = -inf}", "teachers.1.call.guidance_rescale"),
    ],
)
def test_non_finite_numbers_are_refused_in_free_tables_too(recipe_file, option, key):
    text = message(recipe_file, option)
    assert f"--set {option}: {key}: " in text and "not a finite number" in text


def test_the_same_teacher_twice_is_refused(recipe_file):
    assert "given twice" in message(recipe_file, "teachers=[{name='text'}, {name='text'}]")


def test_lines_are_found_in_nested_tables():
    lines = key_lines('a = 1\n[b]\nc.d = 2\n[[e]]\nx = 1\n[e.call]\ny = 2\n[[e]]\n"x" = 3\n')
    assert lines[("a",)] == 1 and lines[("b", "c", "d")] == 3
    assert lines[("e", 0, "call", "y")] == 7 and lines[("e", 1, "x")] == 9


def test_recipe_names_are_those_of_the_tables():
    from diffopd.objective import OBJECTIVES
    from diffopd.solver import SOLVERS

    assert set(OBJECTIVE_NAMES.__args__) == set(OBJECTIVES)
    assert set(SOLVER_NAMES.__args__) == {"native", *SOLVERS}


def test_reading_a_recipe_imports_no_heavy_library(recipe_file):
    import subprocess
    import sys

    code = f"import sys; from diffopd.recipe import read_recipe; read_recipe({str(recipe_file)!r}); " + (
        "sys.exit(len({'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_stay_what_they_were(recipe_file):
    train = read_recipe(recipe_file, ["train.learning_rate=1e-3", "train.max_train_seconds=60"]).train
    assert math.isclose(train.learning_rate, 1e-3) and isinstance(train.max_train_seconds, float)
