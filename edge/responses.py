"""Responses that are kept, so that they can be read again and gone on from: SQLite, bounded in number, bytes and age.

A row holds what one request brought and what it was answered; a conversation is a chain of them. Each belongs to an API
key, and to others it is not there. Where room runs out, the key that holds most gives up what it used longest ago.

Ages come from a clock of the store's own, seconds that it was open, as those of the telemetry do: boards boot in 1970,
and a wall clock that jumps must not expire what is fresh.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edge.database import CorruptDatabase, RunningClock, connect, errors_of, file_of, set_aside, transaction
from edge.errors import StoreError

log = logging.getLogger("edge.responses")
T = TypeVar("T")

MAX_RESPONSES = 10_000
MAX_AGE_S = 30 * 86_400.0
"""Since it was made or gone on from; as long as OpenAI keeps them."""
ROW_OVERHEAD_BYTES = 256
LARGEST_SHARE = 4
"""One response takes at most this part of the room."""
TIDY_S = 3600.0
"""What is too old is looked for so often."""
MAX_WAITING_BYTES = 64 << 20
"""Of responses that the disk has not taken yet."""
_MIGRATIONS = (
    """
    CREATE TABLE responses (
        id TEXT PRIMARY KEY,
        key TEXT NOT NULL,
        previous TEXT,
        used_clock_s REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        items BLOB NOT NULL,
        body BLOB NOT NULL
    );
    CREATE INDEX responses_by_use ON responses (used_clock_s, id, key, size_bytes);
    CREATE TABLE clock (clock_s REAL NOT NULL);
    INSERT INTO clock VALUES (0);
    """,
)


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """One response.

    Attributes:
        key: The id of the API key that it belongs to; empty for who has none.
        previous: The response that it goes on from.
        items: What the request brought, as JSON.
        body: What it was answered, as JSON.
    """

    id: str
    key: str
    previous: str | None
    items: bytes
    body: bytes

    @property
    def size_bytes(self) -> int:
        """What it counts."""
        return len(self.items) + len(self.body) + ROW_OVERHEAD_BYTES


class ResponseStore:
    """The responses of one appliance. A thread of its own opens the file when it is first asked for and does all that
    touches the disk, so every method may be called from any thread and returns at once; futures fail with a
    `StoreError`.

    Args:
        limit_bytes: Of all responses together; 0 keeps none.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit_bytes: int,
        max_responses: int = MAX_RESPONSES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._max_responses = max_responses
        self._max_age_s = max_age_s
        self._clock = clock
        self._tidy_at_s = clock()
        self._error: str | None = None
        self._db: sqlite3.Connection | None = None
        self._running: RunningClock
        self._file: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[KeptResponse, Future[None]]] = []
        self._waiting_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")

    @property
    def error(self) -> str | None:
        """Why the disk takes nothing at present; None while it does."""
        return self._error

    def keep(self, response: KeptResponse) -> Future[None]:
        """Keep a response; done when it is on the disk. What comes while the disk is busy is written with one fsync."""
        kept: Future[None] = Future()
        refusal = self._refusal(response)
        if refusal is not None:
            kept.set_exception(refusal)
            return kept
        with self._lock:
            self._waiting.append((response, kept))
            self._waiting_bytes += response.size_bytes
        self._thread.submit(self._commit)
        return kept

    def chain(self, key: str, response_id: str, *, max_responses: int, max_bytes: int) -> Future[list[KeptResponse]]:
        """A response of a key after all that it goes on from; as many of the last as were found and are allowed."""
        return self._thread.submit(self._with_db, lambda db: _chain(db, key, response_id, max_responses, max_bytes))

    def delete(self, key: str, response_id: str) -> Future[bool]:
        """Forget a response of a key; whether there was one. What goes on from it can be read, and not gone on from.
        Done when it is overwritten."""

        def act(db: sqlite3.Connection) -> bool:
            with transaction(db):
                found = db.execute("DELETE FROM responses WHERE id = ? AND key = ?", (response_id, key)).rowcount
            if found:
                self._overwrite(db)
            return found > 0

        return self._thread.submit(self._with_db, act)

    def tidy(self) -> None:
        """Forget what is too old, and overwrite what gave up its room, where the last time was an hour ago. Does
        nothing where there is no file."""
        if self._clock() >= self._tidy_at_s:
            self._tidy_at_s = self._clock() + TIDY_S
            self._thread.submit(self._tidy)

    def close(self) -> None:
        """Write what waits and close the file. Blocks."""
        self._thread.submit(self._drop_connection)
        self._thread.shutdown(wait=True)

    def _refusal(self, response: KeptResponse) -> StoreError | None:
        if self.limit_bytes == 0:
            return StoreError("This appliance keeps no responses.", hint="Its setting responses_bytes is 0.")
        if response.size_bytes > (largest := self.limit_bytes // LARGEST_SHARE):
            return StoreError(f"It is larger than {largest:,} bytes.", hint="Raise the setting responses_bytes.")
        if self._waiting_bytes + response.size_bytes > MAX_WAITING_BYTES:
            return StoreError("Too much waits for the disk already.", hint="Is it slow, or failing?")
        return None

    def _commit(self) -> None:
        """Write all that waits; each call was asked for by one of them, so most find nothing."""
        with self._lock:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        waiting = [(r, kept) for r, kept in waiting if kept.set_running_or_notify_cancel()]  # not whose client left
        if not waiting:
            return
        try:
            self._with_db(lambda db: self._insert(db, [response for response, _ in waiting]))
        except StoreError as e:
            _fail(waiting, e)
        except Exception as e:  # the supervisor of what was handed in
            log.exception("responses are not stored")
            _fail(waiting, StoreError(f"{self.path} failed: {e}."))
        else:
            for _, kept in waiting:
                kept.set_result(None)

    def _tidy(self) -> None:
        if self.path.exists():
            with contextlib.suppress(StoreError):  # it is noted, and the next time comes
                self._with_db(self._forget_old)

    def _forget_old(self, db: sqlite3.Connection) -> None:
        self._insert(db, [])
        self._overwrite(db)

    def _overwrite(self, db: sqlite3.Connection) -> None:
        """Leave nothing in the journal: what was deleted stays in its pages, and in the file, until they are copied."""
        is_busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            log.warning("%s is read by another process; what was deleted is overwritten later", self.path)

    def _insert(self, db: sqlite3.Connection, responses: Sequence[KeptResponse]) -> None:
        now_s = self._running.now_s()
        with transaction(db):
            for r in responses:
                db.execute(
                    "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (r.id, r.key, r.previous, now_s, r.size_bytes, r.items, r.body),
                )
                _touch(db, r, now_s)
            db.execute("DELETE FROM responses WHERE used_clock_s < ?", (now_s - self._max_age_s,))
            self._make_room(db, spared={r.id for r in responses})
            self._running.write(now_s)

    def _make_room(self, db: sqlite3.Connection, *, spared: set[str]) -> None:
        num, size = db.execute("SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM responses").fetchone()
        if num <= self._max_responses and size <= self.limit_bytes:
            return
        rows = db.execute("SELECT id, key, size_bytes FROM responses ORDER BY used_clock_s, rowid").fetchall()
        gone = _victims(rows, spared, num - self._max_responses, size - self.limit_bytes)
        db.executemany("DELETE FROM responses WHERE id = ?", [(i,) for i in gone])

    def _with_db(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """What `act` gives. A damaged file is set aside, and a new one begun."""
        try:
            return self._attempt(act)
        except CorruptDatabase:
            return self._attempt(act)

    def _attempt(self, act: Callable[[sqlite3.Connection], T]) -> T:
        try:
            db = self._open()
            with errors_of(self.path):
                result = act(db)
        except StoreError as e:
            if self._error is None or isinstance(e, CorruptDatabase):
                log.error("responses are not stored: %s", e)
            self._error = str(e)
            self._drop_connection()
            if isinstance(e, CorruptDatabase):
                set_aside(self.path)
            raise
        self._error = None
        return result

    def _open(self) -> sqlite3.Connection:
        try:
            return self._opened()
        except OSError as e:
            raise StoreError(f"{self.path} cannot be used: {e}.", hint="Check the disk and the permissions.") from e

    def _opened(self) -> sqlite3.Connection:
        if self._db is not None and self._file != file_of(self.path):  # removed, or another put in its place
            self._drop_connection()
        if self._db is None:
            self._db = connect(self.path, _MIGRATIONS)
            self._file = file_of(self.path)
            with errors_of(self.path):
                self._db.execute("PRAGMA secure_delete=ON")  # what people wrote does not stay in free pages
                self._running = RunningClock(self._db, monotonic=self._clock)
        return self._db

    def _drop_connection(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _fail(waiting: Iterable[tuple[KeptResponse, Future[None]]], error: StoreError) -> None:
    for _, kept in waiting:
        kept.set_exception(error)


def _chain(
    db: sqlite3.Connection, key: str, response_id: str, max_responses: int, max_bytes: int
) -> list[KeptResponse]:
    found: list[KeptResponse] = []
    next_id: str | None = response_id
    while next_id is not None and len(found) < max_responses and max_bytes > 0:
        row = db.execute(
            "SELECT id, key, previous, items, body FROM responses WHERE id = ? AND key = ?", (next_id, key)
        ).fetchone()
        if row is None:
            break
        found.append(KeptResponse(*row))
        next_id, max_bytes = found[-1].previous, max_bytes - found[-1].size_bytes
    return found[::-1]


def _touch(db: sqlite3.Connection, response: KeptResponse, now_s: float) -> None:
    """All that it goes on from is in use."""
    if response.previous is not None:
        db.execute(
            "WITH RECURSIVE before (id) AS (SELECT ?1 UNION SELECT previous FROM responses JOIN before USING (id)"
            " WHERE key = ?2) UPDATE responses SET used_clock_s = ?3 WHERE key = ?2 AND id IN before",
            (response.previous, response.key, now_s),
        )


def _victims(rows: Iterable[tuple[str, str, int]], spared: set[str], num_over: int, bytes_over: int) -> list[str]:
    """What goes: of the key that holds most bytes, what was used longest ago.

    Args:
        rows: Id, key and size of each response, that used longest ago first.
    """
    held: Counter[str] = Counter()
    of_key: dict[str, list[tuple[str, int]]] = {}
    for response_id, key, size in rows:
        held[key] += size
        if response_id not in spared:
            of_key.setdefault(key, []).append((response_id, size))
    queues = {key: iter(found) for key, found in of_key.items()}
    gone: list[str] = []
    while queues and (num_over > 0 or bytes_over > 0):
        key = max(queues, key=lambda k: held[k])
        if (row := next(queues[key], None)) is None:
            del queues[key]
            continue
        gone.append(row[0])
        held[key] -= row[1]
        num_over, bytes_over = num_over - 1, bytes_over - row[1]
    return gone
