"""Blobs that somebody sends: hashed while they arrive, kept only if they are what he said."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from edge.errors import DigestMismatch, QueueFull

from .blobs import Partial
from .digest import Digest
from .models import ModelStore
from .transfer import CHECK_EVERY_BYTES, require_room

MAX_UPLOAD_BYTES = 64 << 30


class Upload:
    """One blob on its way in. Its methods block: call them from a thread, one at a time."""

    def __init__(self, store: ModelStore, digest: Digest, partial: Partial) -> None:
        self._store = store
        self._digest = digest
        self._partial = partial
        self._unchecked = CHECK_EVERY_BYTES

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            DiskFull: They would take what databases and logs need.
        """
        self._unchecked += len(data)
        if self._unchecked >= CHECK_EVERY_BYTES:
            require_room(self._store.blobs, CHECK_EVERY_BYTES, self._partial)
            self._unchecked = 0
        self._partial.write(data)

    def finish(self) -> None:
        """Keep the blob in the store.

        Raises:
            DigestMismatch: The bytes are others.
        """
        staged = self._partial.complete()
        if staged.digest != self._digest:
            raise DigestMismatch("The upload", expected=self._digest, actual=staged.digest)
        self._store.keep(staged)


@contextmanager
def receiving(store: ModelStore, digest: Digest) -> Generator[Upload]:
    """An upload from its first byte; nothing of it is left behind where it does not come to its end.

    Raises:
        QueueFull: The same blob is being sent already.
        StoreError: The store cannot be written.
    """

    def busy() -> None:
        raise QueueFull(retry_after_s=5)

    store.refs()  # a store that cannot be used says so now
    with store.blobs.ingest(f"upload {digest}", before_poll=busy) as partial:
        partial.restart()
        try:
            yield Upload(store, digest, partial)
        finally:
            partial.discard()
