"""`batches.db`: files, batches and the answers of their lines, in SQLite (WAL, one fsync a commit)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge.database import CorruptDatabase, connect, errors_of
from edge.errors import StoreError

SCHEMA_VERSION = 2
MIGRATIONS = (
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        key TEXT NOT NULL,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        digest TEXT NOT NULL,
        created_s INTEGER NOT NULL,
        expires_s INTEGER NOT NULL
    );
    CREATE INDEX files_by_key ON files (key, seq);
    CREATE TABLE batches (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        key TEXT NOT NULL,
        input_file TEXT NOT NULL,
        is_over INTEGER NOT NULL,
        record BLOB NOT NULL,
        completed INTEGER NOT NULL DEFAULT 0,
        failed INTEGER NOT NULL DEFAULT 0,
        input_tokens INTEGER NOT NULL DEFAULT 0,
        cached_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0,
        reasoning_tokens INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX batches_by_key ON batches (key, seq);
    CREATE TABLE results (
        batch TEXT NOT NULL,
        line INTEGER NOT NULL,
        is_error INTEGER NOT NULL,
        answer BLOB NOT NULL,
        PRIMARY KEY (batch, line)
    );
    """,
    """
    ALTER TABLE files ADD COLUMN expires_clock_s REAL NOT NULL DEFAULT 0;
    UPDATE files SET expires_clock_s = expires_s - created_s;
    ALTER TABLE batches ADD COLUMN expires_clock_s REAL NOT NULL DEFAULT 86400;
    ALTER TABLE batches ADD COLUMN result_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE batches SET result_bytes = (SELECT coalesce(sum(length(answer)), 0) FROM results WHERE batch = batches.id);
    CREATE TABLE clock (clock_s REAL NOT NULL);
    INSERT INTO clock VALUES (0);
    """,
)
_INCREMENTAL = 2
_SLICE_PAGES = 2048


def shrink(db: sqlite3.Connection) -> bool:
    """Give some of the free pages back to the disk; whether there are more. One that cannot keeps them until it is
    opened without answers."""
    before = _num_free(db)
    db.execute(f"PRAGMA incremental_vacuum({_SLICE_PAGES})").fetchall()
    return 0 < _num_free(db) < before


def _num_free(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA freelist_count").fetchone()[0])


def open_batches(path: Path) -> sqlite3.Connection:
    """Open the database, or make it. The caller owns and closes it.

    Raises:
        NewerFormat: A newer version of the appliance wrote it.
        StoreError: It cannot be opened. A damaged one stays where it is: files would go with it.
    """
    try:
        db = connect(path, MIGRATIONS)
    except CorruptDatabase as e:
        raise StoreError(
            f"{path} is damaged: {e.reason}.",
            hint="Restore it from a backup, or move it away: files and batches in it are then gone.",
        ) from e
    try:
        with errors_of(path):
            _make_shrinkable(db)
    except BaseException:
        db.close()
        raise
    return db


def _make_shrinkable(db: sqlite3.Connection) -> None:
    mode = db.execute("PRAGMA auto_vacuum").fetchone()[0]
    if mode != _INCREMENTAL and db.execute("SELECT 1 FROM results LIMIT 1").fetchone() is None:  # it is small then
        db.execute(f"PRAGMA auto_vacuum={_INCREMENTAL}")
        db.execute("VACUUM")
