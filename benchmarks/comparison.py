"""The numbers: percentiles, paired ratios, and how far two measures of the same server lie apart."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_RESAMPLES = 4000
_COVERAGE = 0.95
Verdict = Literal["faster", "slower", "no difference", "not measured"]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated; NaN of none.

    Source: Hyndman and Fan 1996, definition 7 (numpy's default).
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Sequence[float]) -> float:
    """The median; NaN of none."""
    return statistics.median(values) if values else math.nan


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean, right for ratios; NaN of none or where one is not positive."""
    if not values or min(values) <= 0:
        return math.nan
    return math.exp(statistics.fmean(map(math.log, values)))


def same_server_spread(repeats: Sequence[tuple[float, float]], *, rounds: int) -> float:
    """How far from 1 a median of `rounds` ratios comes to lie where there is nothing to find.

    Draws with replacement from the ratios between two measures of the same server in one round, in either direction,
    and gives the bound that 95 % of the medians keep; NaN without repeats.

    Source: bootstrap under the null hypothesis, Efron and Tibshirani 1993, chapter 16.
    """
    logs = [math.log(a / b) for a, b in repeats if a > 0 and b > 0]
    if not logs or rounds < 1:
        return math.nan
    both = [*logs, *(-x for x in logs)]
    rng = random.Random(0)  # the same numbers give the same report
    medians = [abs(statistics.median(rng.choices(both, k=rounds))) for _ in range(_RESAMPLES)]
    return math.expm1(percentile(medians, _COVERAGE))


def judge(ratio: float, spread: float) -> Verdict:
    """What may be claimed of a ratio in which more is better."""
    if math.isnan(ratio) or math.isnan(spread):
        return "not measured"
    if abs(math.log(ratio)) <= math.log1p(spread):
        return "no difference"
    return "faster" if ratio > 1 else "slower"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two servers' greedy answers are the same.

    Attributes:
        equal_share: Of the answers, how many are equal to the byte.
        prefix_share: Of the shorter answers' characters, how many come before the first difference, on average.
    """

    num_answers: int
    equal_share: float
    prefix_share: float


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(ours: Sequence[str], theirs: Sequence[str]) -> Agreement:
    """Compare answers to the same requests, in the same order; those that only one side has are left out."""
    pairs = list(zip(ours, theirs, strict=False))
    if not pairs:
        return Agreement(0, math.nan, math.nan)
    shares = [1.0 if a == b else common_prefix(a, b) / max(1, min(len(a), len(b))) for a, b in pairs]
    return Agreement(len(pairs), sum(a == b for a, b in pairs) / len(pairs), statistics.fmean(shares))
