"""Results of a run's steps on disk, each under the key of its inputs: what lets a killed run go on where it was."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge.errors import DiskFull, RecipeError, StoreError
from edge.store.files import FileOps, translated, try_lock

_PARTIAL = ".partial"


def step_key(kind: str, *inputs: object) -> str:
    """A name for the result of a step: equal for equal inputs, which must encode as JSON."""
    return hashlib.sha256(msgspec.json.encode([kind, *inputs])).hexdigest()[:32]


class StepCache:
    """A directory of finished results, ``<key>/<name>``. A name appears only when its bytes are on the disk.

    One run at a time holds it; another is refused, not queued.
    """

    def __init__(self, root: Path, files: FileOps | None = None) -> None:
        self.root = root
        self._files = files or FileOps()

    @contextmanager
    def held(self) -> Generator[None]:
        """Take the cache for one run, and sweep what a killed one left half-written.

        Raises:
            RecipeError: Another process is at it.
            StoreError: The directory cannot be made.
        """
        self._files.make_dir(self.root)
        with self._files.open_append(self.root / "lock") as lock:
            if not try_lock(lock):
                raise RecipeError(
                    "Another quantization is running with the same EDGE_HOME.", hint="Wait until it has ended."
                )
            for partial in self.root.glob(f"*/*{_PARTIAL}"):
                self._files.remove(partial)
            yield

    def find(self, key: str, name: str) -> Path | None:
        """The finished result, if there is one."""
        path = self.root / key / name
        return path if path.is_file() else None

    @contextmanager
    def making(self, key: str, name: str, *, needed_bytes: int = 1) -> Generator[Path]:
        """A path to write a result to. It gets its name after the block, when its bytes are on the disk.

        Raises:
            DiskFull: The disk filled up on the way.
            StoreError: The system refused otherwise.
        """
        target = self.root / key / name
        self._files.make_dir(target.parent)
        partial = target.with_name(name + _PARTIAL)
        try:
            with self._blaming_the_disk(partial, needed_bytes):
                yield partial
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            self._files.rename(partial, target)
            self._files.sync_dir(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _blaming_the_disk(self, partial: Path, needed_bytes: int) -> Generator[None]:
        """The native side reports a full disk as a failed write, so its failure is looked at twice."""
        try:
            with translated(partial, "Writing", needed_bytes=needed_bytes):
                yield
        except StoreError as e:
            if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.EFBIG:
                raise RecipeError(
                    f"{partial.name} grew beyond what the file system or a limit of this process allows.",
                    hint="Choose a work directory on another file system (EDGE_HOME).",
                ) from e
            raise
        except RecipeError as e:
            free = self._files.free_bytes(partial.parent)
            if free < max(needed_bytes // 100, 1 << 16):
                raise DiskFull(required_bytes=needed_bytes, available_bytes=free) from e
            raise

    def clear(self) -> None:
        """Remove every result; call it while the cache is held."""
        for entry in self._entries():
            self._files.remove_tree(entry)

    def _entries(self) -> Iterator[Path]:
        return (path for path in self.root.iterdir() if path.is_dir())

    def free_bytes(self) -> int:
        """Room for more results."""
        self._files.make_dir(self.root)
        return self._files.free_bytes(self.root)
