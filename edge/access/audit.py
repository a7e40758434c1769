"""What operators did, each line chained to the one before by its SHA-256.

A line that is edited, put in between or taken out breaks the chain; one that is cut off at the end leaves the head
behind that is kept beside the lines. Who may write the whole file can write a new chain and a new head: against that,
hold the head against one that was seen elsewhere, such as in the telemetry that left the device.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edge.database import connect_read_only, errors_of, transaction
from edge.errors import AuditBroken

from .state import SCHEMA_VERSION, open_state

MAX_LINES = 100_000
"""Kept; of the oldest tenth beyond it only the digest stays, from which the chain goes on."""
MAX_TEXT = 400


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that somebody did.

    Attributes:
        actor: A key's id and name, or who else.
        act: As ``model.unload``.
        target: What it was done to.
        outcome: ``ok``, or the code of the error.
    """

    actor: str
    act: str
    target: str = ""
    outcome: str = "ok"


@dataclass(frozen=True, slots=True)
class Line:
    """An act in its place of the log."""

    seq: int
    time_s: float
    act: Act
    digest: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """The last line's number and digest: whoever has them can tell whether the log was cut or written anew."""

    seq: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.seq}:{self.digest.hex()}"


def parse_head(text: str) -> Head | None:
    """A head as it is printed; None if it is none."""
    seq, _, digest = text.partition(":")
    try:
        head = Head(int(seq), bytes.fromhex(digest))
    except ValueError:
        return None
    return head if len(head.digest) == 32 and head.seq >= 0 else None


def append(db: sqlite3.Connection, act: Act, *, now_s: float) -> Head:
    """Add a line, inside the caller's transaction."""
    before = _end(db, "head")
    seq, act = before.seq + 1, _bounded(act)
    head = Head(seq, _digest(before.digest, seq, now_s, act))
    values = (seq, now_s, act.actor, act.act, act.target, act.outcome, head.digest)
    db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    db.execute("UPDATE audit_ends SET seq = ?, digest = ? WHERE name = 'head'", (head.seq, head.digest))
    _prune(db, head)
    return head


def add_line(path: Path, act: Act) -> Head:
    """Add a line from a process that does nothing else with the file; it is on the disk when this returns.

    Raises:
        StoreError: It cannot be written.
    """
    with errors_of(path), closing(open_state(path)) as db, transaction(db):
        return append(db, act, now_s=time.time())


def read_lines(path: Path, *, count: int | None = None) -> list[Line]:
    """The last lines, oldest first; all of them without a `count`.

    Raises:
        StoreError: The file cannot be read.
    """
    if not path.exists():
        return []
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        return _lines(db, -1 if count is None else count)


def read_head(path: Path) -> Head:
    """The end of the log.

    Raises:
        StoreError: The file cannot be read.
    """
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        return _end(db, "head")


def verify(path: Path, *, seen: Head | None = None) -> Head:
    """Compute the whole chain again.

    Args:
        seen: A head that was noted before: the log must still lead through it.

    Raises:
        AuditBroken: A line was edited, taken out, put in or cut off.
        StoreError: The file cannot be read.
    """
    if not path.exists() and seen is None:
        return Head(0, bytes(32))
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        db.execute("BEGIN")  # lines and ends of one moment
        start, head, lines = _end(db, "start"), _end(db, "head"), _lines(db, -1)
    _check_chain(start, head, lines)
    _check_seen(start, lines, seen)
    return head


def _check_chain(start: Head, head: Head, lines: Iterable[Line]) -> None:
    last = start
    for line in lines:
        if line.seq != last.seq + 1:
            raise AuditBroken(last.seq + 1, "is missing")
        if line.digest != _digest(last.digest, line.seq, line.time_s, line.act):
            raise AuditBroken(line.seq, "was changed, or the one before it")
        last = Head(line.seq, line.digest)
    if last.seq < head.seq:
        raise AuditBroken(last.seq + 1, f"is cut off, as all up to {head.seq} are")
    if last != head:
        raise AuditBroken(head.seq, "is not the one that was written last")


def _check_seen(start: Head, lines: Iterable[Line], seen: Head | None) -> None:
    if seen is None or seen.seq < start.seq:
        return
    heads = {start.seq: start.digest, **{line.seq: line.digest for line in lines}}
    if seen.seq not in heads:
        raise AuditBroken(seen.seq, "is cut off: its digest was seen before")
    if heads[seen.seq] != seen.digest:
        raise AuditBroken(seen.seq, "is another than the one that was seen before")


def _bounded(act: Act) -> Act:
    """Texts of one line that SQLite and JSON can carry."""

    def clean(text: str) -> str:
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:MAX_TEXT])

    return Act(clean(act.actor), clean(act.act), clean(act.target), clean(act.outcome))


def _digest(before: bytes, seq: int, time_s: float, act: Act) -> bytes:
    # Whatever somebody may have put into a column has a text, and another digest.
    line = json.dumps([seq, time_s, act.actor, act.act, act.target, act.outcome], default=repr)
    return hashlib.sha256(before + line.encode("ascii")).digest()


def _end(db: sqlite3.Connection, name: str) -> Head:
    row: Sequence[object] | None = db.execute("SELECT seq, digest FROM audit_ends WHERE name = ?", (name,)).fetchone()
    if row is None or not isinstance(row[0], int) or not isinstance(row[1], bytes):
        raise AuditBroken(0, f"has no {name}")
    return Head(row[0], row[1])


def _lines(db: sqlite3.Connection, count: int) -> list[Line]:
    rows = db.execute(
        "SELECT seq, time_s, actor, act, target, outcome, digest FROM audit ORDER BY seq DESC LIMIT ?", (count,)
    )
    return [Line(seq, time_s, Act(*texts), digest) for seq, time_s, *texts, digest in rows][::-1]


def _prune(db: sqlite3.Connection, head: Head) -> None:
    start = _end(db, "start")
    if head.seq - start.seq <= MAX_LINES:
        return
    last = start.seq + MAX_LINES // 10
    row = db.execute("SELECT seq, digest FROM audit WHERE seq = ?", (last,)).fetchone()
    if row is not None:  # a log that somebody took lines from stays as it is, for `verify` to tell
        db.execute("UPDATE audit_ends SET seq = ?, digest = ? WHERE name = 'start'", row)
        db.execute("DELETE FROM audit WHERE seq <= ?", (last,))
