"""Numbers with their uncertainty."""

import numpy as np
import pytest
from PIL import Image

from diffopd.metrics import bootstrap_interval, diversity, ratio_interval


def test_the_interval_of_a_coin_has_the_binomial_width():
    scores = np.random.default_rng(0).integers(0, 2, 1000)
    low, high = bootstrap_interval(scores)
    assert low < scores.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(1000), rel=0.1)


def test_equal_scores_have_no_width():
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_pairing_makes_the_ratio_of_correlated_scores_narrow():
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 2, 500).astype(float)
    scores = np.where(rng.random(500) < 0.02, 0.0, reference)
    value, low, high = ratio_interval(scores, reference)
    shuffled = ratio_interval(rng.permutation(scores), reference)
    assert value == pytest.approx(scores.mean() / reference.mean())
    assert low <= value <= high
    assert high - low < 0.5 * (shuffled[2] - shuffled[1])


def test_ratios_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        ratio_interval([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="scores 0"):
        ratio_interval([1.0, 1.0], [0.0, 0.0])


def test_diversity_is_zero_for_equal_pictures_and_one_between_black_and_white():
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (255, 255, 255))
    assert diversity([black, black]) == 0
    assert diversity([black, white]) == pytest.approx(1)
    assert diversity([black]) == 0
