"""Shipped rewards: exact rules by hand, networks as small random ones of the same classes through the same code."""

import ast
import importlib
import inspect
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffopd.rewards import SHIPPED
from diffopd.rewards.clip import Aesthetic, ClipScore, HPSv2, PickScore
from diffopd.rewards.composition import (
    COLORS,
    ColorJudge,
    Composition,
    Found,
    checked_row,
    crop,
    cut_out,
    relations,
    requirements,
)
from diffopd.rewards.dino import DinoSimilarity
from diffopd.rewards.pixels import JpegCompressibility, JpegIncompressibility, Sharpness

PROMPTS = ["a red dot", "two blue lines and a green one"]


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


IMAGES = [noise(0), noise(1)]
ROWS = [{}, {}]


def test_every_shipped_reward_is_there_and_stands_alone():
    for spec in SHIPPED.values():
        module, kind = spec.split(":")
        loaded = importlib.import_module(module)
        assert isinstance(vars(loaded)[kind].packages, tuple) and vars(loaded)[kind].__doc__
        tree = ast.parse(Path(loaded.__file__).read_text())
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not any(name.startswith("diffopd") for name in names), spec
        top = {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not top & {"torch", "transformers", "rapidocr"}, "heavy packages only when made"


def test_what_refuses_rows_takes_the_options_that_its_reward_is_made_with():
    kinds = [vars(importlib.import_module(module))[kind] for module, kind in (s.split(":") for s in SHIPPED.values())]
    checked = [kind for kind in kinds if "check" in vars(kind)]
    assert [kind.__name__ for kind in checked] == ["Composition", "DinoSimilarity", "OCR"]
    for kind in checked:
        options = {name: given.default for name, given in inspect.signature(kind).parameters.items()}
        assert "download" not in options
        kind.check([], [], download=False, **options)


def test_compressibility_orders_flat_before_noise_and_is_the_size_of_the_file():
    flat, rough = Image.new("RGB", (32, 32), "gray"), noise(2)
    easy, hard = JpegCompressibility()([flat, rough], PROMPTS, ROWS)
    assert 0 > easy > hard
    np.testing.assert_array_equal(JpegIncompressibility()([flat, rough], PROMPTS, ROWS), [-easy, -hard])
    assert JpegCompressibility(quality=10)([rough], PROMPTS[:1], ROWS[:1])[0] > hard
    with pytest.raises(ValueError, match="1 to 95"):
        JpegCompressibility(quality=100)


def test_sharpness_is_20_for_white_noise_0_for_flat_less_when_blurred_and_blind_to_contrast():
    gray = np.random.default_rng(3).integers(0, 101, (200, 200)).astype(np.uint8)
    image, faint = Image.fromarray(gray), Image.fromarray(gray // 2 * 1)
    blurred = image.resize((50, 50), Image.Resampling.BOX).resize((200, 200), Image.Resampling.BICUBIC)
    flat = Image.new("RGB", (32, 32), "gray")
    found = Sharpness()([image, faint, blurred, flat], [""] * 4, [{}] * 4)
    assert found[0] == pytest.approx(20, rel=0.03) and found[1] == pytest.approx(found[0], rel=0.03)
    assert found[2] < 0.2 * found[0] and found[3] == 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A random CLIPModel with its processor, as a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder, tokenizer = tmp_path_factory.mktemp("clip"), tiny.build_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 48}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return str(folder)


def test_clip_scores_are_cosines_of_each_picture_with_its_own_prompt(clip):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        logits = model(**processor(text=PROMPTS, images=IMAGES, **options)).logits_per_image
    cosines = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(ClipScore(clip)(IMAGES, PROMPTS, ROWS), cosines.detach())
    torch.testing.assert_close(HPSv2(clip, clip)(IMAGES, PROMPTS, ROWS), cosines.detach())
    torch.testing.assert_close(PickScore(clip, clip)(IMAGES, PROMPTS, ROWS), logits.diagonal().detach() / 26)
    one = ClipScore(clip)(IMAGES[1:], PROMPTS[1:], ROWS[1:])
    torch.testing.assert_close(one[0], cosines[1].detach(), atol=1e-5, rtol=1e-4)
    assert ClipScore(clip)(IMAGES[:1], ["a very long prompt " * 30], [{}]).isfinite().all()


def test_the_aesthetic_head_is_the_published_stack_of_linear_layers(clip, tmp_path):
    from safetensors.torch import save_file

    sizes = [(12, 10), (10, 8), (8, 6), (6, 4), (4, 1)]
    generator = torch.Generator().manual_seed(4)
    state = {}
    for place, (inner, outer) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        state[f"layers.{place}.weight"] = torch.randn(outer, inner, generator=generator)
        state[f"layers.{place}.bias"] = torch.randn(outer, generator=generator)
    head = str(tmp_path / "head.safetensors")
    save_file(state, head)
    reward = Aesthetic(head, clip)
    x, _ = reward._embed(IMAGES, PROMPTS)
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    torch.testing.assert_close(reward(IMAGES, PROMPTS, ROWS), x[:, 0])
    del state["layers.7.bias"]
    save_file(state, head)
    with pytest.raises(ValueError, match="has no layers.7.bias"):
        Aesthetic(head, clip)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ClipScore("nobody/nothing"), OSError, "hf download nobody/nothing"),
        (lambda: DinoSimilarity("nobody/nothing"), OSError, "hf download nobody/nothing"),
        (lambda: Composition("nobody/nothing"), OSError, "hf download nobody/nothing"),
        (lambda: Aesthetic("head.pth"), ValueError, "not a .safetensors"),
    ],
)
def test_missing_weights_say_what_to_do(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_dino_similarity_is_1_for_the_reference_itself_and_less_for_others(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path / "dino"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    IMAGES[0].save(tmp_path / "reference.png")
    row = {"reference": str(tmp_path / "reference.png")}
    same, other = DinoSimilarity(str(folder))(IMAGES, PROMPTS, [row, {"file_name": row["reference"]}])
    assert float(same) == pytest.approx(1, abs=1e-5) and float(other) < float(same) - 1e-4
    reward = DinoSimilarity(str(folder))
    DinoSimilarity.check(PROMPTS, [row, {"file_name": row["reference"]}], model="nobody/nothing")
    whole = (tmp_path / "reference.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for wrong, words in (
        ({}, 'Give it a "reference"'),
        ({"reference": str(tmp_path / "none.png")}, "there is no reference .*none.png"),
        ({"reference": str(tmp_path / "cut.png")}, "cut.png cannot be read as a picture"),
        ({"reference": str(tmp_path / "text.png")}, "text.png cannot be read as a picture"),
        ({"reference": str(tmp_path)}, "cannot be read as a picture"),
    ):
        for score in (lambda rows: reward(IMAGES, PROMPTS, rows), partial(DinoSimilarity.check, PROMPTS)):
            with pytest.raises(ValueError, match=words):
                score([row, wrong])


@pytest.mark.parametrize(
    ("box", "other", "told"),
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
        ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
        ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # 2 apart, .1 x 20 = 2 does not count
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),  # (5 - 2) / 5 > 1/2
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),  # (4 - 2) / 4 is not
    ],
)
def test_a_relation_needs_more_than_a_tenth_of_both_sizes_and_half_the_way(box, other, told):
    assert relations(box, other) == told


