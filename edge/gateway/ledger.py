"""The gateway's memory: every batch once, and an index of what they say. SQLite, one writing thread.

A batch and its key are on the disk in one transaction before anybody hears "received". Batches that wait are written
together, so that many devices share one fsync.
"""

from __future__ import annotations

import enum
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.database import connect, connect_read_only, errors_of, transaction
from edge.errors import QueueFull, StoreError
from edge.telemetry import semconv

from .ingest import Batch, Series
from .schema import DeviceInfo, DeviceList, MetricList, MetricValue, RequestInfo, RequestPage

log = logging.getLogger("edge.gateway")

SCHEMA_VERSION = 1
MAX_WAITING = 512
MAX_GROUP = 64
MAX_SERIES_PER_DEVICE = 5000
DEFAULT_KEEP_BYTES = 1 << 30
"""Bodies kept; of older ones only the key stays, so that they are still known when they come again."""
_MIGRATIONS = (
    """
    CREATE TABLE batches (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL,
        boot TEXT NOT NULL,
        seq INTEGER NOT NULL,
        signal TEXT NOT NULL,
        digest BLOB NOT NULL,
        received_s REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        body BLOB,
        UNIQUE (device, boot, seq)
    );
    CREATE INDEX batches_kept ON batches (id) WHERE body IS NOT NULL;
    CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        hostname TEXT NOT NULL,
        version TEXT NOT NULL,
        first_seen_s REAL NOT NULL,
        last_seen_s REAL NOT NULL,
        clock_skew_s REAL,
        num_batches INTEGER NOT NULL DEFAULT 0,
        num_duplicates INTEGER NOT NULL DEFAULT 0,
        num_requests INTEGER NOT NULL DEFAULT 0,
        num_lost_batches INTEGER NOT NULL DEFAULT 0,
        num_lost_records INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE requests (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL,
        boot TEXT NOT NULL,
        seq INTEGER NOT NULL,
        trace_id TEXT NOT NULL,
        span_id TEXT NOT NULL,
        operation TEXT NOT NULL,
        request_model TEXT NOT NULL,
        response_model TEXT NOT NULL,
        response_id TEXT NOT NULL,
        started_unix_ns INTEGER NOT NULL,
        duration_s REAL NOT NULL,
        ttft_s REAL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        finish_reasons TEXT NOT NULL,
        error_type TEXT,
        UNIQUE (device, span_id, trace_id)
    );
    CREATE INDEX requests_by_device ON requests (device, id);
    CREATE TABLE metrics (
        device TEXT NOT NULL,
        name TEXT NOT NULL,
        attributes TEXT NOT NULL,
        boot TEXT NOT NULL,
        seq INTEGER NOT NULL,
        received_s REAL NOT NULL,
        series TEXT NOT NULL,
        PRIMARY KEY (device, name, attributes)
    );
    CREATE TABLE losses (
        device TEXT NOT NULL,
        boot TEXT NOT NULL,
        seq INTEGER NOT NULL,
        class TEXT NOT NULL,
        reason TEXT NOT NULL,
        batches INTEGER NOT NULL,
        records INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL
    );
    CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
    INSERT INTO totals VALUES ('kept_bytes', 0);
    """,
)


class Receipt(enum.Enum):
    """What became of a batch; for any but the last it is on the disk."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    """The key is known, with another content."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    batch: Batch
    receipt: Future[Receipt]


