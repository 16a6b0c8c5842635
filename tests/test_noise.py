"""Noise is a function of integers: of nothing else, and of each of them."""

import itertools

import pytest
import torch

from diffopd import noise

KEYS = {"run_seed": 1, "update": 2, "solver_step": 3}


def drawn(samples, **keys):
    return noise.draw((2, 3), **{**KEYS, **keys}, sample_indices=samples)


def test_a_row_depends_on_its_sample_index_alone_not_on_the_batch_it_is_drawn_in():
    whole = drawn(range(6))
    assert torch.equal(torch.cat([drawn([0, 1, 2]), drawn([3, 4, 5])]), whole)
    assert torch.equal(drawn([4, 1]), whole[[4, 1]])


def test_no_draw_touches_or_reads_the_global_generator():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), drawn([0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(drawn([0]), first)


@pytest.mark.parametrize("key", KEYS)
def test_every_integer_matters(key):
    assert not torch.equal(drawn([0]), drawn([0], **{key: KEYS[key] + 1}))
    assert not torch.equal(drawn([0]), drawn([1]))


def test_the_hash_is_fixed_for_ever_so_that_a_run_resumes_under_a_later_version():
    assert noise.seed_for(0, 0, 0, 0) == 2764884783
    assert noise.hash_of(1, "teacher", -5) == 3341900572
    torch.testing.assert_close(drawn([0])[0, 0], torch.tensor([-0.760108, -0.471602, -0.917620]), rtol=1e-5, atol=1e-5)


def test_hashes_of_neighbouring_integers_hardly_ever_meet_and_keep_the_order_of_keys():
    hashes = [noise.seed_for(*keys) for keys in itertools.product(range(4), range(16), range(8), range(32))]
    assert len(set(hashes)) >= len(hashes) - 2  # 16384 of 2^32: .03 meetings expected
    assert noise.hash_of(1, 2) != noise.hash_of(2, 1)
    assert max(hashes) >= 2**31 and max(hashes) < 2**32


def test_draws_are_standard_normal_and_uncorrelated_over_steps():
    one, two = (noise.draw((5000,), **{**KEYS, "solver_step": step}, sample_indices=range(4)) for step in (0, 1))
    assert abs(float(one.mean())) < 0.035 and float(one.std()) == pytest.approx(1, abs=0.025)  # five standard errors
    assert abs(float((one * two).mean())) < 0.035


def test_uniform_numbers_fill_the_open_interval_evenly():
    numbers = torch.tensor([noise.uniform(0, i) for i in range(4000)])
    assert 0 < float(numbers.min()) and float(numbers.max()) < 1
    found = torch.histc(numbers, bins=10, min=0, max=1)
    assert float((found - 400).abs().max()) < 100


def test_choices_come_with_probability_by_weight_and_weight_zero_never():
    weights = [1.0, 0.0, 3.0]
    chosen = torch.tensor([noise.choose(weights, 7, update) for update in range(4000)])
    found = torch.bincount(chosen, minlength=3) / 4000
    assert found[1] == 0 and float(found[0]) == pytest.approx(0.25, abs=0.035)
    assert noise.choose(weights, 7, 0) == noise.choose(weights, 7, 0)


def test_a_permutation_meets_every_place_once_and_is_another_for_another_epoch():
    order = [noise.permuted(place, 20, 1, 0, "teacher") for place in range(20)]
    assert sorted(order) == list(range(20)) != order
    assert order == [noise.permuted(place, 20, 1, 0, "teacher") for place in range(20)]
    assert order != [noise.permuted(place, 20, 1, 1, "teacher") for place in range(20)]
    assert order != [noise.permuted(place, 20, 1, 0, "other") for place in range(20)]