def cat(x: float, name: str = "cat", confidence: float = 0.95) -> Found:
    return Found(name, confidence, (x, 0, x + 10, 10))


def test_requirements_are_counts_positions_and_exclusions():
    row = checked_row(
        {
            "include": [{"class": "cat", "count": 2}, {"class": "dog", "position": ["right of", 0]}],
            "exclude": [{"class": "cat", "count": 3}],
        }
    )
    cats, dog = [cat(0), cat(15)], cat(60, "dog")
    assert requirements(row, [cats, [dog]], [*cats, dog], 0.9) == [True, True, True, True]
    assert requirements(row, [cats[:1], [dog]], [cats[0], dog], 0.9) == [False, True, True, True]
    assert requirements(row, [cats, [cat(-30, "dog")]], cats, 0.9) == [True, True, False, True]
    assert requirements(row, [cats, []], cats, 0.9) == [True, False, False, True]
    three = [*cats, cat(30)]
    assert requirements(row, [three, [dog]], [*three, dog], 0.9) == [True, True, True, False]
    unsure = [*cats, cat(30, confidence=0.5)]
    assert requirements(row, [cats, [dog]], [*unsure, dog], 0.9)[-1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "asks for nothing"),
        ({"include": [{"class": "cat", "color": "mauve"}]}, "mauve"),
        ({"include": [{"class": "cat", "position": ["near", 0]}]}, "near"),
        ({"include": [{"class": "cat", "position": ["above", 1]}]}, "entry of include"),
        ({"include": [{"class": "cat", "position": ["above"]}]}, "entry of include"),
        ({"include": [{"class": "cat", "position": ["above", "dog"]}]}, "entry of include"),
        ({"include": "cat"}, "is not a list of"),
        ({"include": [{"count": 2}]}, "is not a list of"),
        ({"include": [{"class": "cat"}], "exclude": ["dog"]}, '"exclude" of the row'),
        ({"include": [{"class": "cat", "count": "two"}]}, "count 'two' of 'cat' is not a whole number"),
    ],
)
def test_rows_that_make_no_sense_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        checked_row(row)
    with pytest.raises(ValueError, match=words):
        Composition.check(["a cat"], [row], detector="nobody/nothing")  # needs no detector


