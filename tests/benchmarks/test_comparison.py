"""The statistics, against numbers worked out by hand and against numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparison import (
    agreement,
    common_prefix,
    geometric_mean,
    judge,
    median,
    percentile,
    same_server_spread,
)
from tests.benchmarks.near import approx

NUMBERS = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50)


@given(NUMBERS, st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == approx(float(np.quantile(values, share)))


def test_nothing_measured_is_not_a_number() -> None:
    assert all(map(math.isnan, (percentile([], 0.5), median([]), geometric_mean([]), geometric_mean([1.0, 0.0]))))


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == approx(1.0)


def test_spread_of_equal_measures_is_nothing() -> None:
    assert same_server_spread([(5.0, 5.0)] * 4, rounds=2) == approx(0.0)


def test_spread_does_not_depend_on_which_measure_came_first() -> None:
    assert same_server_spread([(1.0, 1.1)], rounds=3) == approx(same_server_spread([(1.1, 1.0)], rounds=3))


def test_spread_of_one_repeat_is_its_difference() -> None:
    assert same_server_spread([(1.1, 1.0)], rounds=1) == approx(0.1)


def test_more_rounds_resolve_more() -> None:
    rng = random.Random(1)
    repeats = [(rng.gauss(100, 5), rng.gauss(100, 5)) for _ in range(30)]
    assert same_server_spread(repeats, rounds=15) < same_server_spread(repeats, rounds=3) / 1.5


def test_spread_keeps_its_promise_where_there_is_nothing_to_find() -> None:
    rng = random.Random(2)

    def claims_something() -> bool:
        repeats = [(rng.gauss(100, 4), rng.gauss(100, 4)) for _ in range(10)]
        ratio = median([rng.gauss(100, 4) / rng.gauss(100, 4) for _ in range(5)])
        return judge(ratio, same_server_spread(repeats, rounds=5)) != "no difference"

    assert sum(claims_something() for _ in range(40)) <= 7  # 5 % are expected; ten repeats estimate it roughly


def test_spread_without_repeats_is_not_a_number() -> None:
    assert math.isnan(same_server_spread([], rounds=3))
    assert judge(2.0, math.nan) == "not measured"


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (1.05, 0.06, "no difference"),
        (0.95, 0.06, "no difference"),
        (1.05, 0.04, "faster"),
        (0.95, 0.04, "slower"),
        (math.nan, 0.04, "not measured"),
    ],
)
def test_judge(ratio: float, spread: float, verdict: str) -> None:
    assert judge(ratio, spread) == verdict


def test_common_prefix() -> None:
    assert [common_prefix("abc", "abd"), common_prefix("ab", "abc"), common_prefix("", "a")] == [2, 2, 0]


def test_agreement_counts_equal_answers_and_how_far_the_others_agree() -> None:
    result = agreement(["same", "abcd"], ["same", "abXX"])
    assert (result.num_answers, result.equal_share, result.prefix_share) == (2, 0.5, 0.75)
    assert agreement([""], [""]).prefix_share == 1.0
    assert math.isnan(agreement([], []).equal_share)
