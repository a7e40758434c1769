"""What both engines do around their steps."""

from __future__ import annotations

import pytest

from edge.errors import BackendError
from runtime.loop import MAX_CONSECUTIVE_FAILURES, Inbox, StepGuard
from runtime.request import RequestId


def inbox_with(done: list[int], *numbers: int) -> Inbox:
    inbox = Inbox(clock=lambda: 0.0)
    for number in numbers:
        inbox.put(done.append, number)
    return inbox


def test_calls_are_made_in_order_and_close_is_one_of_them() -> None:
    done: list[int] = []
    inbox = inbox_with(done, 1, 2)
    inbox.close()
    inbox.put(done.append, 3)
    assert inbox.take()
    assert (done, inbox.is_closed) == ([1], False)
    inbox.take_all()
    assert (done, inbox.is_closed) == ([1, 2, 3], True)
    assert not inbox.take(0.001)


def test_the_rest_of_a_burst_is_waited_for_only_after_a_burst() -> None:
    done: list[int] = []
    inbox = inbox_with(done, 1, 2, 3, 4, 5, 6)
    inbox.wait(lambda: True)
    assert done == [1]
    inbox.note(1)
    inbox.wait(lambda: True)
    assert done == [1, 2]
    inbox.note(2)
    inbox.note(1)
    inbox.wait(lambda: len(done) < 5)
    assert done == [1, 2, 3, 4, 5]
    inbox.wait(lambda: True)
    assert done == [1, 2, 3, 4, 5, 6]


def test_step_after_step_that_fails_ends_the_engine() -> None:
    guard, error = StepGuard(lambda _: None, None, None), BackendError("a step failed")
    guard.begin([RequestId(1)], 5)
    for _ in range(2):
        guard.succeeded()
        for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
            guard.failed(error)
    with pytest.raises(BackendError):
        guard.failed(error)
