"""What the thread of an engine does around its steps, whatever they compute: take what others ask, mind the steps."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, Protocol

from edge.errors import BackendError
from runtime.governor import Governor
from runtime.request import RequestId

log = logging.getLogger("edge.loop")

P = ParamSpec("P")

COALESCE_S = 0.002
"""After the first request of an idle engine, how long to wait for the rest of a burst, if the last work was one: it
saves the steps in which the first would run alone (measured: 3 % of throughput at 16 clients, and the tail of the token
intervals)."""
MAX_CONSECUTIVE_FAILURES = 3


class Observer(Protocol):
    """Hears what the engine is at, on its thread: who looks after a death wants to know. Must not block."""

    def begin_step(self, ids: list[RequestId], num_tokens: int) -> None:
        """A step with these requests begins."""
        ...

    def idle(self) -> None:
        """There is nothing to do."""
        ...


class Inbox:
    """Calls that the engine's thread is to make. `put` and `close` may come from any thread, the rest from its own.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._clock = clock
        self._crowd = 0
        self.is_closed = False

    def put(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have a call made after those before it."""
        self._calls.put(partial(call, *args, **kwargs))

    def close(self) -> None:
        """Set `is_closed` after the calls before."""
        self.put(setattr, self, "is_closed", True)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has arrived."""
        return self._calls.empty()

    def take(self, timeout_s: float | None = None) -> bool:
        """Wait for a call and make it. False where none came in time."""
        try:
            call = self._calls.get(timeout=timeout_s)
        except queue.Empty:
            return False
        call()
        return True

    def take_all(self) -> None:
        """Make the calls that have arrived."""
        while not self.is_empty:
            self.take()

    def note(self, num_requests: int) -> None:
        """So many are being worked on at once."""
        self._crowd = max(self._crowd, num_requests)

    def wait(self, wants_more: Callable[[], bool]) -> None:
        """Sleep until there is a call, and make it. Where the work since the last sleep was a burst, wait a moment for
        the rest of the next, as long as `wants_more`."""
        crowd, self._crowd = self._crowd, 0
        self.take()
        deadline = self._clock() + 5 * COALESCE_S
        while crowd > 1 and wants_more() and (left := deadline - self._clock()) > 0:
            if not self.take(min(COALESCE_S, left)):
                return


class StepGuard:
    """Minds the steps: tells the observer, chooses the threads, and ends the engine when step after step fails.

    Args:
        set_threads: Tells the backend.
        governor: Chooses the threads of each step; without one they stay as the backend was opened.
        observer: Hears of each step before it is computed.
    """

    def __init__(
        self, set_threads: Callable[[int], None], governor: Governor | None, observer: Observer | None
    ) -> None:
        self.threads = 0
        """Of the present step, where a governor chooses them."""
        self._set_threads = set_threads
        self._governor = governor
        self._observer = observer
        self._num_failed = 0

    def begin(self, ids: list[RequestId], num_tokens: int) -> None:
        """Tell the observer that a step begins."""
        if self._observer is not None:
            self._observer.begin_step(ids, num_tokens)

    def idle(self) -> None:
        """Tell it that there is nothing to do."""
        if self._observer is not None:
            self._observer.idle()

    def govern(self, now: float) -> None:
        """Choose the threads of the step that begins."""
        if self._governor is not None and (threads := self._governor.choose(now)) != self.threads:
            self._set_threads(threads)
            self.threads = threads

    def succeeded(self) -> None:
        """A step was computed."""
        self._num_failed = 0

    def failed(self, error: BackendError) -> None:
        """A step was not, and its requests were told.

        Raises:
            BackendError: It is the last of `MAX_CONSECUTIVE_FAILURES` in a row.
        """
        log.error("step failed: %s", error)
        self._num_failed += 1
        if self._num_failed >= MAX_CONSECUTIVE_FAILURES:
            raise error
