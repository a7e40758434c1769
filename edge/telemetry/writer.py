"""The one thread that touches the outbox: it commits records in groups and runs what the forwarder asks for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from edge.database import CorruptDatabase, NewerFormat, set_aside
from edge.errors import StoreError

from .outbox import DropReason, Gap, NewRow, Outbox, OutboxStats, Priority, Row
from .span import RequestRecord

log = logging.getLogger("edge.telemetry")

COMMIT_INTERVAL_S = 0.5
"""Records wait this long for company. A kill loses at most a second: this, the first import of protobuf, one fsync."""
MAX_RECORDS_PER_ROW = 512
MAX_BUFFERED_RECORDS = 20_000
"""Records kept in memory while the disk takes none; about 20 MB. The oldest go first, counted."""
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 30.0
_CALL_TIMEOUT_S = 30.0

_T = TypeVar("_T")


class Encoder(Protocol):
    """Makes rows. Called on the writer's thread only."""

    def encode_records(self, records: Sequence[RequestRecord]) -> list[NewRow]:
        """The rows of these requests."""
        ...

    def encode_metrics(self) -> NewRow:
        """A row with every metric as it is now."""
        ...


class OutboxWriter:
    """Buffers records and owns the outbox. Every public method may be called from any thread."""

    def __init__(
        self,
        open_outbox: Callable[[], Outbox],
        encoder: Encoder,
        *,
        metrics_interval_s: float,
        on_commit: Callable[[], None] = lambda: None,
        commit_interval_s: float = COMMIT_INTERVAL_S,
    ) -> None:
        self._open_outbox = open_outbox
        self._encoder = encoder
        self._metrics_interval_s = max(0.05, metrics_interval_s)
        self._commit_interval_s = commit_interval_s
        self._on_commit = on_commit
        self._changed = threading.Condition()
        self._records: deque[RequestRecord] = deque()
        self._first_record_s = 0.0
        self._calls: deque[Callable[[], None]] = deque()
        self._lost: dict[DropReason, Gap] = {}
        self._is_closing = False
        self._stats = OutboxStats()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="telemetry-writer", daemon=True)
        # what follows is touched by the thread alone
        self._outbox: Outbox | None = None
        self._rows: list[NewRow] = []
        self._metrics_due_s = 0.0
        self._retry_wait_s = 0.0
        self._retry_at_s = 0.0

    @property
    def stats(self) -> OutboxStats:
        """The outbox after the last commit."""
        return self._stats

    @property
    def error(self) -> str | None:
        """Why the disk takes nothing at present; None while it does."""
        return self._error

    def start(self) -> None:
        """Start the thread and open the outbox. A disk that is full or read-only is tried again later.

        Raises:
            StoreError: A newer version of the appliance wrote the outbox.
        """
        self._thread.start()
        self._call(self._first_open)

    def offer(self, record: RequestRecord) -> None:
        """Buffer a record. Waits for nothing but another thread that does the same."""
        with self._changed:
            if len(self._records) >= MAX_BUFFERED_RECORDS:
                self._records.popleft()
                self._lose(Gap(Priority.USAGE, "buffer_full", 0, 1, 0))
            if not self._records:
                self._first_record_s = time.monotonic()
            self._records.append(record)
            if len(self._records) in (1, MAX_RECORDS_PER_ROW):
                self._changed.notify()

    def sync(self, *, with_metrics: bool = False) -> None:
        """Commit what was offered so far, and return when it is on the disk.

        Raises:
            StoreError: The disk takes nothing; what was offered is kept and tried again.
        """
        self._call(lambda: self._sync(with_metrics=with_metrics))

    def lease(self, max_rows: int) -> list[Row]:
        """See `Outbox.lease`."""
        return self._call(lambda: self._use(lambda outbox: outbox.lease(max_rows)))

    def acknowledge(self, ids: Collection[int]) -> None:
        """See `Outbox.acknowledge`."""
        self._call(lambda: self._use(lambda outbox: outbox.acknowledge(ids)))

    def release(self, ids: Iterable[int]) -> None:
        """See `Outbox.release`."""
        self._call(lambda: self._use(lambda outbox: outbox.release(ids)))

    def reject(self, row_id: int, *, retry_after_s: float) -> None:
        """See `Outbox.reject`."""
        self._call(lambda: self._use(lambda outbox: outbox.reject(row_id, retry_after_s=retry_after_s)))

    def close(self, timeout_s: float = 10.0) -> None:
        """Commit what is buffered, with the last metrics, and end the thread. A second call does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _call(self, work: Callable[[], _T]) -> _T:
        result: Future[_T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as e:  # noqa: BLE001  # it is the caller's: the future raises it there
                result.set_exception(e)

        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise StoreError("The outbox is closed.", hint="The appliance is shutting down.")
            self._calls.append(run)
            self._changed.notify()
        try:
            return result.result(_CALL_TIMEOUT_S)
        except TimeoutError as e:
            raise StoreError(f"The disk did not answer in {_CALL_TIMEOUT_S:.0f} s.", hint="Check the disk.") from e

    def _run(self) -> None:
        self._metrics_due_s = time.monotonic() + self._metrics_interval_s
        while self._step():
            pass
        if self._outbox is not None:
            self._outbox.close()

    def _step(self) -> bool:
        """One round of the thread; False when it was the last."""
        calls, is_last = self._wait()
        for call in calls:
            call()
        try:
            self._commit_due(is_last=is_last)
        except Exception as e:
            log.exception("telemetry cannot be written")
            self._retry_later(str(e))
        return not is_last

    def _wait(self) -> tuple[list[Callable[[], None]], bool]:
        with self._changed:
            while not self._calls and not self._is_closing and (wait_s := self._due_s() - time.monotonic()) > 0:
                self._changed.wait(wait_s)
            calls = list(self._calls)
            self._calls.clear()
            return calls, self._is_closing

    def _due_s(self) -> float:
        if self._error is not None:
            return self._retry_at_s
        if len(self._records) >= MAX_RECORDS_PER_ROW or self._rows:
            return 0.0
        if self._records:
            return min(self._metrics_due_s, self._first_record_s + self._commit_interval_s)
        return self._metrics_due_s

    def _commit_due(self, *, is_last: bool) -> None:
        if is_last or time.monotonic() >= self._due_s():
            self._commit(with_metrics=is_last or time.monotonic() >= self._metrics_due_s)

    def _sync(self, *, with_metrics: bool) -> None:
        self._commit(with_metrics=with_metrics)
        if self._error is not None:
            raise StoreError(self._error)

    def _commit(self, *, with_metrics: bool) -> None:
        """Append what an earlier attempt left, then what is buffered."""
        if with_metrics:
            self._metrics_due_s = time.monotonic() + self._metrics_interval_s
        if self._rows and not self._append():
            return
        self._rows = self._take_rows()
        if with_metrics:
            self._rows.append(self._encoder.encode_metrics())
        if self._rows or self._lost or self._error is not None:
            self._append()

    def _append(self) -> bool:
        """Put the rows on the disk, with what was lost since the last time. False if it takes nothing."""
        with self._changed:
            lost, self._lost = list(self._lost.values()), {}
        try:
            self._use(lambda outbox: outbox.append(self._rows, lost=lost))
        except StoreError as e:
            for gap in lost:
                self._lose(gap)
            self._retry_later(str(e))
            return False
        self._rows, self._error, self._retry_wait_s = [], None, 0.0
        self._on_commit()
        return True

    def _lose(self, gap: Gap) -> None:
        with self._changed:
            before = self._lost.get(gap.reason)
            self._lost[gap.reason] = gap if before is None else before.plus(gap)

    def _take_rows(self) -> list[NewRow]:
        with self._changed:
            records = list(self._records)
            self._records.clear()
        chunks = [records[i : i + MAX_RECORDS_PER_ROW] for i in range(0, len(records), MAX_RECORDS_PER_ROW)]
        return [row for chunk in chunks for row in self._encoded(chunk)]

    def _encoded(self, records: Sequence[RequestRecord]) -> list[NewRow]:
        """Rows of these records. One that cannot be encoded costs itself only: halves are tried till it is alone."""
        try:
            return self._encoder.encode_records(records)
        except (TypeError, ValueError, AttributeError):
            if len(records) == 1:
                log.exception("a request record cannot be encoded and is dropped")
                self._lose(Gap(Priority.USAGE, "not_encodable", 0, 1, 0))
                return []
        middle = len(records) // 2
        return self._encoded(records[:middle]) + self._encoded(records[middle:])

    def _retry_later(self, error: str) -> None:
        if self._error is None:
            log.warning("telemetry waits in memory: %s", error)
        self._error = error
        self._retry_wait_s = min(_MAX_RETRY_S, max(_MIN_RETRY_S, 2 * self._retry_wait_s))
        self._retry_at_s = time.monotonic() + self._retry_wait_s

    def _first_open(self) -> None:
        try:
            self._use(lambda outbox: None)
        except NewerFormat:
            raise
        except StoreError as e:
            self._retry_later(str(e))

    def _use(self, work: Callable[[Outbox], _T]) -> _T:
        """Run `work` on the outbox, opened where it is not. A damaged file is set aside; the next use starts anew."""
        try:
            if self._outbox is None:
                self._outbox = self._open_outbox()
            result = work(self._outbox)
            self._stats = self._outbox.stats()
        except CorruptDatabase as e:
            self._set_aside(e)
            raise
        return result

    def _set_aside(self, error: CorruptDatabase) -> None:
        log.error("%s", error)
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
        set_aside(error.path)
        self._lose(Gap(Priority.FAULT, "corrupt", self._stats.rows, 0, self._stats.size_bytes))
        self._stats = OutboxStats()
