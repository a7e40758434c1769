"""Files by their keys: rows of `batches.db`, and bytes under names of our own."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edge.database import RunningClock, transaction
from edge.errors import FileInUse, InvalidRequest, StorageFull, StoredFileNotFound
from edge.store.files import FileOps, translated

from .schema import FileList, FileObject
from .uploads import Upload

KEPT_S = 30 * 86_400
"""Files go after this time, as OpenAI's of this purpose do."""
MAX_FILES = 500
"""Of a key; those that batches made count too, but are never refused."""
MAX_NAME_CHARS = 255
_COLUMNS = "id, purpose, filename, size_bytes, created_s, expires_s"
_SEPARATORS = re.compile(r"[/\\]")


def plain_name(name: str) -> str:
    """The last part of a file's name, to be shown and never to be opened."""
    last = "".join(c for c in _SEPARATORS.split(name)[-1] if c.isprintable())
    return last[-MAX_NAME_CHARS:] or "file"


class Files:
    """The files of all keys. One thread uses it, with the connection that it is given.

    Args:
        clock: When files go; the times that are told are the wall clock's.
        max_bytes: Of the files of one key together, and of the answers that become files.
    """

    def __init__(
        self, db: sqlite3.Connection, directory: Path, clock: RunningClock, *, max_bytes: int,
        ops: FileOps | None = None,
    ) -> None:  # fmt: skip
        self._db, self.directory, self._clock = db, directory, clock
        self._max_bytes, self._ops = max_bytes, ops or FileOps()

    def path(self, file_id: str) -> Path:
        """Where a file lies that is known to be there."""
        return self.directory / file_id

    def sweep(self) -> None:
        """Remove what no row names: uploads that were cut off, and files whose rows went just before a crash. Nothing
        may be on its way while this runs."""
        known = {str(row[0]) for row in self._db.execute("SELECT id FROM files")}
        with translated(self.directory, "Reading"):
            names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        for name in names:
            if name.startswith("file-") and name not in known:
                self._ops.remove(self.directory / name)

    def remove_expired(self) -> None:
        """Remove files whose time is over, but for those that a batch still reads."""
        old = self._db.execute(
            "SELECT id FROM files WHERE expires_clock_s <= ? AND id NOT IN"
            " (SELECT input_file FROM batches WHERE NOT is_over)", (self._clock.now_s(),)
        ).fetchall()  # fmt: skip
        for (file_id,) in old:
            self._remove(str(file_id))

    def check_room(self, key: str, more_bytes: int) -> None:
        """See that a key may have another file, of so many bytes.

        Raises:
            StorageFull: It may not.
        """
        num, size = held_by(self._db, key)
        if num >= MAX_FILES or size + more_bytes > self._max_bytes:
            raise StorageFull(num_files=num, max_files=MAX_FILES, size_bytes=size, max_bytes=self._max_bytes)

    def add(self, key: str, upload: Upload, *, name: str, now_s: float, expires_s: float | None) -> FileObject:
        """Make a whole upload a key's file.

        Raises:
            StorageFull: Others came before it, and left no room.
        """
        with transaction(self._db):
            self.check_room(key, upload.size_bytes)
            return self.insert(key, upload, purpose="batch", name=name, now_s=now_s, expires_s=expires_s)

    def insert(
        self, key: str, upload: Upload, *, purpose: Literal["batch", "batch_output"], name: str, now_s: float,
        expires_s: float | None,
    ) -> FileObject:  # fmt: skip
        """The row of a file, inside the caller's transaction."""
        made = FileObject(
            id=upload.id, bytes=upload.size_bytes, created_at=int(now_s), filename=plain_name(name), purpose=purpose,
            expires_at=int(now_s + (expires_s or KEPT_S)),
        )  # fmt: skip
        self._db.execute(
            f"INSERT INTO files ({_COLUMNS}, key, digest, expires_clock_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # our own names
            (
                made.id,
                purpose,
                made.filename,
                made.bytes,
                made.created_at,
                made.expires_at,
                key,
                upload.digest,
                self._clock.now_s() + (expires_s or KEPT_S),
            ),
        )
        return made

    def get(self, key: str, file_id: str) -> FileObject:
        """One file.

        Raises:
            StoredFileNotFound: There is none of that id, or it is another key's.
        """
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM files WHERE id = ? AND key = ? AND expires_clock_s > ?",  # noqa: S608
            (file_id, key, self._clock.now_s()),
        ).fetchone()  # fmt: skip
        if row is None:
            raise StoredFileNotFound(file_id)
        return _object(row)

    def digest(self, file_id: str) -> str:
        """What a file's bytes have to be; empty where it is gone."""
        row = self._db.execute("SELECT digest FROM files WHERE id = ?", (file_id,)).fetchone()
        return str(row[0]) if row else ""

    def list(self, key: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None) -> FileList:
        """A key's files, beginning after one of them.

        Raises:
            InvalidRequest: `after` is no file of the key.
        """
        order, than = ("DESC", "<") if newest_first else ("ASC", ">")
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM files WHERE key = ? AND expires_clock_s > ? AND (? IS NULL OR purpose = ?)"  # noqa: S608
            f" AND (? IS NULL OR seq {than} ?) ORDER BY seq {order} LIMIT ?",
            (key, self._clock.now_s(), purpose, purpose, after, place_of(self._db, "files", key, after), limit + 1),
        ).fetchall()
        found = [_object(row) for row in rows[:limit]]
        ends = (found[0].id, found[-1].id) if found else (None, None)
        return FileList(data=found, first_id=ends[0], last_id=ends[1], has_more=len(rows) > limit)

    def remove(self, key: str, file_id: str) -> None:
        """Remove a file.

        Raises:
            StoredFileNotFound: There is none of that id, or it is another key's.
            FileInUse: A batch reads it.
        """
        self.get(key, file_id)
        row = self._db.execute("SELECT id FROM batches WHERE input_file = ? AND NOT is_over", (file_id,)).fetchone()
        if row is not None:
            raise FileInUse(file_id, batch=str(row[0]))
        self._remove(file_id)

    def _remove(self, file_id: str) -> None:
        with transaction(self._db):  # first the row: a file without one goes at the next start
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._ops.remove(self.path(file_id))


def held_by(db: sqlite3.Connection, key: str) -> tuple[int, int]:
    """How many files a key has, and the bytes of them and of the answers that will become files."""
    num, size, answers = db.execute(
        "SELECT count(*), coalesce(sum(size_bytes), 0),"
        " (SELECT coalesce(sum(result_bytes), 0) FROM batches WHERE key = ?1) FROM files WHERE key = ?1", (key,)
    ).fetchone()  # fmt: skip
    return num, size + answers


def place_of(db: sqlite3.Connection, table: Literal["files", "batches"], key: str, after: str | None) -> int | None:
    """Where in the order of a table a list goes on.

    Raises:
        InvalidRequest: There is no such object of the key.
    """
    if after is None:
        return None
    row = db.execute(f"SELECT seq FROM {table} WHERE id = ? AND key = ?", (after, key)).fetchone()  # noqa: S608
    if row is None:
        raise InvalidRequest(f"'after' is {after[:64]!r}, which is not in the list.", field="after")
    return int(row[0])


def _object(row: Sequence[object]) -> FileObject:
    file_id, purpose, filename, size_bytes, created_s, expires_s = row
    return FileObject(
        id=str(file_id), purpose=purpose, filename=str(filename), bytes=size_bytes, created_at=created_s,  # pyright: ignore[reportArgumentType]  # the columns' types
        expires_at=expires_s,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
