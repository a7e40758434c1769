"""The digests of a blob's 4 MiB pieces: they tell which piece is damaged, so that it alone is fetched again.

``chunks/<hex>`` of the store, for each blob larger than one piece. A list is derived from bytes that hashed right as a
whole, so a lost or damaged one costs a reading of the blob and nothing else; none is waited for on the disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from typing_extensions import override

from edge.errors import InvalidModelFile

from .digest import Digest, StreamingHash, digest_bytes, is_hex
from .files import FileOps, translated
from .manifest import MAX_DOCUMENT_BYTES, Size, decode, encode

CHUNK_BYTES = 4 << 20
"""Of each piece but the last: 32 bytes of digest for each are too few to count, and 4 MiB are quickly fetched again."""


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The digests of a blob's pieces, in their order."""

    total_bytes: int
    digests: tuple[Digest, ...]

    def span(self, number: int) -> tuple[int, int]:
        """Where a piece begins, and where it ends: the byte behind its last."""
        return number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, self.total_bytes)


class ChunkedHash(StreamingHash):
    """The digest of the whole and of each piece, in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self._piece = hashlib.sha256()
        self._digests: list[Digest] = []

    @override
    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            part = view[: CHUNK_BYTES - self.num_bytes % CHUNK_BYTES]
            super().update(part)
            self._piece.update(part)
            if self.num_bytes % CHUNK_BYTES == 0:
                self._digests.append(Digest(f"sha256:{self._piece.hexdigest()}"))
                self._piece = hashlib.sha256()
            view = view[len(part) :]

    def chunks(self) -> ChunkList:
        """The pieces of all bytes so far; the last may be short."""
        digests = self._digests[:]
        if self.num_bytes % CHUNK_BYTES:
            digests.append(Digest(f"sha256:{self._piece.hexdigest()}"))
        return ChunkList(self.num_bytes, tuple(digests))


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A list as it lies on the disk; the seal is the digest of the same document without it."""

    version: Literal[1] = 1
    blob: Digest
    total_bytes: Size
    chunk_bytes: int = CHUNK_BYTES
    digests: list[Digest]
    seal: str = ""


class ChunkLists:
    """The lists of one store. Safe to use from any number of threads and processes, and needs no lock."""

    def __init__(self, directory: Path, scratch: Path, files: FileOps) -> None:
        self._directory = directory
        self._scratch = scratch
        self._files = files

    def get(self, blob: Digest) -> ChunkList | None:
        """The pieces of a blob; None where they are not known, or their list is damaged."""
        try:
            with (self._directory / blob.hex).open("rb") as file:
                kept = decode(file.read(MAX_DOCUMENT_BYTES + 1), _Kept, what="The list of pieces")
        except (OSError, InvalidModelFile):
            return None
        if kept.blob != blob or kept.seal != _seal(kept) or kept.chunk_bytes != CHUNK_BYTES:
            return None
        return ChunkList(kept.total_bytes, tuple(kept.digests))

    def put(self, blob: Digest, chunks: ChunkList) -> None:
        """Keep the pieces of a blob, if it has more than one.

        Raises:
            StoreError: The directory cannot be written.
        """
        if chunks.total_bytes <= CHUNK_BYTES:
            return
        kept = _Kept(blob=blob, total_bytes=chunks.total_bytes, digests=[*chunks.digests])
        self._files.make_dir(self._directory)
        self._files.make_dir(self._scratch)
        # A name of this thread alone; what a dead one left is swept with the partials.
        temporary = self._scratch / f"{blob.hex[:32]}.{threading.get_native_id()}.chunks"
        with self._files.open_append(temporary) as file:
            self._files.truncate(file, 0)
            self._files.write(file, encode(msgspec.structs.replace(kept, seal=_seal(kept))))
        self._files.rename(temporary, self._directory / blob.hex)

    def remove(self, blob: Digest) -> None:
        """Forget the pieces of a blob; unknown ones are fine."""
        self._files.remove(self._directory / blob.hex)

    def blobs(self) -> Iterator[Digest]:
        """The blobs of which the pieces are known."""
        with translated(self._directory, "Reading"):
            names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        yield from (Digest(f"sha256:{name}") for name in names if is_hex(name))


def _seal(kept: _Kept) -> str:
    return digest_bytes(encode(msgspec.structs.replace(kept, seal="")))
