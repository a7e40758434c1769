"""The one thread of the appliance that writes `state.db`: usage in groups, an act of an operator at once."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from edge.database import errors_of, file_of, transaction
from edge.errors import EdgeError, StoreError

from . import audit, usage
from .audit import Act, Head
from .quota import DAY_S
from .state import open_state
from .usage import Account, Usage

log = logging.getLogger("edge.access")

COMMIT_INTERVAL_S = 0.8
"""Usage waits this long for company; with the commit itself, a kill loses less than about a second of it."""
RETRY_S = 5.0
MAX_WAITING_ACTS = 1000
MAX_ACCOUNTS = 100_000
"""Kept in memory while the disk takes none; what belongs to further accounts is counted under no model and no key."""


@dataclass(frozen=True, slots=True)
class SavedDay:
    """A key's token day as it was saved: used tokens, and how much of it had passed."""

    used_tokens: int
    elapsed_s: float


class StateWriter:
    """Owns the writing side of `state.db`. Every public method may be called from any thread; `start` and `close`
    block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed = threading.Condition()
        self._used: dict[Account, Usage] = {}
        self._days: dict[str, SavedDay] = {}
        self._first_s = 0.0
        self._acts: deque[tuple[Act, Future[Head]]] = deque()
        self._is_closing = False
        self._error: str | None = None
        self._retry_at_s = 0.0
        self._db: sqlite3.Connection | None = None
        """The thread's own."""
        self._file: tuple[int, int] | None = None
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)

    @property
    def error(self) -> str | None:
        """Why the disk takes nothing at present; None while it does."""
        return self._error

    def start(self) -> None:
        """Start the thread, and open the file or make it.

        Raises:
            StoreError: It cannot be opened, or a newer version wrote it. The thread goes on to try.
        """
        self._thread.start()
        try:
            open_state(self.path).close()
        except StoreError as e:
            self._error = str(e)
            raise

    def meter(self, account: Account, used: Usage, day: SavedDay | None = None) -> None:
        """Count a request; on the disk at most a second later. Never blocks.

        Args:
            day: The token day of the account's key, where it has one.
        """
        with self._changed:
            if account not in self._used and len(self._used) >= MAX_ACCOUNTS:
                account = Account(account.day, "", "")
            if not self._used:
                self._first_s = time.monotonic()
                self._changed.notify()
            self._used[account] = self._used.get(account, Usage()).plus(used)
            if day is not None:
                self._days[account.key] = day

    def note(self, act: Act) -> Future[Head]:
        """Add a line to the audit log. The future is done when it is on the disk, or fails with a `StoreError`."""
        noted: Future[Head] = Future()
        with self._changed:
            if self._is_closing or not self._thread.is_alive() or len(self._acts) >= MAX_WAITING_ACTS:
                noted.set_exception(StoreError("The audit log takes no more lines.", hint="Check the disk."))
                return noted
            self._acts.append((act, noted))
            self._changed.notify()
        return noted

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits and end the thread. A second call does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._step():
            pass
        self._drop_connection()

    def _drop_connection(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _step(self) -> bool:
        is_last = self._wait()
        with self._changed:
            used, self._used = self._used, {}
            days, self._days = self._days, {}
            waiting, self._acts = list(self._acts), deque()
        # What was done is noted also where nobody waits for that any more.
        acts = [(act, noted if noted.set_running_or_notify_cancel() else None) for act, noted in waiting]
        try:
            if used or acts:
                self._commit(used, days, acts)
                self._error = None
        except Exception as e:  # the supervisor of the thread
            log.exception("usage waits in memory")
            self._drop_connection()
            self._put_back(used, days, str(e))
            for noted in _awaited(acts):
                noted.set_exception(e if isinstance(e, EdgeError) else StoreError(f"{self.path} failed: {e}."))
        return not is_last

    def _wait(self) -> bool:
        with self._changed:
            while not self._acts and not self._is_closing and (wait_s := self._due_s() - time.monotonic()) > 0:
                self._changed.wait(min(wait_s, 3600.0))
            return self._is_closing

    def _due_s(self) -> float:
        if not self._used:
            return float("inf")
        return max(self._first_s + COMMIT_INTERVAL_S, self._retry_at_s)

    def _commit(
        self, used: Mapping[Account, Usage], days: Mapping[str, SavedDay], acts: list[tuple[Act, Future[Head] | None]]
    ) -> None:
        now_s = time.time()
        if self._file != file_of(self.path):  # removed, or another put in its place
            self._drop_connection()
        if self._db is None:
            self._db = open_state(self.path)
            self._file = file_of(self.path)
        with errors_of(self.path), transaction(self._db) as db:
            usage.add(db, used)
            _save_days(db, days, now_s=now_s)
            heads = [audit.append(db, act, now_s=now_s) for act, _ in acts]
        for (_, noted), head in zip(acts, heads, strict=True):
            if noted is not None:
                noted.set_result(head)

    def _put_back(self, used: Mapping[Account, Usage], days: Mapping[str, SavedDay], error: str) -> None:
        with self._changed:
            self._error, self._retry_at_s = error, time.monotonic() + RETRY_S
            for account, what in used.items():
                self._used[account] = what.plus(self._used.get(account, Usage()))
            self._days = {**days, **self._days}


def _awaited(acts: list[tuple[Act, Future[Head] | None]]) -> list[Future[Head]]:
    return [noted for _, noted in acts if noted is not None]


def _save_days(db: sqlite3.Connection, days: Mapping[str, SavedDay], *, now_s: float) -> None:
    db.executemany(
        "INSERT INTO quotas VALUES (?1, ?2, ?3, ?4) ON CONFLICT (key) DO UPDATE"
        " SET used_tokens = ?2, elapsed_s = ?3, saved_s = ?4",
        [(key, day.used_tokens, day.elapsed_s, now_s) for key, day in days.items()],
    )


def load_day(db: sqlite3.Connection, key: str, *, now_s: float) -> SavedDay:
    """A key's token day as it would be now: what the clock saw pass since it was saved has passed.

    Args:
        now_s: Unix time. One before the day was saved, as of a board that boots in 1970, says nothing.
    """
    row = db.execute("SELECT used_tokens, elapsed_s, saved_s FROM quotas WHERE key = ?", (key,)).fetchone()
    if row is None:
        return SavedDay(0, 0.0)
    used_tokens, elapsed_s, saved_s = row
    return SavedDay(int(used_tokens), float(elapsed_s) + min(DAY_S, max(0.0, now_s - float(saved_s))))
