"""Lease, export, acknowledge; wait longer after each failure. On its own thread, so that the link delays nobody."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, assert_never

from edge.errors import StoreError

from .exporter import Accepted, Exporter, Rejected, Unavailable
from .outbox import Row

log = logging.getLogger("edge.telemetry")

MAX_LEASE_ROWS = 32
BASE_WAIT_S, MAX_WAIT_S = 1.0, 60.0
REJECTED_WAIT_S = 60.0
"""An invalid row is tried again no sooner; rows behind it go on."""
DISK_WAIT_S = 5.0


class Spool(Protocol):
    """What the forwarder needs of an outbox: `Outbox` itself, or `OutboxWriter` in front of it."""

    def lease(self, max_rows: int) -> list[Row]:
        """Rows to send now."""
        ...

    def acknowledge(self, ids: Collection[int]) -> None:
        """Forget rows that were delivered."""
        ...

    def release(self, ids: Iterable[int]) -> None:
        """Give rows back unsent."""
        ...

    def reject(self, row_id: int, *, retry_after_s: float) -> None:
        """Note a row that was called invalid."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What became of one round. `wait_s` is None when nothing is left to send now."""

    num_sent: int
    wait_s: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class ForwarderState:
    """The forwarder at one moment, ages in seconds."""

    last_success_age_s: float | None
    last_error: str | None
    next_attempt_s: float | None


class Forwarder:
    """Sends rows one round at a time. Owned by one thread; time and chance come from outside."""

    def __init__(
        self,
        spool: Spool,
        exporter: Exporter,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._spool = spool
        self._exporter = exporter
        self._chance = chance
        self._num_failures = 0
        self._delivered: list[int] = []

    def step(self) -> Progress:
        """Send what is due, at most one lease of it.

        Delivered rows whose acknowledgement the disk refused are kept in mind, and nothing more is sent until it is
        taken: they would otherwise be sent again.
        """
        try:
            self._acknowledge()
            rows = self._spool.lease(MAX_LEASE_ROWS)
            if not rows:
                return Progress(0, None, None)
            error = self._send(rows)
            num_sent = self._acknowledge()
        except StoreError as e:
            return Progress(0, DISK_WAIT_S, str(e))
        if num_sent:
            self._num_failures = 0
        wait_s = self._wait_s(error) if isinstance(error, Unavailable) else 0.0
        return Progress(num_sent, wait_s, error.reason if error else None)

    def _acknowledge(self) -> int:
        num_sent = len(self._delivered)
        self._spool.acknowledge(self._delivered)
        self._delivered = []
        return num_sent

    def _send(self, rows: list[Row]) -> Unavailable | Rejected | None:
        """Send each row until one cannot be delivered; the rest is given back. The last thing that went wrong."""
        left = deque(rows)
        refused: Rejected | None = None
        try:
            while left:
                delivery = self._exporter.export(left[0])
                match delivery:
                    case Accepted():
                        self._note_accepted(left[0], delivery)
                    case Rejected():
                        refused = delivery
                        self._reject(left[0], delivery)
                    case Unavailable():
                        return delivery
                    case _:
                        assert_never(delivery)
                left.popleft()
        finally:
            self._spool.release([row.id for row in left])
        return refused

    def _note_accepted(self, row: Row, delivery: Accepted) -> None:
        self._delivered.append(row.id)
        if delivery.rejected_records:
            log.warning("the gateway threw away %d of %d records", delivery.rejected_records, row.records)

    def _reject(self, row: Row, delivery: Rejected) -> None:
        log.warning("the gateway refuses batch %s: %s", row.key, delivery.reason)
        self._spool.reject(row.id, retry_after_s=REJECTED_WAIT_S)

    def _wait_s(self, failure: Unavailable) -> float:
        """Full jitter: anything up to a bound that doubles, so that a fleet does not come back all at once.

        Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        """
        bound_s = min(MAX_WAIT_S, BASE_WAIT_S * 2.0 ** min(self._num_failures, 16))
        self._num_failures += 1
        return max(self._chance() * bound_s, failure.retry_after_s or 0.0)


class ForwarderThread:
    """Runs a forwarder until stopped. Every public method may be called from any thread."""

    def __init__(self, spool: Spool, open_exporter: Callable[[], AbstractContextManager[Exporter]]) -> None:
        self._spool = spool
        self._open_exporter = open_exporter
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_urgent = False
        self._has_news = True
        self._num_started = 0
        self._num_ended = 0
        self._last = Progress(0, None, None)
        self._last_error: str | None = None
        self._last_success_s: float | None = None
        self._next_attempt_s = 0.0
        self._thread = threading.Thread(target=self._run, name="telemetry-forwarder", daemon=True)

    def start(self) -> None:
        """Begin to forward."""
        self._thread.start()

    def notify(self) -> None:
        """Say that there may be something to send; a wait after a failure goes on all the same."""
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> Progress:
        """Try now, also in the middle of a wait, until nothing is left or a round fails. What the last round did."""
        with self._changed:
            first = self._num_started + 1
            self._is_urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_ended >= first and self._is_at_rest(), timeout_s)
            return self._last

    def state(self) -> ForwarderState:
        """How it goes."""
        now = time.monotonic()
        with self._changed:
            return ForwarderState(
                last_success_age_s=None if self._last_success_s is None else now - self._last_success_s,
                last_error=self._last_error,
                next_attempt_s=max(0.0, self._next_attempt_s - now) if self._last.error is not None else None,
            )

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop after the row that is under way. A reply that takes longer is not waited for: its row stays."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _is_at_rest(self) -> bool:
        return self._last.wait_s is None or self._last.error is not None or self._is_stopping

    def _run(self) -> None:
        with self._open_exporter() as exporter:
            forwarder = Forwarder(self._spool, exporter)
            while self._wait():
                try:
                    progress = forwarder.step()
                except Exception as e:
                    log.exception("forwarding failed; it is tried again")
                    progress = Progress(0, MAX_WAIT_S, f"{type(e).__name__}: {e}")
                self._note(progress)

    def _wait(self) -> bool:
        """Wait until there is a reason for a round; False when it is time to stop."""
        with self._changed:
            while not self._is_stopping and not self._is_urgent:
                if (wait_s := self._due_s() - time.monotonic()) <= 0:
                    break
                self._changed.wait(wait_s)
            self._is_urgent = self._has_news = False
            self._num_started += 1
            return not self._is_stopping

    def _due_s(self) -> float:
        return 0.0 if self._has_news and self._last.wait_s is None else self._next_attempt_s

    def _note(self, progress: Progress) -> None:
        now = time.monotonic()
        with self._changed:
            self._num_ended = self._num_started
            self._last = progress
            # with nothing left, one more look in a while: a row that was refused becomes due without any news
            self._next_attempt_s = now + (MAX_WAIT_S if progress.wait_s is None else progress.wait_s)
            if progress.num_sent:
                self._last_success_s = now
            if progress.error is not None or progress.num_sent:
                self._last_error = progress.error
            self._changed.notify_all()
