"""The cards of real models' teachers: their rewards are shipped ones, and every one of their prompts can be scored."""

import pytest
import tiny

from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.locate import shelf, teacher_names
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.reward import card_reward, check_card_reward
from diffopd.rewards.composition import COLORS, checked_row, requirements
from diffopd.rewards.ocr import wanted_text
from diffopd.teacher import teacher_card

CARDS = [teacher_card(name, shelf("teachers")) for name in teacher_names()]


def of_hub(name):
    return next(card for card in CARDS if card.name == name)


def test_every_geneval_row_can_be_scored_and_an_empty_picture_fails_it():
    card = of_hub("diffusionopd-geneval")
    for row in (*read_prompts(card.prompts.train), *read_prompts(card.prompts.test)):
        asked = checked_row(row.metadata)
        assert not all(requirements(asked, [[] for _ in asked["include"]], [], 0.9))
        assert all(wanted.get("color", "red") in COLORS for wanted in row.metadata["include"])
        assert row.metadata["tag"] in ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def test_every_ocr_prompt_quotes_its_words():
    card = of_hub("diffusionopd-ocr")
    for row in (*read_prompts(card.prompts.train), *read_prompts(card.prompts.test)):
        assert wanted_text(row.prompt, row.metadata)


def write(folder, rewards):
    card = (folder / "teacher.toml").read_text().replace('reward = "reward.py:brightness"\n', "")
    (folder / "teacher.toml").write_text(f"{rewards}\n{card}" if "[[" not in rewards else f"{card}\n{rewards}\n")
    return teacher_card(str(folder), folder)


def test_a_card_may_name_a_shipped_reward_or_a_weighted_sum(tmp_path, tiny_sd):
    from PIL import Image

    folder, asked = tiny.write_teacher(tmp_path / "dots", tiny_sd), ([Image.new("RGB", (8, 8), "gray")], ["a"], [{}])
    size = card_reward(write(folder, 'reward = "jpeg_compressibility"'))(*asked)
    (folder / "teacher.toml").unlink()
    tiny.write_teacher(folder, tiny_sd)
    terms = '[[rewards]]\nreward = "jpeg_compressibility"\nweight = 2.0\n[[rewards]]\nreward = "reward.py:brightness"'
    card = write(folder, terms)
    assert card_reward(card)(*asked) == pytest.approx(2 * size + 128 / 255)
    assert list(card.task_hashes()) == ["train prompts", "test prompts", "reward.py"]


def test_what_a_cards_reward_lacks_is_said_with_its_place(tmp_path, tiny_sd, monkeypatch):
    folder = tiny.write_teacher(tmp_path / "dots", tiny_sd)
    with pytest.raises(UserError, match='teacher.toml:1: there is no shipped reward "sharpnes".*"sharpness"'):
        check_card_reward(write(folder, 'reward = "sharpnes"'))
    (folder / "teacher.toml").unlink()
    card = write(tiny.write_teacher(folder, tiny_sd), 'reward = "ocr"')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check_card_reward(card) == ["rapidocr", "onnxruntime"]
    (folder / "prompts" / "test.jsonl").write_text('{"prompt": "a \\"dot\\""}\n' * 2)
    recipe = read_recipe(tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [folder]))
    check(recipe)  # a plan needs no reward
    with pytest.raises(UserError, match="the reward of 'dots', and that needs rapidocr, onnxruntime"):
        check(recipe, hash_weights=True)


def test_a_card_may_have_several_prompt_files_and_hashes_each(tmp_path, tiny_sd):
    folder, other = (tiny.write_teacher(tmp_path / name, tiny_sd) for name in ("dots", "lines"))
    card = (folder / "teacher.toml").read_text()
    both = 'train = ["prompts/train.jsonl", "../lines/prompts/train.jsonl"]'
    (folder / "teacher.toml").write_text(card.replace('train = "prompts/train.jsonl"', both))
    read = teacher_card(str(folder), folder)
    one = read_prompts(other / "prompts" / "train.jsonl")
    assert [row.prompt for row in read_prompts(read.prompts.train)] == [row.prompt for row in one for _ in range(2)]
    named = ["train prompts of dots", "train prompts of lines", "test prompts", "reward.py"]
    assert list(read.task_hashes()) == named
