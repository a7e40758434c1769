"""Leases: what somebody uses now is not collected, whatever becomes of its name.

``leases/<hex>`` of the store, held by a shared lock (flock) of whoever uses the manifest or blob of that digest. The
lock goes with its holder, however he ends; the file is swept by the next `collect`.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from .digest import Digest, is_hex
from .files import FileOps, translated, try_lock


class Leases:
    """The leases of one store. Every method but the end of a lease happens under the store's lock."""

    def __init__(self, directory: Path, files: FileOps) -> None:
        self._directory = directory
        self._files = files

    def take(self, digests: Iterable[Digest], stack: ExitStack) -> None:
        """Take a lease of each, until the stack is closed.

        Raises:
            StoreError: The directory cannot be written.
        """
        self._files.make_dir(self._directory)
        for digest in digests:
            path = self._directory / digest.hex
            file = stack.enter_context(self._files.open_append(path))
            with translated(path, "Locking"):
                fcntl.flock(file.fileno(), fcntl.LOCK_SH)

    def held(self) -> frozenset[Digest]:
        """What somebody holds; files of those who are gone are removed."""
        names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        found = {Digest(f"sha256:{name}") for name in names if is_hex(name)}
        return frozenset(digest for digest in found if not self._swept(digest))

    def _swept(self, digest: Digest) -> bool:
        path = self._directory / digest.hex
        with self._files.open_append(path) as file:
            if not try_lock(file):
                return False
            self._files.remove(path)
            return True
