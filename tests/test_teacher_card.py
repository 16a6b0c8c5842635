import shutil

import pytest
from PIL import Image

from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.reward import check_card_reward
from diffopd.teacher import load_reward, teacher_card


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    """A copy of a tiny teacher that a test may spoil."""
    return shutil.copytree(tiny_teacher, tmp_path / "dots")


def edit(folder, before, after):
    path = folder / "teacher.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_a_card_is_read_with_absolute_prompt_paths(folder, tmp_path):
    card = teacher_card("./dots", tmp_path)
    assert card.name == "dots" and card.form == "lora" and card.guidance_scale == 2.0
    assert card.prompts.train == str(folder / "prompts" / "train.jsonl")
    assert card.weights_path() == folder / "pytorch_lora_weights.safetensors"


def test_prompts_may_be_a_dataset_folder(folder):
    text = (folder / "teacher.toml").read_text()
    (folder / "teacher.toml").write_text('prompts = "ocr"\n' + text[: text.index("[prompts]")])
    with pytest.raises(UserError, match="ocr: prompts cannot be read .*Name an existing file"):
        read_prompts(teacher_card(str(folder), folder).prompts.train)
    (folder / "ocr").mkdir()
    for split in ("train", "test"):
        (folder / "ocr" / f"{split}.txt").write_text("a dot\n")
    card = teacher_card(str(folder), folder)
    assert card.prompts.train == str(folder / "ocr" / "train.txt")
    assert card.prompts.test == str(folder / "ocr" / "test.txt")
    assert len(card.task_hashes()) == 3


def test_the_folder_may_be_given_relative_to_a_recipe_file(folder, tmp_path):
    (tmp_path / "mine.toml").write_text("")
    assert teacher_card("./dots", tmp_path / "mine.toml").folder == folder


@pytest.mark.parametrize(
    ("before", "after", "line", "reason"),
    [
        ("guidance_scale", "guidance_scal", 6, 'Did you mean "guidance_scale"?'),
        ('form = "lora"', 'form = "loar"', 3, 'Did you mean "lora"?'),
        ("guidance_scale = 2.0", "guidance_scale = nan", 6, "finite"),
        ('reward = "reward.py:brightness"', 'reward = "Bright ness"', 8, "it must match"),
        ('reward = "reward.py:brightness"', "", "", "Give one of the two"),
        ('name = "dots"', 'name = "student"', "", "meaning of its own"),
        ('weights = "pytorch_lora_weights.safetensors"', "", "", "needs weights"),
        ('license = "CC0-1.0"', "", "", "license is missing"),
    ],
)
def test_bad_cards_are_refused_with_place_and_reason(folder, before, after, line, reason):
    edit(folder, before, after)
    with pytest.raises(UserError) as caught:
        teacher_card(str(folder), folder)
    place = f"{folder / 'teacher.toml'}:{line}" if line else f"{folder / 'teacher.toml'}"
    assert place in str(caught.value) and reason in str(caught.value)


def test_an_error_in_a_card_does_not_offer_an_override_that_cannot_reach_it(folder):
    edit(folder, "guidance_scale = 2.0", "guidance_scale = -1.0")
    with pytest.raises(UserError, match="Change it there.$") as caught:
        teacher_card(str(folder), folder)
    assert "--set" not in str(caught.value)


def test_the_hash_is_that_of_the_card(folder):
    card = teacher_card(str(folder), folder)
    assert card.digest() == card.sha256
    with (folder / card.weights).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="the card says"):
        card.digest()


def test_missing_and_pickled_weights_are_refused(folder):
    (folder / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors at"):
        teacher_card(str(folder), folder).weights_path()
    edit(folder, "pytorch_lora_weights.safetensors", "weights.bin")
    (folder / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="never loaded"):
        teacher_card(str(folder), folder).weights_path()


def test_hub_weights_are_recognised(folder):
    edit(folder, "pytorch_lora_weights.safetensors", "owner/repo/lora@main")
    hub = teacher_card(str(folder), folder).hub_weights
    assert (hub.repo, hub.subfolder, hub.revision) == ("owner/repo", "lora", "main")


def test_a_reward_is_loaded_by_path_and_scores(folder):
    reward = load_reward("reward.py:brightness", folder)
    assert reward([Image.new("RGB", (4, 4), "white")], ["x"], [{}]) == [1.0]
    assert load_reward("../dots/reward.py:brightness", folder) is reward


@pytest.mark.parametrize(
    ("spec", "code", "reason"),
    [
        ("none.py:f", None, "there is no file"),
        ("mine.py:scroe", "def score(i, p, m): ...", 'Did you mean "score"?'),
        ("bad.py:f", "import no_such_module_anywhere", "ModuleNotFoundError"),
        ("worse.py:f", "def f(:", "SyntaxError"),
        ("absent.py:f", "{}['font']", "KeyError"),
    ],
)
def test_bad_rewards_are_refused_with_the_reason(folder, spec, code, reason):
    if code is not None:
        (folder / spec.split(":")[0]).write_text(code)
    with pytest.raises(UserError, match="reward") as caught:
        load_reward(spec, folder)
    assert reason in str(caught.value)


def test_every_shipped_card_is_valid():
    from diffopd.locate import shelf, teacher_names

    for name in teacher_names():
        card = teacher_card(name, shelf("teachers"))
        assert card.name == name
        if not card.hub_weights:
            card.digest()
        check_card_reward(card)
