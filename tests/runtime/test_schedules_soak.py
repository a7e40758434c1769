"""The long form of the law of schedules; docs/architecture.md has the last count."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.runtime import test_scheduler

NUM_SCHEDULES = 12_000


@pytest.mark.soak
def test_thousands_of_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    num_checked = 0

    def check(**schedule: Any) -> None:
        nonlocal num_checked
        test_scheduler.check_schedule(**schedule)
        num_checked += 1

    many = settings(max_examples=NUM_SCHEDULES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    many(test_scheduler.any_schedule(check))()
    with capsys.disabled():
        print(f"\n{num_checked} schedules obeyed the law")
    assert num_checked >= 10_000
