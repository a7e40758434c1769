"""Telemetry that is not delivered yet: a queue on SQLite, bounded in bytes, that forgets only what it says it forgot.

A row is one request to the gateway: an OTLP body, gzipped once and sent as it is, under a key that never changes. Rows
leave by acknowledgement, or by a drop that is counted in the same transaction and reported as a gap. Where the byte
limit forces a drop, the oldest row of the lowest class goes first.

Ages come from a clock of the outbox's own: seconds that it was open, summed over all boots. Boards boot in 1970, and a
wall clock that jumps must not expire what is fresh; time that the device was off does not count.

Source of the measurements behind WAL, FULL and one commit an interval: 2,900 single-row commits a second on a virtual
disk against 96,000 rows a second in batches of 200; SD cards take 5 to 30 ms a commit.
"""

from __future__ import annotations

import enum
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from edge.database import connect, connect_read_only, errors_of, transaction

Signal = Literal["traces", "metrics", "logs"]
DropReason = Literal["size_limit", "expired", "rejected", "buffer_full", "not_encodable", "corrupt"]

ROW_OVERHEAD_BYTES = 128
"""Counted for each row beside its body: columns, index entries, the slack of a page."""
MAX_AGE_S = 30 * 86_400.0
MAX_REJECTIONS = 5
"""Refusals as invalid after which a row is set aside: another hundred would not make it valid."""
LEASE_SHARE = 4
"""A lease takes at most this part of the limit, so that there is always something else to drop."""
SCHEMA_VERSION = 1
_MIGRATIONS = (
    """
    CREATE TABLE rows (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL,
        boot TEXT NOT NULL,
        seq INTEGER NOT NULL,
        class INTEGER NOT NULL,
        signal TEXT NOT NULL,
        records INTEGER NOT NULL,
        created_clock_s REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        rejections INTEGER NOT NULL DEFAULT 0,
        quarantined INTEGER NOT NULL DEFAULT 0,
        body BLOB NOT NULL,
        UNIQUE (boot, seq)
    );
    CREATE INDEX rows_by_class ON rows (quarantined, class, id);
    CREATE TABLE gaps (
        class INTEGER NOT NULL,
        reason TEXT NOT NULL,
        batches INTEGER NOT NULL,
        records INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (class, reason)
    );
    CREATE TABLE totals (name TEXT PRIMARY KEY, value REAL NOT NULL);
    INSERT INTO totals VALUES
        ('clock_s', 0), ('size_bytes', 0), ('sent_rows', 0), ('dropped_rows', 0), ('dropped_records', 0);
    """,
)


class Priority(enum.IntEnum):
    """What a row is worth when room runs out, and what is sent first: the lowest number."""

    GAP = 0
    """The report of what was dropped. Never dropped itself, since that would have to be reported."""
    FAULT = 1
    USAGE = 2
    METRIC = 3
    TRACE = 4


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row to append. `body` is gzipped OTLP; `records` is how many spans, data points or events it holds."""

    priority: Priority
    signal: Signal
    records: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """A row in the outbox. `key` names it for ever, at the gateway too."""

    id: int
    key: str
    priority: Priority
    signal: Signal
    records: int
    age_s: float
    rejections: int
    is_quarantined: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """What was lost and not yet reported, summed by class and reason."""

    priority: Priority
    reason: DropReason
    batches: int
    records: int
    size_bytes: int

    def plus(self, other: Gap) -> Gap:
        """Both together, under this one's class and reason."""
        return Gap(
            self.priority,
            self.reason,
            self.batches + other.batches,
            self.records + other.records,
            self.size_bytes + other.size_bytes,
        )


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """The outbox at one moment. Totals run since the file was made.

    Attributes:
        rows: Batches that wait, those set aside not among them.
        size_bytes: Of every row, those set aside too; never above `limit_bytes` but for one report of a gap.
    """

    rows: int = 0
    size_bytes: int = 0
    limit_bytes: int = 0
    oldest_age_s: float | None = None
    quarantined_rows: int = 0
    sent_rows: int = 0
    dropped_rows: int = 0
    dropped_records: int = 0


