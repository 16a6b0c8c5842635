"""Which states are asked: functions of integers, and the law that the one low-noise state is drawn from."""

import math

import pytest
import torch
from torch.distributions import Beta

from diffopd.query import _beta, supervised_states

SEED = (3, 0, 0)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("all", list(range(10))),
        ({"fraction": 0.9}, list(range(9))),
        ({"fraction": 0.3}, [0, 1, 2]),
        ({"fraction": 0.01}, [0]),
        ({"fraction": 1.0}, list(range(10))),
        ({"indices": [7, 2]}, [2, 7]),
    ],
)
def test_all_a_fraction_and_given_indices(query, wanted):
    assert supervised_states(query, 10, seed=SEED) == wanted


@pytest.mark.parametrize(
    "query", ["some", {"fraction": 0.5, "indices": [1]}, {"index": 1}, {"indices": [10]}, {"random": 11}]
)
def test_a_query_that_names_nothing_in_the_walk_is_refused(query):
    with pytest.raises(ValueError, match="query"):
        supervised_states(query, 10, seed=SEED)


def test_the_one_low_noise_state_is_a_function_of_the_seed_alone():
    drawn = [supervised_states("one_low_noise", 16, seed=(3, update, 0)) for update in range(50)]
    assert drawn == [supervised_states("one_low_noise", 16, seed=(3, update, 0)) for update in range(50)]
    assert drawn != [supervised_states("one_low_noise", 16, seed=(4, update, 0)) for update in range(50)]
    assert drawn != [supervised_states("one_low_noise", 16, seed=(3, update, 1)) for update in range(50)]
    assert len({index for [index] in drawn}) > 3


def test_the_one_low_noise_state_follows_floor_of_k_times_beta_5_2():
    """Frequencies against the cumulative distribution x^5 (6 - 5x) of Beta(5, 2), K = 16."""
    count, steps = 10_000, 16
    drawn = torch.tensor([supervised_states("one_low_noise", steps, seed=(3, u, 0))[0] for u in range(count)])
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    wanted = (ends**5 * (6 - 5 * ends)).diff()
    found = torch.bincount(drawn, minlength=steps).double() / count
    assert float((found - wanted).abs().max()) < 5 * math.sqrt(float(wanted.max()) / count)
    assert float(drawn.double().mean()) == pytest.approx(float((wanted * torch.arange(steps)).sum()), abs=0.15)


def test_the_beta_draws_have_the_moments_of_torch_distributions():
    drawn = torch.tensor([_beta(5, 2, (u,)) for u in range(5000)], dtype=torch.float64)
    law = Beta(5.0, 2.0)
    assert float(drawn.mean()) == pytest.approx(float(law.mean), abs=0.012)
    assert float(drawn.var()) == pytest.approx(float(law.variance), rel=0.12)


def test_random_states_are_different_uniform_and_a_function_of_the_seed():
    draws = [supervised_states({"random": 3}, 10, seed=(7, update, 0)) for update in range(2000)]
    assert all(states == sorted(set(states)) and len(states) == 3 for states in draws)
    assert draws[0] == supervised_states({"random": 3}, 10, seed=(7, 0, 0))
    counts = [sum(index in states for states in draws) / len(draws) for index in range(10)]
    assert counts == pytest.approx([0.3] * 10, abs=0.04)
    assert supervised_states({"random": 10}, 10, seed=SEED) == list(range(10))
    some = [supervised_states({"random": 2}, 10, seed=(7, update, 0), among=[1, 4, 5]) for update in range(60)]
    assert {tuple(states) for states in some} == {(1, 4), (1, 5), (4, 5)}
    assert supervised_states({"random": 4}, 10, seed=SEED, among=[1, 4, 5]) == [1, 4, 5]
