"""`batches.db`: files, batches and the answers of their lines, in SQLite (WAL, one fsync a commit)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge.database import CorruptDatabase, connect
from edge.errors import StoreError

SCHEMA_VERSION = 1
_MIGRATIONS = (
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
)


def open_batches(path: Path) -> sqlite3.Connection:
    """Open the database, or make it. The caller owns and closes it.

    Raises:
        NewerFormat: A newer version of the appliance wrote it.
        StoreError: It cannot be opened. A damaged one stays where it is: files would go with it.
    """
    try:
        return connect(path, _MIGRATIONS)
    except CorruptDatabase as e:
        raise StoreError(
            f"{path} is damaged: {e.reason}.",
            hint="Restore it from a backup, or move it away: files and batches in it are then gone.",
        ) from e
