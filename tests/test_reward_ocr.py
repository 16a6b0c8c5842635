"""The OCR reward: its scoring rule by hand, and real reading where the engine is installed."""

import sys

import pytest
from PIL import Image, ImageDraw, ImageFont

from diffopd.rewards.ocr import OCR, levenshtein, text_score, wanted_text


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_the_distance_counts_edits(first, second, distance):
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@pytest.mark.parametrize(
    ("wanted", "read", "score"),
    [
        ("Open Now", "OPENNOW", 1.0),
        ("open", "we are open today", 1.0),
        ("OPEN", "0PEN", 0.75),
        ("OPEN", "", 0.0),
        ("ab", "something else entirely", 0.0),
        ("kitten", "sitting", 0.5),
    ],
)
def test_the_score_is_one_less_edits_over_length_without_case_and_spaces(wanted, read, score):
    assert text_score(wanted, read) == pytest.approx(score)


def test_the_wanted_text_is_the_rows_or_the_first_quoted_span():
    assert wanted_text('a sign "Bar" above "Grill"', {}) == "Bar"
    assert wanted_text("a sign “Bar”", {}) == "Bar"
    assert wanted_text('a sign "Bar"', {"text": "Pub"}) == "Pub"
    OCR.check(['a sign "Bar"', "a sign"], [{}, {"text": "Pub"}])
    for prompt in ("a sign", 'a sign " "'):
        with pytest.raises(ValueError, match="quotes no text"):
            wanted_text(prompt, {})
        with pytest.raises(ValueError, match="quotes no text"):
            OCR.check(['"Bar"', prompt], [{}, {}])


def test_without_the_engine_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"Install diffopd\[ocr\]"):
        OCR()


def sign(text: str) -> Image.Image:
    image = Image.new("RGB", (420, 120), "white")
    ImageDraw.Draw(image).text((20, 25), text, fill="black", font=ImageFont.load_default(56))
    return image


def test_a_real_engine_reads_signs_and_tells_right_from_wrong():
    pytest.importorskip("rapidocr")
    reward = OCR()
    images = [sign("Distill 2024"), sign("Distill 2024"), Image.new("RGB", (420, 120), "white")]
    scores = reward(images, ['"Distill 2024"', '"Harbour"', '"Distill"'], [{}, {}, {}])
    assert scores[0] > 0.9 and scores[1] < 0.5 and scores[2] == 0
    small = [sign("Distill 2024").resize((105, 30))]
    assert OCR(upscale=4)(small, ['"Distill 2024"'], [{}])[0] > 0.8
