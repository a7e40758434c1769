"""Batches and the answers of their lines: rows of `batches.db`, each answer committed once."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from edge.database import RunningClock, connect_read_only, errors_of, transaction
from edge.errors import BatchNotFound, InvalidRequest, QueueFull, StorageFull

from .answers import Answer
from .database import SCHEMA_VERSION
from .files import MAX_FILES, held_by, place_of
from .schema import Batch, BatchError, BatchErrors, BatchList, BatchStatus, BatchUsage, InputDetails, OutputDetails

MAX_UNFINISHED = 20
"""Of a key."""
MAX_UNFINISHED_TOGETHER = 200
MAX_KEPT = 1000
"""Of a key; beyond it the oldest that are over go, and their files when their time comes."""
BUSY_RETRY_S = 60.0
_COUNTS = "completed, failed, input_tokens, cached_tokens, output_tokens, reasoning_tokens"


class Ledger:
    """The batches of all keys. One thread uses it, with the connection that it is given.

    Args:
        clock: When batches end; the times that are told are the wall clock's.
        max_bytes: Of a key's answers and files together.
    """

    def __init__(self, db: sqlite3.Connection, clock: RunningClock, *, max_bytes: int) -> None:
        self._db, self._clock, self._max_bytes = db, clock, max_bytes

    def create(self, key: str, batch: Batch) -> None:
        """Keep a new batch.

        Raises:
            QueueFull: Too many are not over yet.
        """
        with transaction(self._db) as db:
            (own,) = db.execute("SELECT count(*) FROM batches WHERE key = ? AND NOT is_over", (key,)).fetchone()
            (together,) = db.execute("SELECT count(*) FROM batches WHERE NOT is_over").fetchone()
            if own >= MAX_UNFINISHED or together >= MAX_UNFINISHED_TOGETHER:
                raise QueueFull(retry_after_s=BUSY_RETRY_S)
            db.execute(
                "INSERT INTO batches (id, key, input_file, is_over, record, expires_clock_s) VALUES (?, ?, ?, 0, ?, ?)",
                (
                    batch.id,
                    key,
                    batch.input_file_id,
                    msgspec.json.encode(batch),
                    self._clock.now_s() + batch.expires_at - batch.created_at,
                ),
            )
            db.execute(
                "DELETE FROM batches WHERE key = ? AND is_over AND seq <="
                " (SELECT seq FROM batches WHERE key = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)", (key, key, MAX_KEPT)
            )  # fmt: skip

    def get(self, key: str, batch_id: str) -> Batch:
        """One batch.

        Raises:
            BatchNotFound: There is none of that id, or it is another key's.
        """
        row = self._row("id = ? AND key = ?", batch_id, key)
        if row is None:
            raise BatchNotFound(batch_id)
        return _batch(row)

    def find(self, batch_id: str) -> Batch:
        """One that is known to be there."""
        row = self._row("id = ?", batch_id)
        if row is None:
            raise BatchNotFound(batch_id)
        return _batch(row)

    def list(self, key: str, *, after: str | None, limit: int) -> BatchList:
        """A key's batches, the newest first, beginning after one of them.

        Raises:
            InvalidRequest: `after` is no batch of the key.
        """
        rows = self._db.execute(
            f"SELECT record, {_COUNTS} FROM batches WHERE key = ? AND (? IS NULL OR seq < ?)"  # noqa: S608  # our own names
            " ORDER BY seq DESC LIMIT ?",
            (key, after, place_of(self._db, "batches", key, after), limit + 1),
        ).fetchall()
        found = [_batch(row) for row in rows[:limit]]
        ends = (found[0].id, found[-1].id) if found else (None, None)
        return BatchList(data=found, first_id=ends[0], last_id=ends[1], has_more=len(rows) > limit)

    def unfinished(self) -> Sequence[tuple[str, str]]:
        """Id and key of every batch that is not over, in the order in which they came."""
        rows = self._db.execute("SELECT id, key FROM batches WHERE NOT is_over ORDER BY seq").fetchall()
        return [(str(batch_id), str(key)) for batch_id, key in rows]

    def move(
        self, batch_id: str, to: BatchStatus, *, since: Collection[BatchStatus], now_s: float, total: int | None = None
    ) -> Batch:
        """Give a batch another status, and the time of it, where it has one of these; else it stays as it is.

        Returns:
            The batch as it is then.
        """
        with transaction(self._db):
            batch = self.find(batch_id)
            if batch.status not in since:
                return batch
            counts = (
                batch.request_counts if total is None else msgspec.structs.replace(batch.request_counts, total=total)
            )
            batch = _stamped(msgspec.structs.replace(batch, request_counts=counts), to, now_s)
            self._save(batch)
        return batch

    def cancel(self, key: str, batch_id: str, *, now_s: float) -> Batch:
        """Have a batch end; asking twice is as good as once.

        Raises:
            BatchNotFound: There is none of that id, or it is another key's.
            InvalidRequest: It is over.
        """
        if (batch := self.get(key, batch_id)).is_over:
            raise InvalidRequest(f"The batch {batch.id} is {batch.status}: it cannot be cancelled any more.")
        return self.move(batch_id, "cancelling", since=("validating", "in_progress", "finalizing"), now_s=now_s)

    def give_up(self, batch_id: str, error: BatchError, *, now_s: float) -> Batch:
        """Have a batch that cannot go on end as failed, with the answers that it has."""
        with transaction(self._db):
            batch = self.find(batch_id)
            if batch.status == "in_progress":
                batch = msgspec.structs.replace(batch, errors=BatchErrors(data=[error]), status="cancelling")
                self._save(batch)
        return batch

    def left_s(self, batch_id: str) -> float:
        """How much time a batch has; less than none after its end."""
        (end_s,) = self._db.execute("SELECT expires_clock_s FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return end_s - self._clock.now_s()

    def fail(self, batch_id: str, errors: Sequence[BatchError], *, now_s: float) -> None:
        """End a batch that cannot be done; answers that it has are dropped."""
        with transaction(self._db):
            if not (batch := self.find(batch_id)).is_over:
                self._save(
                    _stamped(msgspec.structs.replace(batch, errors=BatchErrors(data=[*errors])), "failed", now_s)
                )
                self._drop_answers(batch_id)

    def answered(self, batch_id: str) -> set[int]:
        """The numbers of the lines that have an answer."""
        return {int(row[0]) for row in self._db.execute("SELECT line FROM results WHERE batch = ?", (batch_id,))}

    def record(self, batch_id: str, answer: Answer) -> None:
        """Keep the answer of a line, unless it has one already or the batch is over.

        Raises:
            StorageFull: The key has no room for it.
        """
        with transaction(self._db) as db:
            kept = db.execute(
                "INSERT OR IGNORE INTO results SELECT ?1, ?2, ?3, ?4"
                " WHERE EXISTS (SELECT 1 FROM batches WHERE id = ?1 AND NOT is_over)",
                (batch_id, answer.number, answer.is_error, answer.data),
            ).rowcount
            if kept:
                db.execute(
                    "UPDATE batches SET completed = completed + ?, failed = failed + ?,"
                    " input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?,"
                    " output_tokens = output_tokens + ?, reasoning_tokens = reasoning_tokens + ?,"
                    " result_bytes = result_bytes + ? WHERE id = ?",
                    (not answer.is_error, answer.is_error, *answer.tokens, len(answer.data) + 1, batch_id),
                )
                self._check_room(batch_id)

    def _check_room(self, batch_id: str) -> None:
        (key,) = self._db.execute("SELECT key FROM batches WHERE id = ?", (batch_id,)).fetchone()
        num, size = held_by(self._db, key)
        if size > self._max_bytes:
            raise StorageFull(num_files=num, max_files=MAX_FILES, size_bytes=size, max_bytes=self._max_bytes)

    def finish(
        self, batch_id: str, to: BatchStatus, *, output: str | None, errors: str | None, num_unanswered: int,
        now_s: float,
    ) -> None:  # fmt: skip
        """End a batch whose files are there; inside the caller's transaction, which made their rows."""
        batch = msgspec.structs.replace(self.find(batch_id), output_file_id=output, error_file_id=errors)
        self._save(_stamped(batch, to, now_s))
        self._db.execute("UPDATE batches SET failed = failed + ? WHERE id = ?", (num_unanswered, batch_id))
        self._drop_answers(batch_id)

    def _drop_answers(self, batch_id: str) -> None:
        self._db.execute("DELETE FROM results WHERE batch = ?", (batch_id,))
        self._db.execute("UPDATE batches SET result_bytes = 0 WHERE id = ?", (batch_id,))

    def _row(self, where: str, *values: str) -> Sequence[object] | None:
        row: Sequence[object] | None = self._db.execute(
            f"SELECT record, {_COUNTS} FROM batches WHERE {where}", values  # noqa: S608  # our own names
        ).fetchone()  # fmt: skip
        return row

    def _save(self, batch: Batch) -> None:
        self._db.execute(
            "UPDATE batches SET record = ?, is_over = ? WHERE id = ?",
            (msgspec.json.encode(batch), batch.is_over, batch.id),
        )


def read_answers(path: Path, batch_id: str, *, is_error: bool) -> Generator[bytes]:
    """The answers of a batch's lines in their order, on any thread."""
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        rows = db.execute(
            "SELECT answer FROM results WHERE batch = ? AND is_error = ? ORDER BY line", (batch_id, is_error)
        )
        for (answer,) in rows:
            yield answer


def _stamped(batch: Batch, status: BatchStatus, now_s: float) -> Batch:
    stamp = {} if status == "validating" else {f"{status}_at": int(now_s)}
    return msgspec.structs.replace(batch, status=status, **stamp)


def _batch(row: Sequence[object]) -> Batch:
    record, *counts = row
    completed, failed, read, cached, written, thought = [n for n in counts if isinstance(n, int)]
    assert isinstance(record, bytes)
    batch = msgspec.json.decode(record, type=Batch)
    batch.request_counts = msgspec.structs.replace(batch.request_counts, completed=completed, failed=failed)
    batch.usage = BatchUsage(
        input_tokens=read, input_tokens_details=InputDetails(cached_tokens=cached), output_tokens=written,
        output_tokens_details=OutputDetails(reasoning_tokens=thought), total_tokens=read + written,
    )  # fmt: skip
    return batch
