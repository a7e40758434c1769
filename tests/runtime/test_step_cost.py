"""Step costs learned on scripted machines."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.step_cost import StepCosts

MACHINES: dict[str, Callable[[int], float]] = {
    "affine": lambda n: 0.004 + 0.002 * n,
    "small batches are dear": lambda n: 0.006 * n**0.75 + 0.001 * n,
    "wide ones are nearly free": lambda n: 0.015 + 0.0045 * min(n, 16) + 0.0005 * n,
}


def within(value: float | None, truth: float, share: float) -> bool:
    return value is not None and truth / (1 + share) <= value <= truth * (1 + share)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@given(seed=st.integers(0, 1000))
def test_noise_outliers_and_a_change_of_pace_are_seen_through(machine: Callable[[int], float], seed: int) -> None:
    rng = random.Random(seed)
    costs = StepCosts()
    pace = 1.0
    for step in range(400):
        if step % 50 == 0:
            pace = rng.choice([0.5, 1.0, 2.0])
        n = rng.choice([1, 1, 1, 2, 4, 8, 16, 60, 130, 512])
        stall = 8 if rng.random() < 0.03 else 1
        costs.record(n, threads=2, seconds=machine(n) * pace * stall * rng.uniform(0.9, 1.1))
    for n in (1, 4, 16, 130, 512):
        assert within(costs.predict(n, threads=2), machine(n) * pace, 0.35), n


def test_a_width_not_seen_since_the_host_slowed_down_is_told_at_the_new_pace() -> None:
    costs = StepCosts()
    for _ in range(10):
        for n in (1, 64):
            costs.record(n, threads=2, seconds=0.005 + 0.002 * n)
    for _ in range(10):
        costs.record(1, threads=2, seconds=0.014)
    assert within(costs.predict(64, threads=2), 2 * 0.133, 0.05)


def test_unseen_widths_lie_between_and_beyond_the_seen_ones() -> None:
    costs = StepCosts()
    costs.record(10, threads=1, seconds=0.1)
    assert within(costs.predict(5, threads=1), 0.05, 0.01)
    assert within(costs.predict(20, threads=1), 0.2, 0.01)
    costs.record(1, threads=1, seconds=0.01 + 0.009)
    assert within(costs.predict(5, threads=1), 0.019 + 0.081 * 4 / 9, 0.01)


def test_threads_are_kept_apart_and_nothing_known_is_said() -> None:
    costs = StepCosts()
    costs.record(0, threads=2, seconds=1.0)
    costs.record(4, threads=2, seconds=0.0)
    assert costs.predict(4, threads=2) is None
    costs.record(4, threads=2, seconds=0.04)
    assert costs.predict(4, threads=1) is None
