"""The reward of a teach.toml: the card's, or a weighted sum of functions and shipped ones, loaded before training."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffopd.data import PromptRow
from diffopd.errors import UserError
from diffopd.locate import shelf
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.reward import (
    WeightedSum,
    check_reward,
    check_rows,
    missing_weights,
    reward_hashes,
    reward_of,
    try_card_reward,
    try_reward,
)
from diffopd.rewards.pixels import Sharpness
from diffopd.sampling import score
from diffopd.teach import assemble_run
from diffopd.teach_check import check_teach
from diffopd.teach_recipe import read_teach_recipe
from diffopd.teacher import file_sha256, forget_rewards, load_reward, teacher_card

IMAGES = [Image.new("RGB", (8, 8), "gray"), Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3) % 97)]
PROMPTS, ROWS = ["a", "b"], [{}, {}]


@pytest.fixture
def recipe_with(tmp_path, tiny_sd):
    """A recipe of the tiny teacher with these rewards."""
    folder = tiny.write_teacher(tmp_path / "dots", tiny_sd)

    def read(rewards: str):
        text = f'{rewards}\n[estimator]\nname = "nft"\n[train]\nmax_train_steps = 1\n'
        (folder / "teach.toml").write_text(text)
        return read_teach_recipe(str(folder))

    return read


def test_without_rewards_it_is_the_cards(recipe_with):
    recipe = recipe_with("")
    assert reward_of(recipe)(IMAGES[:1], PROMPTS[:1], ROWS[:1]) == pytest.approx([128 / 255])
    assert check_reward(recipe) == [] and reward_hashes(recipe) == {}


def test_terms_are_summed_by_weight_and_may_be_files_or_shipped(recipe_with):
    recipe = recipe_with(
        'rewards = [{reward = "reward.py:brightness", weight = 2.0}, {reward = "sharpness", weight = 0.5},\n'
        '  {reward = "jpeg_compressibility", options = {quality = 50}}]'
    )
    bright = reward_of(recipe_with('rewards = [{reward = "reward.py:brightness"}]'))(IMAGES, PROMPTS, ROWS)
    size = reward_of(recipe_with('rewards = [{reward = "jpeg_compressibility", options = {quality = 50}}]'))
    wanted = 2 * bright + 0.5 * Sharpness()(IMAGES, PROMPTS, ROWS) + size(IMAGES, PROMPTS, ROWS)
    np.testing.assert_allclose(reward_of(recipe)(IMAGES, PROMPTS, ROWS), wanted)
    digest = file_sha256(recipe.card.folder / "reward.py")
    assert reward_hashes(recipe) == {"dots: reward.py": digest}


def test_a_missing_package_is_said_by_the_plan_and_stops_a_run_before_its_weights_load(recipe_with, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    recipe = recipe_with('rewards = [{reward = "ocr"}]')
    assert "rapidocr" in check_reward(recipe)
    with pytest.raises(UserError, match=r"teach.toml:1: reward 'ocr' cannot be loaded: .*Install diffopd\[ocr\]"):
        assemble_run(recipe)


def test_missing_weights_stop_a_run_with_the_download_that_is_needed(recipe_with):
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        reward_of(recipe_with('rewards = [{reward = "clip_score", options = {model = "nobody/nothing"}}]'))
    for name, option in (("aesthetic", "head"), ("hps_v2", "model")):
        with pytest.raises(UserError, match=rf"teach.toml:1: reward '{name}' needs options.{option}. "):
            check_reward(recipe_with(f'rewards = [{{reward = "{name}"}}]'))


def test_what_an_option_names_and_nobody_has_is_told_by_the_plan(recipe_with, tmp_path):
    recipe = recipe_with('rewards = [{reward = "hps_v2", options = {model = "hps"}}, {reward = "clip_score"}]')
    assert missing_weights(recipe, []) == [f"hps (options.model of 'hps_v2', {recipe.path}:1)"]
    (recipe.card.folder / "hps").mkdir()
    assert missing_weights(recipe, []) == []
    recipe = recipe_with('rewards = [{reward = "aesthetic", options = {head = "./head.safetensors", model = "a/b"}}]')
    assert missing_weights(recipe, []) == [f"./head.safetensors (options.head of 'aesthetic', {recipe.path}:1)"]
    watched = teacher_card("unmade/sd35-aesthetic", shelf("teachers"))
    assert missing_weights(recipe_with(""), [watched]) == [f"hps-v2.1 (options.model of 'hps_v2', {watched.path}:19)"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda *_: [0.5], "1 score for 2 pictures"),
        (WeightedSum((("glow", 1.0, lambda *_: 0.5),)), "'glow' gave one number for 2 pictures"),
        (lambda *_: [0.5, float("inf")], "picture of 'b' is inf"),
        (lambda images, prompts, metadata: metadata[0]["word"], r"KeyError: 'word' \(.*test_reward.py:\d+\)"),
        (lambda *_: np.stack([np.zeros(1), np.zeros(2)]), r"ValueError: .* \(.*test_reward.py:\d+\)"),
        (lambda *_: json.loads("no"), r"JSONDecodeError: .* \(.*test_reward.py:\d+\)"),
        (lambda *_: sys.exit("no GPU"), r"SystemExit: no GPU \(.*test_reward.py:\d+\)"),
        (
            WeightedSum((("glow", 1.0, lambda *_: [1, 5]),), shares=True),
            r"'glow' scored 5, and a card's function scores",
        ),
        (WeightedSum((("glow", 1.0, lambda *_: [1]),)), r"'glow' gave 1 score for 2 .* one for each\.$"),
    ],
)
def test_scores_that_are_not_one_finite_number_a_picture_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        score(given, IMAGES, [PromptRow("a"), PromptRow("b")])
    learnt = WeightedSum((("glow", 2.0, lambda *_: torch.tensor([0.5, 1.0], requires_grad=True)),))
    assert score(learnt, IMAGES, [PromptRow("a")] * 2).tolist() == [1.0, 2.0], "a network's own answer"
    assert torch.equal(
        score(lambda *_: np.array([[1], [2]]), IMAGES, [PromptRow("a")] * 2), torch.tensor([1.0, 2.0]).double()
    )


BROKEN = {
    "raises": ("raise RuntimeError('no such font')", r"RuntimeError: no such font \(.*/reward.py:5\)\."),
    "wants what no row has": ("return [row['word'] for row in metadata]", r"KeyError: 'word' \(.*/reward.py:5\)\."),
    "one for all": ("return 0.5", "gave one number for 2 pictures"),
    "too few": ("return [0.5]", "gave 1 score for 2 pictures"),
    "no numbers": ("return [None] * len(images)", "gave list for 2 pictures, not a list of one number for each"),
    "nothing": ("pass", "gave NoneType for 2 pictures"),
    "gives up": ("import sys; sys.exit('no GPU')", r"SystemExit: no GPU \(.*/reward.py:5\)\."),
    "not finite": ("return [0.5, float('nan')]", "scored a blank picture nan, and scores must be finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_function_that_cannot_score_is_found_out_on_blank_pictures_with_its_file(recipe_with, case):
    code, words = BROKEN[case]
    card = recipe_with("").card
    (card.folder / "reward.py").write_text(f'"""Mine."""\n\n\ndef brightness(images, prompts, metadata):\n    {code}\n')
    with pytest.raises(UserError, match=words) as caught:
        try_card_reward(card, [PromptRow("a dot")], (16, 16))
    assert str(caught.value).startswith(f"{card.path}:") and "'reward.py:brightness'" in str(caught.value)
    with pytest.raises(UserError, match=f"teach.toml:1: 'reward.py:brightness' .*{words}"):
        recipe = recipe_with('rewards = [{reward = "reward.py:brightness"}]')
        try_reward(recipe, [PromptRow("a dot")], (16, 16))


def test_functions_are_tried_with_real_rows_at_the_size_that_is_drawn(recipe_with):
    recipe = recipe_with('rewards = [{reward = "reward.py:seen"}, {reward = "aesthetic"}]')
    (recipe.card.folder / "reward.py").write_text(
        "TOLD = []\n\ndef seen(*told):\n    TOLD.append(told)\n    return [-3, 9]\n"
    )
    try_reward(recipe, [PromptRow("a", {"n": 1}), PromptRow("b", {"n": 2}), PromptRow("c", {"n": 3})], (24, 16))
    module = next(m for name, m in sys.modules.items() if "reward_reward" in name and "TOLD" in vars(m))
    [(images, prompts, metadata)] = module.TOLD
    assert [image.size for image in images] == [(24, 16)] * 2
    assert (prompts, metadata) == (["a", "c"], [{"n": 1}, {"n": 3}]), "shipped ones, which load networks, are left out"


def test_what_a_file_holds_is_let_go_of_and_imported_anew(recipe_with):
    card = recipe_with("").card
    (card.folder / "reward.py").write_text(
        "HELD = []\n\ndef brightness(*told):\n    HELD.append(0)\n    return [0.5, 0.5]\n"
    )
    before = load_reward("reward.py:brightness", card.folder)
    try_card_reward(card, [PromptRow("a")], (8, 8))
    forget_rewards()
    after = load_reward("reward.py:brightness", card.folder)
    assert len(before.__globals__["HELD"]) == 1 and after.__globals__["HELD"] == []


@pytest.mark.parametrize("score", [-0.1, 1.5])
def test_what_alone_scores_a_task_keeps_to_0_and_1_and_a_reward_need_not(recipe_with, score):
    recipe = recipe_with("")
    file = recipe.card.folder / "reward.py"
    file.write_text(f"def brightness(images, prompts, metadata):\n    return [0.5, {score}]\n")
    with pytest.raises(UserError, match=rf"scored a blank picture {score}, and a card's function scores from 0 to 1"):
        try_card_reward(recipe.card, [PromptRow("a")], (8, 8))
    text = recipe.card.path.read_text().replace('reward = "reward.py:brightness"', "")
    recipe.card.path.write_text(text + '[[rewards]]\nreward = "reward.py:brightness"\n')
    try_card_reward(recipe_with("").card, [PromptRow("a")], (8, 8))


def write_rows(card, split: str, *rows: dict, name: str | None = None):
    """A card's prompt file of these rows; its path."""
    file = card.folder / "prompts" / f"{name or split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SIGN = {"prompt": 'a sign "OPEN"'}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_that_cannot_be_scored_is_told_before_a_training_with_its_line(recipe_with, split):
    recipe = recipe_with('rewards = [{reward = "sharpness"}, {reward = "ocr", weight = 0.5}]')
    for name in ("train", "test"):
        write_rows(recipe.card, name, SIGN, SIGN)
    check_teach(recipe)
    file = write_rows(recipe.card, split, SIGN, {"prompt": "a sign"})
    with pytest.raises(UserError) as caught:
        check_teach(recipe)
    place = f"{file}:2: the reward 'ocr' ({recipe.path}:1) cannot score this row: "
    assert str(caught.value) == (
        f'{place}the prompt \'a sign\' quotes no text. Quote it as "..." or give its row a "text". '
        "Correct the row, or remove it."
    )


