"""Files in the making: written while they arrive, seen when they are whole and on the disk."""

from __future__ import annotations

import secrets
from io import FileIO
from pathlib import Path

from edge.errors import DiskFull, FileTooLarge
from edge.store.digest import Digest, StreamingHash
from edge.store.files import FileOps, translated

RESERVE_BYTES = 256 << 20
"""Of the disk that files leave free: logs, telemetry and the results of batches need some."""
PART = ".part"


class Upload:
    """One file on its way to the disk; `discard` unless `keep` was reached. One thread at a time uses it; all blocks.

    Attributes:
        id: What the file will be called, here and by clients.
    """

    def __init__(self, directory: Path, *, limit_bytes: int, ops: FileOps | None = None) -> None:
        """Begin a file of mode 0600.

        Raises:
            StoreError: The directory cannot be written.
        """
        self.id = f"file-{secrets.token_hex(12)}"
        self._directory, self._limit_bytes, self._ops = directory, limit_bytes, ops or FileOps()
        self._part = directory / (self.id + PART)
        self._hash = StreamingHash()
        self._file = self._open()

    def _open(self) -> FileIO:
        with translated(self._part, "Creating"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._part.touch(mode=0o600, exist_ok=False)
        return self._ops.open_append(self._part)

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return self._hash.num_bytes

    @property
    def digest(self) -> Digest:
        """Of the bytes so far."""
        return self._hash.digest()

    def check_room(self, more_bytes: int) -> None:
        """See that so many more bytes may come.

        Raises:
            FileTooLarge: They would be too many.
            DiskFull: They would leave less free than the reserve.
        """
        if self.size_bytes + more_bytes > self._limit_bytes:
            raise FileTooLarge(limit_bytes=self._limit_bytes)
        free_bytes = self._ops.free_bytes(self._directory)
        if free_bytes - more_bytes < RESERVE_BYTES:
            raise DiskFull(required_bytes=more_bytes + RESERVE_BYTES, available_bytes=free_bytes)

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            StoreError: There is no room, or the disk fails.
        """
        self.check_room(len(data))
        self._ops.write(self._file, data)
        self._hash.update(data)

    def keep(self) -> None:
        """Give it its name; it is whole and on the disk when this returns. A row then makes it somebody's.

        Raises:
            StoreError: The disk fails.
        """
        self._ops.sync(self._file)
        self._file.close()
        self._ops.rename(self._part, self._directory / self.id)
        self._ops.sync_dir(self._directory)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        for path in (self._part, self._directory / self.id):
            self._ops.remove(path)