@dataclass(frozen=True, slots=True)
class _Victim:
    row_id: int
    priority: Priority
    records: int
    size_bytes: int
    is_quarantined: bool
    created_clock_s: float

    def gap(self, reason: DropReason) -> Gap:
        return Gap(self.priority, reason, 1, self.records, self.size_bytes)


GapEncoder = Callable[[Sequence[Gap]], bytes]
"""Makes the gzipped OTLP logs body that reports gaps."""


_SELECT = (
    "SELECT id, device, boot, seq, class, signal, records, created_clock_s, rejections, quarantined, body FROM rows"
)
# Rows set aside are already counted as lost; then what is worth least.
_DROP_ORDER = [(1, priority) for priority in reversed(Priority)] + [
    (0, priority) for priority in reversed(Priority) if priority is not Priority.GAP
]


class Outbox:
    """The outbox, owned by one thread of one process, which closes it."""

    def __init__(
        self,
        path: Path,
        device: str,
        *,
        limit_bytes: int,
        encode_gaps: GapEncoder,
        boot: str | None = None,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the file, or make it. `boot` is drawn at random, so that cloned cards never share a key.

        Raises:
            StoreError: It cannot be opened, or a newer version wrote it.
        """
        self.path = path
        self.device = device
        self.boot = boot or secrets.token_hex(8)
        self._limit_bytes = limit_bytes
        self._encode_gaps = encode_gaps
        self._max_age_s = max_age_s
        self._clock = clock
        self._opened_s = clock()
        self._seq = 0
        self._leased: set[int] = set()
        self._not_before_s: dict[int, float] = {}
        self._db = connect(path, _MIGRATIONS)
        with errors_of(path):
            self._clock_base_s = _total(self._db, "clock_s")

    def close(self) -> None:
        """Close the file; what was appended stays."""
        self._db.close()

    def append(self, rows: Sequence[NewRow], *, lost: Sequence[Gap] = ()) -> None:
        """Add rows and count losses in one commit; what no longer fits is dropped and counted in the same one.

        Raises:
            StoreError: Nothing was added: the disk is full or failed. The caller keeps the rows and tries again.
        """
        with self._commit() as db:
            for offset, row in enumerate(rows, start=1):
                self._insert(db, row, seq=self._seq + offset)
            for gap in lost:
                _add_gap(db, gap)
            for victim in self._expired(db):
                self._drop(db, victim, "expired")
            for victim in self._in_excess(db):
                self._drop(db, victim, "size_limit")
        self._seq += len(rows)

    def lease(self, max_rows: int) -> list[Row]:
        """Rows to send now, by class and then by age. They are the caller's until acknowledged, rejected or released.

        A lease lives in memory: after a crash the row is simply due again. Unreported gaps become a row here, one at
        a time, so that an outage of weeks is one report and not thousands.

        Raises:
            StoreError: The disk failed.
        """
        self._report_gaps()
        now, clock_s = self._clock(), self.clock_s()
        rows: list[Row] = []
        size_bytes = 0
        with errors_of(self.path):
            for fields in self._db.execute(f"{_SELECT} WHERE quarantined = 0 ORDER BY class, id"):
                row = _row(fields, clock_s)
                if row.id in self._leased or self._not_before_s.get(row.id, now) > now:
                    continue
                size_bytes += _size_of(row.body)
                if rows and (len(rows) == max_rows or size_bytes > self._limit_bytes // LEASE_SHARE):
                    break
                rows.append(row)
        self._leased.update(row.id for row in rows)
        return rows

    def acknowledge(self, ids: Collection[int]) -> None:
        """Forget rows that the gateway has; one commit for all.

        Raises:
            StoreError: The disk failed; the rows stay leased, so that they are not sent again.
        """
        if not ids:
            return
        with self._commit() as db:
            for row_id in ids:
                self._delete(db, row_id)
            _add(db, "sent_rows", len(ids))
        self._leased.difference_update(ids)

    def release(self, ids: Iterable[int]) -> None:
        """Give rows back unsent; they are due again at once."""
        self._leased.difference_update(ids)

    def reject(self, row_id: int, *, retry_after_s: float) -> None:
        """Note that the gateway called a row invalid. After `MAX_REJECTIONS` it is set aside and counted as lost.

        Raises:
            StoreError: The disk failed.
        """
        with self._commit() as db:
            db.execute("UPDATE rows SET rejections = rejections + 1 WHERE id = ?", (row_id,))
            for victim in _victims(db, "id = ? AND rejections >= ? AND quarantined = 0", row_id, MAX_REJECTIONS):
                db.execute("UPDATE rows SET quarantined = 1 WHERE id = ?", (row_id,))
                _add_gap(db, victim.gap("rejected"))
        self._leased.discard(row_id)
        self._not_before_s[row_id] = self._clock() + retry_after_s

    def clock_s(self) -> float:
        """The outbox's own clock: seconds it has been open, over all boots."""
        return self._clock_base_s + self._clock() - self._opened_s

    def pending_gaps(self) -> list[Gap]:
        """What was lost and is not reported yet."""
        with errors_of(self.path):
            return _gaps(self._db)

    def stats(self) -> OutboxStats:
        """The outbox now.

        Raises:
            StoreError: The disk failed.
        """
        with errors_of(self.path):
            return _stats(self._db, limit_bytes=self._limit_bytes, clock_s=self.clock_s())

    @contextmanager
    def _commit(self) -> Generator[sqlite3.Connection]:
        with errors_of(self.path), transaction(self._db) as db:
            yield db
            db.execute("UPDATE totals SET value = ? WHERE name = 'clock_s'", (self.clock_s(),))

    def _insert(self, db: sqlite3.Connection, row: NewRow, *, seq: int) -> None:
        size_bytes = _size_of(row.body)
        db.execute(
            "INSERT INTO rows (device, boot, seq, class, signal, records, created_clock_s, size_bytes, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.device, self.boot, seq, row.priority, row.signal, row.records, self.clock_s(), size_bytes, row.body),
        )  # fmt: skip
        _add(db, "size_bytes", size_bytes)

    def _delete(self, db: sqlite3.Connection, row_id: int) -> None:
        for (size_bytes,) in db.execute("DELETE FROM rows WHERE id = ? RETURNING size_bytes", (row_id,)).fetchall():
            _add(db, "size_bytes", -size_bytes)
        self._not_before_s.pop(row_id, None)

    def _expired(self, db: sqlite3.Connection) -> list[_Victim]:
        """Rows that are too old. Ids rise with the clock, so the first one that is young enough ends the search."""
        oldest_s = self.clock_s() - self._max_age_s
        rows = takewhile(lambda victim: victim.created_clock_s < oldest_s, _victims(db, "TRUE"))
        return [v for v in rows if v.row_id not in self._leased and v.priority is not Priority.GAP]

    def _in_excess(self, db: sqlite3.Connection) -> list[_Victim]:
        """What has to go for the rest to fit: rows set aside, then the lowest class, the oldest first.

        Rows under way are spared, since they may be delivered already, and so is the report of a gap.
        """
        excess_bytes = _total(db, "size_bytes") - self._limit_bytes
        victims: list[_Victim] = []
        for quarantined, priority in _DROP_ORDER:
            for victim in _victims(db, "quarantined = ? AND class = ?", quarantined, priority):
                if excess_bytes <= 0:
                    return victims
                if victim.row_id not in self._leased:
                    victims.append(victim)
                    excess_bytes -= victim.size_bytes
        return victims

    def _drop(self, db: sqlite3.Connection, victim: _Victim, reason: DropReason) -> None:
        self._delete(db, victim.row_id)
        if not victim.is_quarantined:
            _add_gap(db, victim.gap(reason))

    def _report_gaps(self) -> None:
        with errors_of(self.path):
            gaps = _gaps(self._db)
            if not gaps or next(_victims(self._db, "quarantined = 0 AND class = ?", Priority.GAP), None):
                return
        body = self._encode_gaps(gaps)
        with self._commit() as db:
            db.execute("DELETE FROM gaps")
            self._insert(db, NewRow(Priority.GAP, "logs", len(gaps), body), seq=self._seq + 1)
        self._seq += 1


def read_stats(path: Path, *, limit_bytes: int) -> OutboxStats:
    """The outbox of another process, or of none that runs; its clock stands at the last commit.

    Raises:
        StoreError: The file is not there or cannot be read.
    """
    db = connect_read_only(path, version=SCHEMA_VERSION)
    try:
        with errors_of(path):
            return _stats(db, limit_bytes=limit_bytes, clock_s=_total(db, "clock_s"))
    finally:
        db.close()


def read_rows(path: Path, *, after_id: int = 0, max_rows: int = 100) -> list[Row]:
    """The newest rows of an outbox after that id, oldest first; nothing is changed.

    Raises:
        StoreError: The file is not there or cannot be read.
    """
    db = connect_read_only(path, version=SCHEMA_VERSION)
    try:
        with errors_of(path):
            clock_s = _total(db, "clock_s")
            found = db.execute(f"{_SELECT} WHERE id > ? ORDER BY id DESC LIMIT ?", (after_id, max_rows)).fetchall()
    finally:
        db.close()
    return [_row(fields, clock_s) for fields in reversed(found)]


def _size_of(body: bytes) -> int:
    return len(body) + ROW_OVERHEAD_BYTES


def _row(fields: tuple[int, str, str, int, int, Signal, int, float, int, int, bytes], clock_s: float) -> Row:
    row_id, device, boot, seq, priority, signal, records, created_s, rejections, quarantined, body = fields
    return Row(
        id=row_id,
        key=f"{device}/{boot}/{seq}",
        priority=Priority(priority),
        signal=signal,
        records=records,
        age_s=max(0.0, clock_s - created_s),
        rejections=rejections,
        is_quarantined=bool(quarantined),
        body=body,
    )


def _victims(db: sqlite3.Connection, condition: str, *values: int) -> Iterator[_Victim]:
    query = "SELECT id, class, records, size_bytes, quarantined, created_clock_s FROM rows"
    for fields in db.execute(f"{query} WHERE {condition} ORDER BY id", values):
        row_id, priority, records, size_bytes, quarantined, created_s = fields
        yield _Victim(row_id, Priority(priority), records, size_bytes, bool(quarantined), created_s)


def _add(db: sqlite3.Connection, total: str, amount: float) -> None:
    db.execute("UPDATE totals SET value = value + ? WHERE name = ?", (amount, total))


def _total(db: sqlite3.Connection, name: str) -> float:
    return float(db.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()[0])


def _add_gap(db: sqlite3.Connection, gap: Gap) -> None:
    db.execute(
        "INSERT INTO gaps VALUES (?, ?, ?, ?, ?) ON CONFLICT (class, reason) DO UPDATE SET"
        " batches = batches + excluded.batches, records = records + excluded.records,"
        " size_bytes = size_bytes + excluded.size_bytes",
        (gap.priority, gap.reason, gap.batches, gap.records, gap.size_bytes),
    )
    if gap.reason != "rejected":
        _add(db, "dropped_rows", gap.batches)
        _add(db, "dropped_records", gap.records)


def _gaps(db: sqlite3.Connection) -> list[Gap]:
    found = db.execute("SELECT class, reason, batches, records, size_bytes FROM gaps ORDER BY class, reason")
    return [Gap(Priority(fields[0]), *fields[1:]) for fields in found]


def _stats(db: sqlite3.Connection, *, limit_bytes: int, clock_s: float) -> OutboxStats:
    totals: dict[str, float] = dict(db.execute("SELECT name, value FROM totals").fetchall())
    counts: dict[int, int] = dict(db.execute("SELECT quarantined, COUNT(*) FROM rows GROUP BY quarantined").fetchall())
    oldest = db.execute("SELECT created_clock_s FROM rows WHERE quarantined = 0 ORDER BY id LIMIT 1").fetchone()
    return OutboxStats(
        rows=counts.get(0, 0),
        size_bytes=int(totals["size_bytes"]),
        limit_bytes=limit_bytes,
        oldest_age_s=max(0.0, clock_s - oldest[0]) if oldest else None,
        quarantined_rows=counts.get(1, 0),
        sent_rows=int(totals["sent_rows"]),
        dropped_rows=int(totals["dropped_rows"]),
        dropped_records=int(totals["dropped_records"]),
    )