def test_a_row_is_told_by_the_line_of_its_own_file_where_there_are_several(recipe_with):
    card = recipe_with("").card
    more = write_rows(card, "train", SIGN, SIGN, {"prompt": "none"}, name="more")
    write_rows(card, "train", SIGN)
    write_rows(card, "test", SIGN)
    text = card.path.read_text()
    card.path.write_text(text.replace('"prompts/train.jsonl"', '["prompts/train.jsonl", "prompts/more.jsonl"]'))
    with pytest.raises(UserError, match=f"{more}:3: the reward 'ocr'"):
        check_rows(recipe_with('rewards = [{reward = "ocr"}]'), download=False)


def test_the_held_out_rows_are_checked_for_the_cards_own_reward_and_for_what_is_watched(recipe_with, own_teachers):
    recipe = recipe_with('rewards = [{reward = "sharpness"}]')
    text = recipe.card.path.read_text()
    recipe.card.path.write_text(text.replace("reward.py:brightness", "ocr"))
    recipe = recipe_with('rewards = [{reward = "sharpness"}]')
    test = write_rows(recipe.card, "test", SIGN)
    check_teach(recipe)  # its training rows quote nothing, and are scored by sharpness alone
    write_rows(recipe.card, "test", SIGN, {"prompt": "a dot"})
    with pytest.raises(UserError, match=f"{test}:2: .* quotes no text"):
        check_teach(recipe)
    card = own_teachers[1] / "teacher.toml"
    card.write_text(card.read_text().replace("reward.py:brightness", "ocr"))
    write_rows(recipe.card, "test", SIGN)
    with pytest.raises(UserError, match=f"{own_teachers[1]}/prompts/test.jsonl:1: .* quotes no text"):
        check_teach(recipe_with(f'watch = ["{own_teachers[1]}"]\nrewards = [{{reward = "sharpness"}}]'))


