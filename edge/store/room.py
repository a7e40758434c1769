"""Room on the disk: what downloads under way were promised, and a little that is kept so that removing always works."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

import msgspec

from edge.errors import StoreError

from .files import FileOps, translated, wait_for_lock

RESERVE_FILE_BYTES = 4 << 20
"""Given up before something is removed on a disk that may be full: enough for the new index and a line of the audit."""
_LOCK_TIMEOUT_S = 60.0


class _Claim(msgspec.Struct, frozen=True, kw_only=True):
    total_bytes: int


class Room:
    """What was promised to the partials of one store: ``ingest/<key>.room``, locked (flock) by who fetches.

    A promise ends with its process. What a partial and its folder have on the disk already is no promise any more.
    """

    def __init__(self, root: Path, ingest_dir: Path, files: FileOps) -> None:
        self._root = root
        self._ingest_dir = ingest_dir
        self._files = files

    @contextmanager
    def admission(self) -> Generator[None]:
        """Hold this from looking at what is free to claiming it, so that two downloads are not promised the same.

        Raises:
            StoreError: Somebody kept it for a minute.
        """
        self._files.make_dir(self._root)
        with self._files.open_append(self._root / "room.lock") as file:
            wait_for_lock(file, timeout_s=_LOCK_TIMEOUT_S, busy=f"The store {self._root} is in use by another process.")
            yield

    def claim(self, partial: Path, total_bytes: int, earlier: FileIO | None) -> FileIO:
        """Promise that a partial may grow to `total_bytes`, until the file that is given is closed.

        Args:
            earlier: The file of the same holder's promise before, which is replaced.
        """
        with ExitStack() as on_failure:
            file = on_failure.enter_context(earlier or self._files.open_append(partial.with_suffix(".room")))
            with translated(partial, "Locking"):
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            self._files.truncate(file, 0)
            self._files.write(file, msgspec.json.encode(_Claim(total_bytes=total_bytes)))
            on_failure.pop_all()
            return file

    def promised_bytes(self, *, but: Path | None = None) -> int:
        """What is still to come to every partial that is being fetched, without that of `but`."""
        names = sorted(self._ingest_dir.glob("*.room"))
        return sum(_outstanding_bytes(path) for path in names if but is None or path.stem != but.stem)


def _outstanding_bytes(path: Path) -> int:
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                claim = msgspec.json.decode(file.read(1 << 10), type=_Claim)
                return max(0, claim.total_bytes - used_bytes(path.with_suffix(".partial")))
    except (FileNotFoundError, msgspec.MsgspecError):
        pass  # it has just ended, or has just begun
    return 0


def used_bytes(partial: Path) -> int:
    """What a partial and its folder take."""
    return size_of(partial) + size_of(partial.with_suffix(".d"))


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a directory; 0 for one that is not there."""
    try:
        return sum(size_of(inner) for inner in path.iterdir()) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:
        return 0


def give_up_reserve(root: Path, files: FileOps) -> None:
    """Make a little room, so that a reference can be removed where the disk is full."""
    files.remove(root / "reserve")


def take_reserve(root: Path, files: FileOps) -> None:
    """Take the room again; where there is none, or the file system cannot, there is no reserve until the next time."""
    try:
        with files.open_append(root / "reserve") as file:
            files.allocate(file, RESERVE_FILE_BYTES)
    except StoreError:
        files.remove(root / "reserve")
