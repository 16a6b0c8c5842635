"""Which states of a walk are supervised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffopd.noise import permuted, uniform


def supervised_states(
    query: str | dict[str, Any], num_visits: int, *, seed: tuple[int, ...], among: Sequence[int] | None = None
) -> list[int]:
    """State indices in [0, num_visits), increasing; a function of the query, the length and the seed integers.

    "all"; {"fraction": p}: the first max(1, floor(p K)), as the released DiffusionOPD trains the first 9 of 10;
    {"indices": [...]}; "one_low_noise": one index floor(K Beta(5, 2)), DanceOPD (arXiv:2606.27377); {"random": n}: n
    different ones, uniformly, or all where there are fewer. The rollout ends at the last of them. among: states that
    {"random": n} draws from, else all. Raises ValueError for an unknown query or an index outside the walk.
    """
    if query == "all":
        return list(range(num_visits))
    if query == "one_low_noise":
        return [math.floor(num_visits * _beta(5, 2, seed))]
    if isinstance(query, dict) and set(query) == {"fraction"}:
        return list(range(max(1, math.floor(query["fraction"] * num_visits + 1e-9))))
    if isinstance(query, dict) and set(query) == {"indices"}:
        wrong = [index for index in query["indices"] if not 0 <= index < num_visits]
        if wrong:
            raise ValueError(
                f"query index {wrong[0]} is outside the walk of {num_visits} states, 0 to {num_visits - 1}."
            )
        return sorted(query["indices"])
    if isinstance(query, dict) and set(query) == {"random"}:
        if query["random"] > num_visits:
            raise ValueError(f"query random = {query['random']} asks for more than the walk's {num_visits} states.")
        pool = range(num_visits) if among is None else among
        drawn = (permuted(place, len(pool), "random states", *seed) for place in range(min(query["random"], len(pool))))
        return sorted(pool[place] for place in drawn)
    raise ValueError(
        f'query {query!r}; allowed are "all", "one_low_noise", {{fraction = p}}, {{indices = [..]}}, {{random = n}}.'
    )


def _beta(a: int, b: int, seed: tuple[int, ...]) -> float:
    """Beta(a, b) for whole a and b: a ratio of sums of exponentials."""
    exponentials = [-math.log(uniform("beta", number, *seed)) for number in range(a + b)]
    return sum(exponentials[:a]) / sum(exponentials)