def test_a_supervised_teachers_training_rows_need_not_be_scored(recipe_with):
    card = recipe_with("").card
    card.path.write_text(card.path.read_text().replace("reward.py:brightness", "ocr"))
    (card.folder / "draw.py").write_text("def draw(prompts, metadata, seeds):\n    return []\n")
    text = 'pictures = "draw.py:draw"\n[estimator]\nname = "supervised"\n[train]\nmax_train_steps = 1\n'
    (card.folder / "teach.toml").write_text(text)
    write_rows(card, "test", SIGN)
    check_teach(read_teach_recipe(str(card.folder)))
    write_rows(card, "test", {"prompt": "a dot"})
    with pytest.raises(UserError, match="test.jsonl:1: .* quotes no text"):
        check_teach(read_teach_recipe(str(card.folder)))


def test_a_run_of_distillation_checks_the_held_out_rows_that_it_will_score(own_recipe, own_teachers):
    card = own_teachers[0] / "teacher.toml"
    card.write_text(card.read_text().replace("reward.py:brightness", "ocr"))
    test = own_teachers[0] / "prompts" / "test.jsonl"
    with pytest.raises(UserError, match=f"{test}:1: the reward 'ocr' .* quotes no text"):
        check(read_recipe(own_recipe))
    test.write_text(json.dumps(SIGN) + "\n" + json.dumps(SIGN) + "\n")
    check(read_recipe(own_recipe))


