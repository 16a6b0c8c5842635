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


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_shares_that_are_all_right_or_all_wrong_keep_the_doubt_of_their_number(score):
    """Clopper and Pearson: at the bound, 40 of 40 would still come out in one of 40 trials."""
    low, high = bootstrap_interval([score] * 120, groups=[n // 3 for n in range(120)], shares=True)
    worst = low if score else 1 - high
    assert worst**40 == pytest.approx(0.025) and (high if score else 1 - low) == 1
    assert bootstrap_interval([0.5] * 10, shares=True) == (0.5, 0.5)
    mixed = [score] * 9 + [1 - score]
    assert bootstrap_interval(mixed, shares=True) == bootstrap_interval(mixed)


def test_pairing_makes_the_ratio_of_correlated_scores_narrow():
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 2, 500).astype(float)
    scores = np.where(rng.random(500) < 0.02, 0.0, reference)
    value, low, high = ratio_interval(scores, reference)
    shuffled = ratio_interval(rng.permutation(scores), reference)
    assert value == pytest.approx(scores.mean() / reference.mean())
    assert low <= value <= high
    assert high - low < 0.5 * (shuffled[2] - shuffled[1])


def coins(*, repeated: int) -> tuple[np.ndarray, list[str]]:
    """Forty coins, each looked at `repeated` times."""
    scores = np.random.default_rng(2).integers(0, 2, 40).astype(float)
    return np.repeat(scores, repeated), [f"coin {n}" for n in range(40) for _ in range(repeated)]


def test_scores_that_are_told_twice_make_no_interval_narrower():
    once, _ = coins(repeated=1)
    often, groups = coins(repeated=25)
    assert bootstrap_interval(often, groups=groups) == pytest.approx(bootstrap_interval(once))
    assert ratio_interval(often, 1 - often / 2, groups=groups) == pytest.approx(ratio_interval(once, 1 - once / 2))
    low, high = bootstrap_interval(often)
    assert high - low < 0.25 * np.diff(bootstrap_interval(often, groups=groups))[0]


def test_the_order_of_rows_and_the_names_of_groups_do_not_matter_beyond_the_draws():
    scores, groups = coins(repeated=5)
    order = np.random.default_rng(3).permutation(len(scores))
    mixed = bootstrap_interval(scores[order], groups=[(groups[n], 0) for n in order])
    assert mixed == pytest.approx(bootstrap_interval(scores, groups=groups), abs=0.03)


def test_groups_of_different_sizes_weigh_by_their_rows():
    scores, groups = [1.0] * 9 + [0.0] * 3, [0] * 9 + [1, 2, 3]
    low, high = bootstrap_interval(scores, groups=groups)
    assert low == 0 and high > 0.9


def test_one_group_for_all_says_nothing_and_each_prompt_is_its_own():
    scores, _ = coins(repeated=1)
    assert bootstrap_interval(scores, groups=["all"] * 40) == bootstrap_interval(scores)


def test_trainings_are_drawn_where_there_are_several():
    both = np.stack([np.ones(50), np.zeros(50)])
    assert bootstrap_interval(both) == (0, 1)
    value, low, high = ratio_interval(both, np.full(50, 0.5))
    assert (value, low, high) == (1, 0, 2)


def test_a_number_of_groups_that_is_not_that_of_the_prompts_is_refused():
    with pytest.raises(ValueError, match="3 prompts have 2 groups"):
        bootstrap_interval([1.0, 0.0, 1.0], groups=["a", "b"])


def test_ratios_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        ratio_interval([1.0], [1.0, 0.0])
    for nothing in ([0.0, 0.0], [-2.0, 1.0]):
        with pytest.raises(ValueError, match="a ratio is to a score above 0"):
            ratio_interval([1.0, 1.0], nothing)


def test_diversity_is_zero_for_equal_pictures_and_one_between_black_and_white():
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (255, 255, 255))
    assert diversity([black, black]) == 0
    assert diversity([black, white]) == pytest.approx(1)
    assert diversity([black]) == 0
    assert diversity([black, black, white]) == pytest.approx(2 / 3)
