"""Reading what stands on the disk, and not what the kernel keeps of it in memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from .digest import Digest, StreamingHash

_READ_BYTES = 1 << 20
_BLOCK_BYTES = 4096
"""What O_DIRECT wants positions and lengths to be multiples of, at most."""


class DiskReader:
    """One file, read past the page cache where its file system can do that (``O_DIRECT``). Closed by its holder; one
    thread uses it.

    Where it cannot, what is cached is dropped first. That leaves what a process has mapped, such as the weights of a
    loaded model; then `is_direct` is false, and what is read may be what memory has.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd, self.is_direct = _open(path)
        self._buffer = mmap.mmap(-1, _READ_BYTES)

    @property
    def size_bytes(self) -> int:
        """Of the file now."""
        return os.fstat(self._fd).st_size

    def read(self, start: int, stop: int) -> Generator[memoryview]:
        """The bytes from `start`, a multiple of 4096, to `stop` or the file's end, a MiB at a time. Each part is
        overwritten by the next.

        Raises:
            OSError: The disk refuses to read them.
        """
        assert start % _BLOCK_BYTES == 0
        with memoryview(self._buffer) as view:
            while start < stop:
                num_bytes = self._read_at(start)
                if not num_bytes:
                    return
                with view[: min(num_bytes, stop - start)] as part:
                    yield part
                if num_bytes % _BLOCK_BYTES:
                    return  # the file's end
                start += num_bytes

    def _read_at(self, start: int) -> int:
        if not self.is_direct:
            os.posix_fadvise(self._fd, start, _READ_BYTES, os.POSIX_FADV_DONTNEED)
        try:
            return os.preadv(self._fd, [self._buffer], start)
        except OSError as e:
            if not self.is_direct or e.errno != errno.EINVAL:
                raise
        # Some file systems let it be opened so, and then do not read.
        direct, self._fd, self.is_direct = self._fd, os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), False
        os.close(direct)
        return self._read_at(start)

    def digest(self, start: int, stop: int, *, before_read: Callable[[], None] | None = None) -> Digest:
        """The digest of a range; `before_read` runs before each MiB, and may wait or raise.

        Raises:
            OSError: The disk refuses to read it.
        """
        found = StreamingHash()
        with closing(self.read(start, stop)) as parts:
            for part in parts:
                if before_read:
                    before_read()
                found.update(part)
        return found.digest()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
        self._buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _open(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