def test_a_relative_reference_is_found_beside_its_prompt_file_and_a_missing_one_told(recipe_with):
    recipe = recipe_with('rewards = [{reward = "dino_similarity"}]')
    IMAGES[0].save(recipe.card.folder / "prompts" / "a.png")
    rows = [{"prompt": "a", "reference": "a.png"}]
    write_rows(recipe.card, "test", *rows)
    write_rows(recipe.card, "train", *rows)
    check_rows(recipe, download=False)
    file = write_rows(recipe.card, "train", *rows, {"prompt": "b", "reference": "b.png"})
    with pytest.raises(UserError, match=rf"{file}:2: .* there is no reference b.png\."):
        check_rows(recipe, download=False)


def test_options_reach_what_checks_rows_with_paths_from_the_teachers_folder(recipe_with):
    detector = 'reward = "composition", options = {detector = "seen", aliases = {glass = "wine glass"}}'
    recipe = recipe_with(f"rewards = [{{{detector}}}]")
    (recipe.card.folder / "seen").mkdir()
    config = {"model_type": "rt_detr", "id2label": {"0": "cat", "1": "wine glass"}}
    (recipe.card.folder / "seen" / "config.json").write_text(json.dumps(config))
    write_rows(recipe.card, "test", {"prompt": "a", "include": [{"class": "glass"}]})
    file = write_rows(recipe.card, "train", {"prompt": "a", "include": [{"class": "cat"}]})
    check_rows(recipe, download=False)
    write_rows(recipe.card, "train", {"prompt": "a", "include": [{"class": "dog"}]})
    with pytest.raises(UserError, match=f"{file}:1: .* the detector knows no 'dog'"):
        check_rows(recipe, download=False)


MINE = """
def brightness(images, prompts, metadata):
    return [0.5] * len(images)


def check(prompts, metadata):
    for prompt, row in zip(prompts, metadata, strict=True):
        if row["number"] == 1:
            raise ValueError(f"{prompt!r} is number 1")


brightness.check = check
"""


def test_a_function_may_check_rows_itself(recipe_with):
    card = recipe_with("").card
    (card.folder / "reward.py").write_text(MINE)
    for split in ("train", "test"):
        write_rows(card, split, {"prompt": "a", "number": 0})
    check_rows(recipe_with(""), download=False)
    file = write_rows(card, "train", {"prompt": "a", "number": 0}, {"prompt": "b", "number": 1})
    with pytest.raises(UserError, match=rf"{file}:2: .*{card.path}:\d+\) .*: 'b' is number 1 \(.*/reward.py:9\)\."):
        check_rows(recipe_with(""), download=False)
    write_rows(card, "train", {"prompt": "a"})
    with pytest.raises(UserError, match=r"train.jsonl:1: .*: KeyError: 'number' \(.*/reward.py:8\)\."):
        check_rows(recipe_with(""), download=False)
