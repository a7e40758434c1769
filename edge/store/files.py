"""The one seam through which the store changes the disk.

Tests subclass :class:`FileOps` to stop before a numbered operation, or to record what was done and replay it without
what was not yet synced. Reading needs no seam.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from edge.errors import DiskFull, StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What link(2) answers where hard links cannot be made: other device, FAT, protected_hardlinks, too many links.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_POLL_S = 0.05


@contextmanager
def translated(path: Path, doing: str, *, needed_bytes: int = 1) -> Generator[None]:
    """Turn an `OSError` into the store's own errors.

    Raises:
        DiskFull: The disk or the quota is used up.
        StoreError: Anything else the system refused.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise DiskFull(required_bytes=needed_bytes, available_bytes=0) from e
        hint = "Check that the directory belongs to this user and is writable."
        raise StoreError(f"{doing} {path} failed: {e.strerror or e}.", hint=hint) from e


class FileOps:
    """Durable changes to files: each method is one step that a crash may come before or after.

    Raises:
        StoreError: From every method, when the system refuses; `DiskFull` where the disk is full.
    """

    def make_dir(self, path: Path) -> None:
        """Create a directory and its parents; an existing one is left alone."""
        with translated(path, "Creating"):
            path.mkdir(parents=True, exist_ok=True)

    def open_append(self, path: Path) -> FileIO:
        """Open a file, created if absent, for reading and for writing at its end; unbuffered."""
        with translated(path, "Opening"):
            return path.open("a+b", buffering=0)

    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        """Write all of `data` at the end of the file."""
        view = memoryview(data)
        with translated(Path(str(file.name)), "Writing", needed_bytes=len(view)):
            while view:
                view = view[file.write(view) :]

    def open_update(self, path: Path) -> FileIO:
        """Open a file that is there, for reading and for writing anywhere; unbuffered."""
        with translated(path, "Opening"):
            return path.open("r+b", buffering=0)

    def write_at(self, file: FileIO, start: int, data: bytes) -> None:
        """Write all of `data` over what stands at `start` of a file of `open_update`."""
        view = memoryview(data)
        with translated(Path(str(file.name)), "Writing", needed_bytes=len(view)):
            while view:
                done = os.pwrite(file.fileno(), view, start)
                view, start = view[done:], start + done

    def truncate(self, file: FileIO, size_bytes: int) -> None:
        with translated(Path(str(file.name)), "Truncating"):
            os.ftruncate(file.fileno(), size_bytes)

    def allocate(self, file: FileIO, size_bytes: int) -> None:
        """Take room for the file's first bytes without writing them."""
        with translated(Path(str(file.name)), "Allocating", needed_bytes=size_bytes):
            os.posix_fallocate(file.fileno(), 0, size_bytes)

    def sync(self, file: FileIO) -> None:
        """Return when the file's content is on the disk."""
        with translated(Path(str(file.name)), "Syncing"):
            os.fsync(file.fileno())

    def sync_dir(self, path: Path) -> None:
        """Return when the directory's entries (names created, renamed, removed) are on the disk."""
        with translated(path, "Syncing"):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give the file a new name on the same file system, replacing what had it."""
        with translated(target, "Renaming to"):
            source.replace(target)

    def link(self, source: Path, target: Path) -> bool:
        """Give the file a second name; False where the file system cannot."""
        with translated(target, "Linking to"):
            try:
                target.hardlink_to(source)
            except OSError as e:
                if e.errno in _NO_LINK:
                    return False
                raise
            return True

    def remove(self, path: Path) -> None:
        """Remove a name; an absent one is fine."""
        with translated(path, "Removing"):
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all in it; an absent one is fine."""
        with translated(path, "Removing"):
            if path.is_dir():
                shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes this user may still write to the file system of an existing path."""
        with translated(path, "Looking at"):
            return shutil.disk_usage(path).free


def write_file(files: FileOps, path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file whole: readers see the old content or the new. Concurrent writers need a lock of their own."""
    temporary = path.with_name(f"{path.name}.new")
    with files.open_append(temporary) as file:
        files.truncate(file, 0)
        files.write(file, data)
        if durable:
            files.sync(file)
    files.rename(temporary, path)
    if durable:
        files.sync_dir(path.parent)


def try_lock(file: FileIO) -> bool:
    """Take the exclusive advisory lock of an open file, without waiting; it goes with the file's closing."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: FileIO, *, timeout_s: float, busy: str, before_poll: Callable[[], None] | None = None) -> None:
    """Take the exclusive lock of an open file. `before_poll` runs before each further try and may raise.

    Raises:
        StoreError: Another process kept it for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not try_lock(file):
        if time.monotonic() > deadline:
            raise StoreError(busy, hint="Wait for the other process to end, then try again.")
        if before_poll:
            before_poll()
        time.sleep(_POLL_S)