def test_a_cut_out_stays_inside_and_has_at_least_a_pixel():
    image = noise(5)
    assert crop(image, (-5, -5, 100, 100)).size == (32, 32)
    assert crop(image, (31.9, 31.9, 31.9, 31.9)).size == (1, 1)
    assert crop(image, (4, 8, 14, 28)).size == (10, 20)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    """A random RT-DETR of 3 classes with its processor, as a folder."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    folder, w = tmp_path_factory.mktemp("detector"), 16
    stages = {"hidden_sizes": [w] * 4, "depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = RTDetrResNetConfig(embedding_size=w, layer_type="basic", **stages)
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[w] * 3, feat_strides=[8, 16, 32], encoder_hidden_dim=w,
        encoder_ffn_dim=w, encoder_attention_heads=2, d_model=w, num_queries=6, decoder_in_channels=[w] * 3,
        decoder_ffn_dim=w, decoder_layers=1, decoder_attention_heads=2, num_denoising=0,
        id2label={0: "cat", 1: "dog", 2: "wine glass"},
    )  # fmt: skip
    torch.manual_seed(1)
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_composition_counts_what_the_detector_says(detector, clip):
    made = Composition(detector, clip, threshold=0.0, count_threshold=0.0)
    found = made.detect(IMAGES)
    assert len(found) == 2 and [len(one) for one in found] == [6, 6]
    assert [one.confidence for one in found[0]] == sorted((one.confidence for one in found[0]), reverse=True)
    counts = [sum(one.name == "cat" for one in held) for held in found]
    rows = [{"include": [{"class": "cat", "count": max(1, count)}]} for count in counts]
    assert made(IMAGES, PROMPTS, rows) == [float(count > 0) for count in counts]
    assert made(IMAGES, PROMPTS, [{"include": [{"class": "cat", "count": count + 1}]} for count in counts]) == [0, 0]
    sure = found[0][0]
    strict = Composition(detector, clip, threshold=sure.confidence * 1.001, count_threshold=1.0)
    assert strict(IMAGES[:1], PROMPTS[:1], [{"include": [{"class": sure.name}]}]) == [0]
    half = Composition(detector, clip, threshold=0.0, count_threshold=0.0, credit="share")
    assert half(IMAGES[:1], PROMPTS[:1], [{"include": [{"class": sure.name}, {"class": "dog", "count": 9}]}]) == [0.5]


def test_exactly_one_colour_is_told_of_each_thing(detector, clip):
    made = Composition(detector, clip, threshold=0.0, count_threshold=0.0)
    sure = made.detect(IMAGES[:1])[0][0]
    many = [{"include": [{"class": sure.name, "count": 1, "color": color}]} for color in COLORS]
    scores = [made(IMAGES[:1], PROMPTS[:1], [row])[0] for row in many]
    assert sum(scores) == 1


def test_a_colour_is_told_by_three_texts_of_equal_weight_as_in_geneval(clip):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cuts = [Image.new("RGB", (32, 32), (shade, 255 - shade, shade // 2)) for shade in range(0, 256, 16)]
    cuts += [noise(seed) for seed in range(16)]
    texts = [f"a photo of a {c}{end}" for end in (" dog", "-colored dog", " object") for c in COLORS]
    with torch.no_grad():
        said = model(**processor(text=texts, images=cuts, padding=True, return_tensors="pt"))
    three = said.text_embeds.view(3, 10, -1)  # CLIPModel gives unit vectors
    by_all = said.image_embeds @ (three.sum(0) / three.sum(0).norm(dim=1, keepdim=True)).T
    wanted = [COLORS[place] for place in by_all.argmax(1)]
    judge = ColorJudge(clip, "cpu")
    assert judge(cuts, "dog") == wanted
    assert wanted != [COLORS[place] for place in (said.image_embeds @ three[0].T).argmax(1)], "the first alone"
    assert wanted != [COLORS[place] for place in (said.image_embeds @ three.sum(0).T).argmax(1)], "texts that agree"
    assert judge(cuts, "cat") != judge(cuts, "dog") == wanted


def test_the_surest_things_must_have_the_colour_as_in_geneval(detector, clip):
    made, image = Composition(detector, clip, credit="all"), IMAGES[0]
    cats = [Found("cat", sure, (0, 0, 9, 9)) for sure in (0.9, 0.8, 0.7)]
    made._colors = lambda cuts, name: ["blue", "red", "red"][: len(cuts)]
    for count, color, left in ((1, "red", 0), (1, "blue", 1), (2, "red", 1), (3, "red", 2)):
        assert len(made._of_color(image, cats, {"class": "cat", "count": count, "color": color})) == left


def test_unknown_classes_and_credits_are_refused(detector, clip):
    with pytest.raises(ValueError, match="the detector knows no 'glass'"):
        Composition(detector, clip)(IMAGES[:1], PROMPTS[:1], [{"include": [{"class": "glass"}]}])
    named = Composition(detector, clip, threshold=0.0, aliases={"glass": "wine glass"})
    assert named(IMAGES[:1], PROMPTS[:1], [{"include": [{"class": "glass", "count": 99}]}]) == [0]
    with pytest.raises(ValueError, match='"all" or "share"'):
        Composition(detector, clip, credit="half")


def test_classes_are_checked_by_the_config_alone_where_it_is_here(detector, tmp_path):
    shutil.copy(Path(detector) / "config.json", tmp_path)
    rows = [{"include": [{"class": "cat"}], "exclude": [{"class": "glass"}]}]
    with pytest.raises(ValueError, match="the detector knows no 'glass'"):
        Composition.check(PROMPTS[:1], rows, detector=str(tmp_path))
    Composition.check(PROMPTS[:1], rows, detector=str(tmp_path), aliases={"glass": "wine glass"}, credit="share")
    for download in (False, True):  # what cannot be had is told when it is loaded
        Composition.check(PROMPTS[:1], rows, detector="nobody/nothing", download=download)


def test_a_config_is_asked_of_the_hub_only_when_it_may_be(monkeypatch):
    asked = []
    told = SimpleNamespace(id2label={0: "cat"})
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda name, **options: asked.append((name, options)) or told
    )
    rows = [{"include": [{"class": "cat"}]}] * 3
    Composition.check(["a cat"] * 3, rows, detector="some/detector")
    Composition.check(["a cat"] * 3, rows, detector="some/detector", download=True)
    Composition.check(["a cat"] * 3, rows, detector="some/detector", download=True)
    assert asked == [("some/detector", {"local_files_only": here}) for here in (True, False)], "and once"


def test_a_segmentation_detects_as_well_and_colours_are_told_of_the_thing_without_its_surroundings(tmp_path, clip):
    pytest.importorskip("scipy")  # of Mask2Former
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=4,
        id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    made, image = Composition(str(tmp_path), clip, threshold=0.0, count_threshold=0.0), noise(7, 64)
    (found,) = made.detect([image])
    assert found and {one.name for one in found} <= {"cat", "dog"}
    assert [one.confidence for one in found] == sorted((one.confidence for one in found), reverse=True)
    for one in found:
        assert one.mask.shape == (64, 64) and one.mask[:, : int(one.box[0])].sum() == 0
        assert 0 <= one.box[0] < one.box[2] <= 64 and 0 <= one.box[1] < one.box[3] <= 64
    rows = [{"include": [{"class": found[0].name, "color": color}]} for color in COLORS]
    assert 1 <= sum(made([image], PROMPTS[:1], [row])[0] for row in rows) <= 4
    strict = Composition(str(tmp_path), clip, threshold=1.0, count_threshold=1.0)
    assert strict.detect([image]) == [[]] and strict([image], PROMPTS[:1], rows[:1]) == [0]


def test_a_segmentation_in_which_nothing_is_sure_gives_no_things(detector, clip):
    from transformers import Mask2FormerImageProcessor

    said = SimpleNamespace(class_queries_logits=torch.zeros(1, 4, 3), masks_queries_logits=torch.ones(1, 4, 8, 8))
    options = {"threshold": 0.9, "target_sizes": [(32, 32)], "return_binary_maps": True}
    (one,) = Mask2FormerImageProcessor().post_process_instance_segmentation(said, **options)
    assert one["segmentation"].shape == (32, 32), "one map, where there are others one a thing"
    assert Composition(detector, clip)._segmented(one) == []


def test_outside_its_mask_a_cut_out_is_grey():
    mask = np.zeros((32, 32), bool)
    mask[4:8, 4:12] = True
    cut = cut_out(Image.new("RGB", (32, 32), "red"), Found("cat", 1.0, (2, 2, 12, 8), mask))
    assert cut.size == (10, 6)
    assert cut.getpixel((0, 0)) == (153, 153, 153) and cut.getpixel((5, 4)) == (255, 0, 0)
