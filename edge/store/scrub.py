"""Looking whether the bytes on the disk are still those that came: flash forgets, cables and controllers flip bits."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from edge.errors import InvalidModelFile, StoreError

from .blobs import BlobStore
from .chunks import CHUNK_BYTES
from .digest import Digest
from .disk import DiskReader
from .files import write_file
from .manifest import Descriptor, decode
from .models import ModelStore

log = logging.getLogger("edge.scrub")

STATE_NAME = "scrub.json"
"""Beside the index: how far the present round is."""
_SAVE_EVERY = 16
_MAX_STATE_BYTES = 4096


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A part of a blob that can be checked by itself: one of its chunks, or the whole where no list of them is kept."""

    blob: Digest
    blob_bytes: int
    start: int
    stop: int
    expected: Digest

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its blob."""
        return (self.start, self.stop) == (0, self.blob_bytes)


@dataclass(frozen=True, slots=True)
class Flaw:
    """A piece that is not on the disk as it came; `problem` says how, as the end of a sentence about its blob."""

    piece: Piece
    problem: str


def pieces_of(blobs: BlobStore, blob: Descriptor) -> list[Piece]:
    """The pieces of a blob, in their order."""
    digest, size = blob.digest, blob.size
    chunks = blobs.chunks(digest) if size > CHUNK_BYTES else None
    if chunks is None or chunks.total_bytes != size:
        return [Piece(digest, size, 0, size, digest)]
    return [Piece(digest, size, *chunks.span(i), expected) for i, expected in enumerate(chunks.digests)]


def check(blobs: BlobStore, piece: Piece, *, before_read: Callable[[], None] | None = None) -> Flaw | None:
    """Read a piece from the disk itself. One that is wrong is read a second time: memory and cables err too.

    Args:
        before_read: Runs before each MiB, and may wait or raise.
    """
    problem = _problem(blobs, piece, before_read)
    if problem is None:
        return None
    again = _problem(blobs, piece, before_read)
    if again is None:
        log.warning("%s: %s, but not when it was read again", blobs.path(piece.blob), problem)
        return None
    return Flaw(piece, again)


def _problem(blobs: BlobStore, piece: Piece, before_read: Callable[[], None] | None) -> str | None:
    try:
        with DiskReader(blobs.path(piece.blob)) as disk:
            if disk.size_bytes != piece.blob_bytes:
                return f"it has {disk.size_bytes:,} bytes instead of {piece.blob_bytes:,}"
            actual = disk.digest(piece.start, piece.stop, before_read=before_read)
    except FileNotFoundError:
        return "it is missing"
    except OSError as e:
        return f"its bytes {piece.start:,} to {piece.stop:,} cannot be read ({e.strerror or e})"
    if actual == piece.expected:
        return None
    return f"its bytes {piece.start:,} to {piece.stop:,} are not those that came"


def flaws_of(store: ModelStore, blob: Descriptor, *, before_read: Callable[[], None] | None = None) -> tuple[Flaw, ...]:
    """Read a whole blob from the disk; the pieces of it that are wrong. They are quarantined with it.

    The digest of the whole decides; the chunks only tell where it went wrong.
    """
    pieces = [*pieces_of(store.blobs, blob), Piece(blob.digest, blob.size, 0, blob.size, blob.digest)]
    found = [check(store.blobs, piece, before_read=before_read) for piece in pieces[:-1]]
    flaws = tuple(flaw for flaw in found if flaw is not None)
    if not flaws and len(pieces) > 2 and (flaw := check(store.blobs, pieces[-1], before_read=before_read)):
        flaws = (flaw,)
    if flaws:
        quarantine(store, flaws[0])
    return flaws


def quarantine(store: ModelStore, flaw: Flaw) -> None:
    """Have no model be opened that has this blob, until it is mended; without a file none is anyhow.

    Raises:
        StoreError: The store cannot be written.
    """
    log.error("%s is damaged: %s", store.blobs.path(flaw.piece.blob), flaw.problem)
    if store.blobs.has(flaw.piece.blob):
        store.quarantine(flaw.piece.blob, flaw.problem)


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """Where a round is: what came last."""

    blob: Digest
    start: int


class Scrubber:
    """Goes through all that the models of a store have, a piece at a time, round after round; it goes on where another
    process stopped. One thread uses it.

    Args:
        before_read: Runs before each MiB that is read, and may wait or raise to stop.
    """

    def __init__(
        self, store: ModelStore, *, before_read: Callable[[], None] = lambda: None, rng: random.Random | None = None
    ) -> None:
        self._store = store
        self._before_read = before_read
        self._rng = rng or random.Random()  # noqa: S311  # which pieces are looked at is no secret
        self._left: list[Piece] = []
        """Of the present round, the last first."""
        self._is_resumed = False
        self._num_unsaved = 0
        self.num_pieces = 0
        """Of a whole round."""
        self.checked_bytes = 0
        """Since the start of this process."""

    def sample(self, num_pieces: int) -> Iterator[Flaw]:
        """Check some pieces of all at random, and every document."""
        pieces = self._pieces()
        documents = [p for p in pieces if p.is_whole and p.blob_bytes <= CHUNK_BYTES]
        others = [p for p in pieces if p not in set(documents)]
        for piece in (*documents, *self._rng.sample(others, min(num_pieces, len(others)))):
            if flaw := self._check(piece):
                yield flaw

    def step(self) -> Flaw | None:
        """Check the next piece.

        Raises:
            StoreError: The store cannot be read.
        """
        if not self._left:
            self._begin_round()
        if not self._left:
            return None
        piece = self._left.pop()
        flaw = self._check(piece)
        self._num_unsaved += 1
        if self._num_unsaved >= _SAVE_EVERY or not self._left:
            self._save(piece)
        return flaw

    def _begin_round(self) -> None:
        pieces = self._pieces()
        self.num_pieces = len(pieces)
        last = None if self._is_resumed else self._saved()
        self._is_resumed = True
        left = [p for p in pieces if last is None or (p.blob, p.start) > (last.blob, last.start)]
        self._left = (left or pieces)[::-1]

    def _pieces(self) -> list[Piece]:
        known = self._store.quarantined()
        blobs = {part.digest: part for _, part in parts_of_all(self._store) if part.digest not in known}
        return sorted(piece for blob in blobs.values() for piece in pieces_of(self._store.blobs, blob))

    def _check(self, piece: Piece) -> Flaw | None:
        flaw = check(self._store.blobs, piece, before_read=self._before_read)
        self.checked_bytes += piece.stop - piece.start
        if flaw is None:
            if piece.is_whole and piece.blob_bytes > CHUNK_BYTES:
                self._store.blobs.make_chunks(piece.blob)
            return None
        if piece.blob not in {part.digest for _, part in parts_of_all(self._store)}:
            return None  # its model was removed or replaced meanwhile
        quarantine(self._store, flaw)
        return flaw

    def _saved(self) -> _State | None:
        try:
            with (self._store.root / STATE_NAME).open("rb") as file:
                return decode(file.read(_MAX_STATE_BYTES), _State, what=STATE_NAME)
        except (OSError, InvalidModelFile):
            return None

    def _save(self, piece: Piece) -> None:
        # Not synced: losing it costs some reading.
        state = msgspec.json.encode(_State(blob=piece.blob, start=piece.start), enc_hook=str)
        write_file(self._store.blobs.files, self._store.root / STATE_NAME, state, durable=False)
        self._num_unsaved = 0


def _packages(store: ModelStore) -> Iterator[tuple[str, Sequence[tuple[str, Descriptor]]]]:
    """Every model, and every version that only a slot has, with the blobs that it needs under their names in it."""
    named = [(str(ref), partial(store.parts, ref)) for ref in store.refs()]
    kept = [
        (slot.names.get(digest, name), partial(store.parts_of_version, digest))
        for name, slot in store.slots().items()
        for digest in slot.digests()
    ]
    for name, parts in (*named, *kept):
        try:
            yield name, parts()
        except (InvalidModelFile, StoreError) as e:
            log.debug("%s: %s", name, e)  # it was removed meanwhile, or is among the damaged ones anyhow


def parts_of_all(store: ModelStore) -> Iterator[tuple[str, Descriptor]]:
    """Every blob that the store's models need, each under its name in its package."""
    return itertools.chain.from_iterable(parts for _, parts in _packages(store))


def part_with(store: ModelStore, digest: Digest) -> Descriptor | None:
    """A blob as its models describe it; None where there are none any more."""
    return next((part for _, part in parts_of_all(store) if part.digest == digest), None)


def names_with(store: ModelStore, digest: Digest) -> Sequence[str]:
    """The models that have a blob."""
    found = (name for name, parts in _packages(store) if any(part.digest == digest for _, part in parts))
    return list(dict.fromkeys(found))
