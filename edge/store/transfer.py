"""What every fetch shares: progress, cancelling, room on the disk, and the protocol of a source."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge.errors import Cancelled, DigestMismatch, DiskFull

from .blobs import BlobStore, Partial, Staged
from .digest import Digest

RESERVE_BYTES = 32 << 20
"""Kept free for databases and logs when a download is admitted."""
CHECK_EVERY_BYTES = 32 << 20
"""How often what arrives looks for room, where its size is only said, or not even that."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is."""

    done_bytes: int
    total_bytes: int | None
    """None while the source has not told."""
    message: str


@dataclass(frozen=True, slots=True)
class Control:
    """How a fetch tells of its progress, and learns that it should stop."""

    progress: Callable[[Progress], None]
    cancelled: Callable[[], bool]
    work: str = "pull"

    def report(self, done_bytes: int, total_bytes: int | None, message: str) -> None:
        """Tell how far it is, and stop here if it was cancelled.

        Raises:
            Cancelled: Somebody asked for it.
        """
        self.check()
        self.progress(Progress(done_bytes, total_bytes, message))

    def check(self) -> None:
        """Stop here if the fetch was cancelled.

        Raises:
            Cancelled: Somebody asked for it.
        """
        if self.cancelled():
            raise Cancelled(
                f"The {self.work} was cancelled.", hint=f"What was done is kept; the same {self.work} goes on."
            )

    def pause(self, duration_s: float) -> None:
        """Wait, unless cancelled.

        Raises:
            Cancelled: Somebody asked for it.
        """
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _POLL_S))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source would give."""

    source: str
    """The exact source, revision and file filled in; fetching it again gives the same bytes."""
    file_name: str
    size_bytes: int | None = None
    digest: Digest | None = None
    """Where the source states it beforehand."""


class Fetcher(Protocol):
    """One place that models come from. Both methods block and may be called from any thread."""

    def look(self, control: Control) -> Offer:
        """Ask the source what it has, without fetching it.

        Raises:
            SourceUnavailable: It cannot be reached or does not have it.
            InvalidReference: The source has several files and the reference does not say which.
        """
        ...

    def fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        """Fetch the bytes into the partial, going on where it stands.

        Raises:
            SourceUnavailable: The source failed; what was fetched is kept.
            DigestMismatch: The bytes are not what the offer stated.
            DiskFull: There is no room.
            Cancelled: Somebody asked for it.
        """
        ...


def require_room(blobs: BlobStore, needed_bytes: int, partial: Partial | None = None) -> None:
    """Admit a download only if it will fit beside those that are under way.

    Args:
        partial: What grows by `needed_bytes`: the room is kept for it from now on.

    Raises:
        DiskFull: It will not fit.
    """
    if needed_bytes <= 0:
        return
    with blobs.room.admission():
        promised_bytes = blobs.room.promised_bytes(but=partial.path if partial else None)
        available_bytes = free_bytes(blobs) - promised_bytes
        if needed_bytes + RESERVE_BYTES > available_bytes:
            raise DiskFull(
                required_bytes=needed_bytes + RESERVE_BYTES,
                available_bytes=max(0, available_bytes),
                promised_bytes=promised_bytes,
            )
        if partial:
            partial.claim_room(needed_bytes)


def free_bytes(blobs: BlobStore) -> int:
    """Bytes free where the store is, or would be."""
    return blobs.files.free_bytes(_existing(blobs.root))


def expect(offer: Offer, digest: Digest | None) -> Offer:
    """The offer, with the digest that the caller insists on.

    Raises:
        DigestMismatch: The source states another.
    """
    if digest and offer.digest and digest != offer.digest:
        hint = "Check the digest you gave and the revision you named."
        raise DigestMismatch(f"{offer.source} offers other bytes", expected=digest, actual=offer.digest, hint=hint)
    return Offer(offer.source, offer.file_name, offer.size_bytes, offer.digest or digest)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
