"""Files and batches on the disk, under one connection and on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from edge.config import Settings
from edge.database import RunningClock, errors_of, transaction
from edge.errors import InvalidRequest
from runtime.api.threads import BackgroundThreads

from .database import open_batches, shrink
from .files import Files
from .ledger import Ledger
from .schema import Batch

T = TypeVar("T")
CLOSE_S = 10.0
log = logging.getLogger("edge.batches")
FILES_OF_KEY = 8
"""A key's files may together be as large as so many of the largest."""


class BatchStore:
    """What is on the disk. All of it blocks, and belongs to the thread that made it."""

    def __init__(self, settings: Settings, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Open it, or make it, and remove what was left half done. Nothing may be on its way to the disk.

        Raises:
            StoreError: It cannot be opened.
        """
        self.path = settings.batches_db
        self._db = open_batches(self.path)
        max_bytes = FILES_OF_KEY * settings.max_file_bytes
        with errors_of(self.path):
            self._clock = RunningClock(self._db, monotonic=monotonic)
            self.files = Files(self._db, settings.files_dir, self._clock, max_bytes=max_bytes)
            self.batches = Ledger(self._db, self._clock, max_bytes=max_bytes)
            self.files.sweep()

    def transaction(self) -> AbstractContextManager[object]:
        """Changes of files and batches, all or none."""
        return transaction(self._db)

    def tidy(self) -> bool:
        """Remove what is over, and give its room back; whether there is more of that."""
        self.files.remove_expired()
        self._clock.save()
        return shrink(self._db)

    def create_batch(self, key: str, batch: Batch) -> None:
        """Keep a new batch of a file of the key.

        Raises:
            StoredFileNotFound: It has no such file.
            InvalidRequest: The file is not for a batch.
            StorageFull: It has no room for what will come of it.
            QueueFull: Too many batches are not over yet.
        """
        self.files.check_room(key, 1)
        file = self.files.get(key, batch.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequest(
                f"The file {file.id} is the result of a batch, and none for one.", field="input_file_id"
            )
        self.batches.create(key, batch)

    def close(self) -> None:
        """Close the database."""
        with contextlib.closing(self._db), contextlib.suppress(sqlite3.Error):  # a disk that fails takes no clock
            self._clock.save(min_s=0)


class StoreThread:
    """The store's thread. It opens the store when something is first wanted of it: most appliances never do."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = BackgroundThreads(1, name="batches")
        self._store: BatchStore | None = None

    @property
    def path(self) -> Path:
        """Of the database."""
        return self._settings.batches_db

    @property
    def is_there(self) -> bool:
        """Whether there is anything on the disk."""
        return self.path.exists() or self._settings.files_dir.exists()

    async def run(self, work: Callable[[BatchStore], T]) -> T:
        """What `work` gives, in its turn.

        Raises:
            StoreError: The disk or the database failed.
        """
        return await self._thread.run(lambda: self._with_store(work))

    def _with_store(self, work: Callable[[BatchStore], T]) -> T:
        if self._store is None:
            self._store = BatchStore(self._settings)
        with errors_of(self.path):
            return work(self._store)

    async def close(self) -> None:
        """Do what waits, and close the database. A disk that does not answer is not waited for."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._thread.run(self._close)
        except TimeoutError:
            log.error("%s does not answer", self.path)
        self._thread.close()

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