class Ledger:
    """The database and its writing thread. Every method may be called from any thread; `close` ends it."""

    def __init__(self, path: Path, *, keep_bytes: int = DEFAULT_KEEP_BYTES) -> None:
        """Open the file, or make it.

        Raises:
            StoreError: It cannot be opened, or a newer version wrote it.
        """
        self._path = path
        self._keep_bytes = keep_bytes
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(MAX_WAITING)
        self._error: str | None = None
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="ledger", daemon=True)
        self._thread.start()
        opened.result()

    @property
    def error(self) -> str | None:
        """Why nothing can be written at present; None while it can."""
        return self._error if self._thread.is_alive() else "The ledger is closed."

    def store(self, batch: Batch) -> Future[Receipt]:
        """Write a batch; the future is done when it is on the disk, or fails with a `StoreError`.

        Raises:
            QueueFull: Too many wait.
        """
        waiting = _Waiting(batch, Future())
        try:
            self._waiting.put_nowait(waiting)
        except queue.Full as e:
            raise QueueFull(retry_after_s=1.0) from e
        return waiting.receipt

    def close(self) -> None:
        """Write what waits and end the thread."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def devices(self, *, after: str, limit: int) -> DeviceList:
        """Devices in the order of their ids.

        Raises:
            StoreError: The database cannot be read.
        """
        rows = self._read("SELECT * FROM devices WHERE id > ? ORDER BY id LIMIT ?", after, limit)
        found = [_device(row) for row in rows]
        return DeviceList(devices=found, next=found[-1].id if len(found) == limit else None)

    def has_device(self, device: str) -> bool:
        """Whether anything came from it."""
        return bool(self._read("SELECT 1 FROM devices WHERE id = ?", device))

    def metrics(self, device: str) -> MetricList:
        """The last value of each of its series."""
        rows = self._read("SELECT * FROM metrics WHERE device = ? ORDER BY name, attributes", device)
        return MetricList(device=device, metrics=[_metric(row) for row in rows])

    def requests(self, device: str, *, after: int, limit: int) -> RequestPage:
        """Its requests in the order in which they arrived."""
        rows = self._read(
            "SELECT * FROM requests WHERE device = ? AND id > ? ORDER BY id LIMIT ?", device, after, limit
        )
        found = [_request(row) for row in rows]
        return RequestPage(requests=found, next=found[-1].id if len(found) == limit else None)

    def _read(self, query: str, *values: str | int) -> list[sqlite3.Row]:
        with errors_of(self._path), closing(connect_read_only(self._path, version=SCHEMA_VERSION)) as db:
            db.row_factory = sqlite3.Row
            return db.execute(query, values).fetchall()

    def _run(self, opened: Future[None]) -> None:
        try:
            connection = connect(self._path, _MIGRATIONS)
        except StoreError as e:
            opened.set_exception(e)
            return
        with closing(connection) as db:
            opened.set_result(None)
            is_open = True
            while is_open:
                group, is_open = self._next_group()
                self._write(db, group)

    def _next_group(self) -> tuple[list[_Waiting], bool]:
        """Wait for one batch, then take what has come meanwhile; False when the end was among it."""
        group: list[_Waiting] = []
        item = self._waiting.get()
        while item is not None:
            group.append(item)
            if len(group) == MAX_GROUP or self._waiting.empty():
                return group, True
            item = self._waiting.get()
        return group, False

    def _write(self, db: sqlite3.Connection, group: Sequence[_Waiting]) -> None:
        try:
            with errors_of(self._path), transaction(db):
                receipts = [_store(db, waiting.batch, now=time.time()) for waiting in group]
                _trim(db, self._keep_bytes)
        except Exception as e:
            log.exception("the ledger takes nothing")
            self._error = str(e)
            failure = e if isinstance(e, StoreError) else StoreError(f"The ledger failed: {e}.")
            for waiting in group:
                waiting.receipt.set_exception(failure)
            return
        self._error = None
        for waiting, receipt in zip(group, receipts, strict=True):
            waiting.receipt.set_result(receipt)


def _store(db: sqlite3.Connection, batch: Batch, *, now: float) -> Receipt:
    key = batch.key
    known = db.execute(
        "SELECT digest FROM batches WHERE device = ? AND boot = ? AND seq = ?", (key.device, key.boot, key.seq)
    ).fetchone()
    if known is not None and known[0] != batch.digest:
        return Receipt.CONFLICT
    _note_device(db, batch, now=now)
    if known is not None:
        db.execute("UPDATE devices SET num_duplicates = num_duplicates + 1 WHERE id = ?", (key.device,))
        return Receipt.DUPLICATE
    db.execute(
        "INSERT INTO batches (device, boot, seq, signal, digest, received_s, size_bytes, body)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (key.device, key.boot, key.seq, batch.signal, batch.digest, now, len(batch.body), batch.body),
    )
    db.execute("UPDATE totals SET value = value + ? WHERE name = 'kept_bytes'", (len(batch.body),))
    num_requests = _index_requests(db, batch)
    _index_metrics(db, batch, now=now)
    _index_losses(db, batch)
    db.execute(
        "UPDATE devices SET num_batches = num_batches + 1, num_requests = num_requests + ?,"
        " num_lost_batches = num_lost_batches + ?, num_lost_records = num_lost_records + ? WHERE id = ?",
        (
            num_requests,
            sum(x.batches for x in batch.facts.losses),
            sum(x.records for x in batch.facts.losses),
            key.device,
        ),
    )
    return Receipt.STORED


def _note_device(db: sqlite3.Connection, batch: Batch, *, now: float) -> None:
    sender = batch.facts.sender
    skew_s = None if batch.sent_unix_s is None else batch.sent_unix_s - now
    db.execute(
        "INSERT INTO devices (id, hostname, version, first_seen_s, last_seen_s, clock_skew_s)"
        " VALUES (?1, ?2, ?3, ?4, ?4, ?5)"
        " ON CONFLICT (id) DO UPDATE SET hostname = ?2, version = ?3, last_seen_s = ?4, clock_skew_s = ?5",
        (batch.key.device, sender.get(semconv.HOST_NAME, ""), sender.get(semconv.SERVICE_VERSION, ""), now, skew_s),
    )


def _index_requests(db: sqlite3.Connection, batch: Batch) -> int:
    """Add the requests that are new, and say how many that were."""
    before = db.total_changes
    db.executemany(
        "INSERT INTO requests (device, boot, seq, trace_id, span_id, operation, request_model, response_model,"
        " response_id, started_unix_ns, duration_s, ttft_s, input_tokens, output_tokens, cached_tokens,"
        " finish_reasons, error_type) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (device, span_id, trace_id) DO NOTHING",
        [
            (batch.key.device, batch.key.boot, batch.key.seq, r.trace_id, r.span_id, r.operation, r.request_model,
             r.response_model, r.response_id, r.started_unix_ns, r.duration_s, r.ttft_s, r.input_tokens,
             r.output_tokens, r.cached_tokens, json.dumps(r.finish_reasons), r.error_type)
            for r in batch.facts.requests
        ],
    )  # fmt: skip
    return db.total_changes - before


def _index_metrics(db: sqlite3.Connection, batch: Batch, *, now: float) -> None:
    """Keep the last value of each series: within one start of the device by its number, else by arrival."""
    key = batch.key
    db.executemany(
        "INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, name, attributes) DO UPDATE"
        " SET boot = excluded.boot, seq = excluded.seq, received_s = excluded.received_s, series = excluded.series"
        " WHERE excluded.boot <> boot OR excluded.seq > seq",
        [
            (key.device, s.name, json.dumps(s.attributes, sort_keys=True), key.boot, key.seq, now, _series_text(s))
            for s in batch.facts.series
        ],
    )
    if batch.facts.series:
        db.execute(
            "DELETE FROM metrics WHERE rowid IN (SELECT rowid FROM metrics WHERE device = ?"
            " ORDER BY received_s DESC LIMIT -1 OFFSET ?)",
            (key.device, MAX_SERIES_PER_DEVICE),
        )


def _index_losses(db: sqlite3.Connection, batch: Batch) -> None:
    db.executemany(
        "INSERT INTO losses VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (batch.key.device, batch.key.boot, batch.key.seq, x.priority, x.reason, x.batches, x.records, x.size_bytes)
            for x in batch.facts.losses
        ],
    )


def _trim(db: sqlite3.Connection, keep_bytes: int) -> None:
    """Forget the oldest bodies beyond the limit. Their keys stay."""
    (kept_bytes,) = db.execute("SELECT value FROM totals WHERE name = 'kept_bytes'").fetchone()
    excess_bytes = kept_bytes - keep_bytes
    forgotten: list[tuple[int, int]] = []
    for size_bytes, row_id in db.execute("SELECT size_bytes, id FROM batches WHERE body IS NOT NULL ORDER BY id"):
        if excess_bytes <= 0:
            break
        forgotten.append((size_bytes, row_id))
        excess_bytes -= size_bytes
    db.executemany("UPDATE batches SET body = NULL WHERE id = ?", [(row_id,) for _, row_id in forgotten])
    freed_bytes = sum(size_bytes for size_bytes, _ in forgotten)
    db.execute("UPDATE totals SET value = value - ? WHERE name = 'kept_bytes'", (freed_bytes,))


def _series_text(series: Series) -> str:
    return json.dumps({
        "kind": series.kind, "unit": series.unit, "value": series.value, "count": series.count,
        "sum": series.total, "bounds": series.bounds, "counts": series.counts,
    })  # fmt: skip


def _device(row: sqlite3.Row) -> DeviceInfo:
    return DeviceInfo(
        id=row["id"],
        hostname=row["hostname"],
        version=row["version"],
        first_seen=row["first_seen_s"],
        last_seen=row["last_seen_s"],
        clock_skew_s=row["clock_skew_s"],
        num_batches=row["num_batches"],
        num_duplicates=row["num_duplicates"],
        num_requests=row["num_requests"],
        num_lost_batches=row["num_lost_batches"],
        num_lost_records=row["num_lost_records"],
    )


def _metric(row: sqlite3.Row) -> MetricValue:
    series: Mapping[str, Any] = json.loads(row["series"])
    is_histogram = series["kind"] == "histogram"
    return MetricValue(
        name=row["name"],
        kind=series["kind"],
        unit=series["unit"],
        attributes=json.loads(row["attributes"]),
        received=row["received_s"],
        value=series["value"],
        count=series["count"],
        sum=series["sum"],
        bounds=series["bounds"] if is_histogram else None,
        counts=series["counts"] if is_histogram else None,
    )


def _request(row: sqlite3.Row) -> RequestInfo:
    fields = {name: row[name] for name in row.keys() if name != "device"}  # noqa: SIM118  # a Row iterates over values
    return RequestInfo(**{**fields, "finish_reasons": json.loads(row["finish_reasons"])})
