"""The rewards of real models: rules in closed form, scorers with small random networks of the same classes."""

import pytest
import tiny
import torch
from PIL import Image

from diffopd.data import read_prompts
from diffopd.locate import shelf
from diffopd.teacher import load_reward, teacher_card

FOLDER = shelf("teachers")


@pytest.fixture(scope="module")
def rewards():
    import sys

    return sys.modules[load_reward("hub_rewards.py:ocr", FOLDER).__module__]


@pytest.fixture
def models(tmp_path, monkeypatch, rewards):
    """A folder of scorers in place of the hub."""
    monkeypatch.setenv("DIFFOPD_REWARD_MODELS", str(tmp_path))
    rewards._load.cache_clear()
    yield tmp_path
    rewards._load.cache_clear()


def save_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny.build_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def test_clip_score_and_aesthetic_are_numbers_of_each_picture_and_prompt(models, rewards):
    for name in (rewards.CLIP, rewards.PICKSCORE, rewards.PICKSCORE_PROCESSOR):
        save_clip(models / name)
    pictures = [Image.new("RGB", (48, 32), color) for color in ("red", "blue")]
    scores = rewards.clip_score(pictures, ["a dot", "a line"], [{}, {}])
    one = rewards.clip_score(pictures[1:], ["a line"], [{}])
    assert scores[1] == pytest.approx(one[0], abs=1e-5) and all(0 <= score <= 1 for score in scores)
    assert all(0 <= score <= 1 for score in rewards.aesthetic(pictures, ["a dot", "a line"], [{}, {}]))


def test_a_missing_scorer_is_named_with_what_to_do(models, rewards):
    with pytest.raises(OSError, match="the reward needs openai/clip.*DIFFOPD_REWARD_MODELS"):
        rewards.clip_score([Image.new("RGB", (8, 8))], ["a dot"], [{}])


def test_the_detector_gives_boxes_and_masks_of_named_classes(models, rewards):
    pytest.importorskip("scipy")  # of Mask2Former
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    names = {0: "cat", 1: "dog"}
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=4, id2label=names,
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(models / rewards.DETECTOR)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(models / rewards.DETECTOR)
    found = rewards._detect(Image.new("RGB", (64, 48), "red"), 0.0)
    assert found and set(found) <= set(names.values())
    for box, mask in (thing for things in found.values() for thing in things):
        assert mask.shape == (48, 64) and 0 <= box[0] < box[2] <= 64 and 0 <= box[1] < box[3] <= 48


@pytest.mark.parametrize(
    ("wanted", "read", "score"),
    [
        ("Fresh Bread", "fresh bread", 1.0),
        ("Fresh Bread", "the FRESHBREAD shop", 1.0),
        ("OPEN", "OPFN", 0.75),
        ("OPEN", "", 0.0),
        ("OPEN", "a very long text about nothing", 0.0),
    ],
)
def test_read_text_is_scored_by_its_distance(rewards, wanted, read, score):
    assert rewards.text_score(wanted, read) == score


def test_ocr_scores_what_is_read_and_names_a_missing_reader(rewards, monkeypatch):
    monkeypatch.setattr(rewards, "_read", lambda image: "FRESH BRAD")
    assert rewards.ocr([None], ['a sign that says "Fresh Bread"'], [{}]) == [pytest.approx(0.9)]
    with pytest.raises(ValueError, match="double quotes"):
        rewards.ocr([None], ["a sign"], [{}])
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    rewards._reader.cache_clear()
    with pytest.raises(ImportError, match=r"diffopd\[ocr\]"):
        rewards._reader()


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 1, 11, 11), set()),
    ],
)
def test_relations_of_boxes(rewards, box, other, expected):
    assert rewards.relations(box, other) == expected


CAT, DOG = ((0, 0, 10, 10), None), ((50, 0, 60, 10), None)


@pytest.mark.parametrize(
    ("found", "row", "score"),
    [
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1}]}, 1.0),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}, 0.5),
        (
            {"cat": [CAT] * 3},
            {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
            0.5,
        ),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1, "color": "red"}]}, 1.0),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1, "color": "blue"}]}, 0.0),
        (
            {"cat": [CAT], "dog": [DOG]},
            {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]},
            1.0,
        ),
        (
            {"cat": [CAT], "dog": [DOG]},
            {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]},
            0.5,
        ),
    ],
)
def test_requirements_of_a_picture(rewards, found, row, score):
    assert rewards.requirements_met(found, row, lambda name, box, mask: "red") == score


def test_every_geneval_row_can_be_scored(rewards):
    card = teacher_card("diffusionopd-geneval", FOLDER)
    for row in (*read_prompts(card.prompts.train), *read_prompts(card.prompts.test)):
        assert 0 <= rewards.requirements_met({}, row.metadata, None) < 1
        assert all(wanted.get("color", "red") in rewards.COLORS for wanted in row.metadata["include"])
        assert row.metadata["tag"] in ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def test_every_ocr_prompt_quotes_its_words(rewards):
    card = teacher_card("diffusionopd-ocr", FOLDER)
    for row in (*read_prompts(card.prompts.train), *read_prompts(card.prompts.test)):
        assert rewards._quoted(row.prompt)
