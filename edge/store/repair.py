"""Putting damaged parts of a blob right, by fetching these alone: from memory, another directory, a peer, a registry.

A part is believed by its digest only, wherever it comes from. It is written where the damaged one stands: an engine
that has the file mapped goes on with the right bytes, flash moves a block that it could not read, and no second copy of
the blob needs room. The blob is quarantined meanwhile, so nobody sees it half done; a power cut leaves it so, and the
next try goes on with what is still wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge.errors import Cancelled, EdgeError, NotRepaired

from .blobs import BlobStore
from .chunks import CHUNK_BYTES
from .digest import digest_bytes
from .disk import DiskReader
from .files import translated
from .manifest import Descriptor
from .models import ModelStore
from .scrub import Piece, check, pieces_of
from .transfer import Control

log = logging.getLogger("edge.repair")


class Source(Protocol):
    """A place that has the blob too."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """The piece's bytes, as the source has them; they are not believed.

        Raises:
            EdgeError: It does not have them, or cannot be reached.
        """
        ...


@dataclass(frozen=True, slots=True)
class MemorySource:
    """What the kernel still has in memory of the damaged file itself, where a model that is loaded or was copied lately
    keeps it. Where it has nothing this reads the disk, and finds what is wrong there."""

    blobs: BlobStore
    name: str = "memory"

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Read through the page cache."""
        control.check()
        return read_piece(self.blobs.path(piece.blob), piece)


@dataclass(frozen=True, slots=True)
class LayoutSource:
    """Another OCI layout directory of this machine: the seed, a stick."""

    root: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.root)

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Read its blob."""
        control.check()
        return read_piece(BlobStore(self.root).path(piece.blob), piece)


def read_piece(path: Path, piece: Piece) -> bytes:
    """A piece's bytes as a file on this machine has them.

    Raises:
        StoreError: The file cannot be read.
    """
    with translated(path, "Reading"), path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), piece.stop - piece.start, piece.start)


@dataclass(slots=True)
class Mended:
    """What a repair did."""

    num_pieces: int = 0
    mended_bytes: int = 0
    sources: list[str] = field(default_factory=list[str])
    """Where the bytes came from, in the order of their use."""


def repair(store: ModelStore, blob: Descriptor, sources: Sequence[Source], control: Control) -> Mended:
    """Put right what is wrong with a blob on the disk, and let it be used again. Blocks; one at a time for each blob,
    across processes.

    Raises:
        NotRepaired: No source has the right bytes of some part, or the disk does not keep them.
        StoreError: The store cannot be written.
        Cancelled: Somebody asked for it.
    """
    done = Mended()
    with store.blobs.ingest(f"repair {blob.digest}", before_poll=control.check) as turn:
        try:
            _mend(store.blobs, blob, sources, control, done)
        finally:
            turn.discard()
    store.release(blob.digest)
    return done


def _is_right(blobs: BlobStore, blob: Descriptor, control: Control) -> bool:
    whole = Piece(blob.digest, blob.size, 0, blob.size, blob.digest)
    return check(blobs, whole, before_read=control.check) is None


def _mend(blobs: BlobStore, blob: Descriptor, sources: Sequence[Source], control: Control, done: Mended) -> None:
    path, pieces = blobs.path(blob.digest), pieces_of(blobs, blob)
    if not blobs.has(blob.digest):
        raise NotRepaired(str(path), "it is missing")
    wrong = _wrong(path, pieces, control)
    if wrong and pieces[0].is_whole and blob.size > CHUNK_BYTES:
        raise NotRepaired(str(path), "no digests of its parts are known, so none can be fetched alone")
    with blobs.files.open_update(path) as file:
        if path.stat().st_size > blob.size:
            blobs.files.truncate(file, blob.size)
        for piece in wrong:
            data, name = _fetched(piece, path, sources, control)
            blobs.files.write_at(file, piece.start, data)
            done.num_pieces += 1
            done.mended_bytes += len(data)
            done.sources += [] if name in done.sources else [name]
            log.info("%s: bytes %d to %d are mended from %s", path, piece.start, piece.stop, name)
        blobs.files.sync(file)
    if not _is_right(blobs, blob, control):
        raise NotRepaired(str(path), "what was written does not read as such: the disk fails")


def _wrong(path: Path, pieces: Sequence[Piece], control: Control) -> list[Piece]:
    """Those pieces whose bytes are not right on the disk, or not there."""
    with translated(path, "Reading"), DiskReader(path) as disk:
        return [piece for piece in pieces if _reads(disk, piece, control) != piece.expected]


def _reads(disk: DiskReader, piece: Piece, control: Control) -> str:
    try:
        return disk.digest(piece.start, piece.stop, before_read=control.check)
    except OSError:
        return ""  # flash that cannot be read any more: written anew it can


def _fetched(piece: Piece, path: Path, sources: Sequence[Source], control: Control) -> tuple[bytes, str]:
    """The right bytes of a piece, and who had them."""
    problems: list[str] = []
    for source in sources:
        control.report(0, piece.stop - piece.start, f"asking {source.name}")
        try:
            data = source.fetch(piece, control)
        except Cancelled:
            raise
        except EdgeError as e:
            problems.append(e.message.rstrip("."))
            continue
        if digest_bytes(data) == piece.expected:
            return data, source.name
        problems.append(f"{source.name} has other bytes")
    what = "; ".join(problems) or "there is nobody to ask"
    raise NotRepaired(str(path), f"its bytes {piece.start:,} to {piece.stop:,} are not to be had: {what}")
