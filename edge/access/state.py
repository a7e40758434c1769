"""`state.db`: keys, usage and the audit log, in SQLite (WAL, one fsync a commit).

The appliance writes it from one thread. Commands write it too, one short commit each: SQLite's lock lets one in at a
time, and readers wait for nobody.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge.database import CorruptDatabase, connect
from edge.errors import StoreError

SCHEMA_VERSION = 1
_MIGRATIONS = (
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        digest BLOB NOT NULL,
        scopes TEXT NOT NULL,
        models TEXT NOT NULL,
        rpm INTEGER,
        tokens_per_day INTEGER,
        priority INTEGER NOT NULL,
        created_s REAL NOT NULL,
        revoked_s REAL
    );
    CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked_s IS NULL;
    CREATE TABLE quotas (
        key TEXT PRIMARY KEY,
        used_tokens INTEGER NOT NULL,
        elapsed_s REAL NOT NULL,
        saved_s REAL NOT NULL
    );
    CREATE TABLE usage (
        day TEXT NOT NULL,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        failures INTEGER NOT NULL,
        cancelled INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        undelivered_tokens INTEGER NOT NULL,
        PRIMARY KEY (day, key, model)
    ) WITHOUT ROWID;
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY,
        time_s REAL NOT NULL,
        actor TEXT NOT NULL,
        act TEXT NOT NULL,
        target TEXT NOT NULL,
        outcome TEXT NOT NULL,
        digest BLOB NOT NULL
    );
    CREATE TABLE audit_ends (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, digest BLOB NOT NULL);
    INSERT INTO audit_ends VALUES ('start', 0, zeroblob(32)), ('head', 0, zeroblob(32));
    """,
)


def open_state(path: Path) -> sqlite3.Connection:
    """Open the database, or make it. The caller owns and closes it.

    Raises:
        NewerFormat: A newer version of the appliance wrote it.
        StoreError: It cannot be opened. A damaged one stays where it is: a new one in its place would have no keys.
    """
    try:
        return connect(path, _MIGRATIONS)
    except CorruptDatabase as e:
        raise StoreError(
            f"{path} is damaged: {e.reason}.",
            hint="Restore it from a backup, or move it away and make new keys: edge key create.",
        ) from e
