"""Bytes known by their digest, and the files that are on their way to becoming such.

Layout: OCI image layout 1.0 (image-layout.md): ``blobs/sha256/<hex>``. Beside it, ``ingest/`` holds what is being
fetched: ``<key>.partial`` with the bytes, ``<key>.json`` with what a resumed fetch has to know about them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from edge.errors import DigestMismatch, StoreError

from .chunks import ChunkedHash, ChunkList, ChunkLists
from .digest import READ_BYTES, Digest, digest_bytes, hash_into, is_hex
from .disk import DiskReader
from .files import FileOps, translated, try_lock, wait_for_lock, write_file
from .room import Room, size_of, used_bytes

SYNC_EVERY_BYTES = 32 << 20
"""How much of a partial a power cut may cost."""
_LOCK_TIMEOUT_S = 3600.0
_MAX_NOTE_BYTES = 64 << 10


def boot_id() -> str:
    """Changes with each boot of the machine; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


class PartialNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known about a partial beyond its bytes."""

    source: str = ""
    """Where it comes from, for people."""
    validator: str = ""
    """The source's ETag or date; a resumed fetch makes sure that it still holds."""
    total_bytes: int | None = None
    digest: str = ""
    """Set once the bytes are complete and synced."""
    synced_bytes: int = 0
    """Bytes that outlive a power cut."""
    boot: str = ""


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete, synced file that waits to be published under its digest."""

    path: Path
    digest: Digest
    size_bytes: int


class Partial:
    """A file on its way to becoming a blob; one holder at a time, across processes. Closed by its holder.

    What an earlier holder wrote is still there: `size_bytes` tells how much.
    """

    def __init__(
        self,
        path: Path,
        files: FileOps,
        lists: ChunkLists,
        room: Room,
        *,
        before_poll: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._files = files
        self._lists = lists
        self._room = room
        self._claim: FileIO | None = None
        self._note_path = path.with_suffix(".json")
        # A lock of its own: the file itself is renamed away while its holder is not done with what lies beside it.
        self._lock_path = path.with_suffix(".lock")
        with ExitStack() as on_failure:
            self._lock = on_failure.enter_context(self._take_lock(before_poll))
            self._file = on_failure.enter_context(files.open_append(path))
            on_failure.pop_all()
        self._hash = ChunkedHash()
        self._is_hashed = False
        self.note = self._read_note()
        self._drop_unsynced()

    def _take_lock(self, before_poll: Callable[[], None] | None) -> FileIO:
        busy = f"{self.path.name} is being fetched by another process."
        while True:
            with ExitStack() as on_failure:
                file = on_failure.enter_context(self._files.open_append(self._lock_path))
                wait_for_lock(file, timeout_s=_LOCK_TIMEOUT_S, busy=busy, before_poll=before_poll)
                # Else its holder discarded it while we waited, and we have a file without a name.
                if _is_same_file(file.fileno(), self._lock_path):
                    on_failure.pop_all()
                    return file

    def _read_note(self) -> PartialNote:
        try:
            with self._note_path.open("rb") as file:
                return msgspec.json.decode(file.read(_MAX_NOTE_BYTES), type=PartialNote)
        except (FileNotFoundError, msgspec.MsgspecError):
            return PartialNote()

    def _drop_unsynced(self) -> None:
        # After a power cut a file may be longer than what reached the disk, the rest reading as zeros.
        if self.note.boot != boot_id() and self.size_bytes > self.note.synced_bytes:
            self._files.truncate(self._file, self.note.synced_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes there are."""
        return os.fstat(self._file.fileno()).st_size

    def claim_room(self, more_bytes: int) -> None:
        """Have room for so many bytes kept for it, until it is closed. Hold `Room.admission`."""
        self._claim = self._room.claim(self.path, used_bytes(self.path) + more_bytes, self._claim)

    def remember(self, *, source: str, validator: str, total_bytes: int | None) -> None:
        """Keep for a resumed fetch what the source said about the file."""
        self._write_note(PartialNote(source=source, validator=validator, total_bytes=total_bytes))

    def _write_note(self, note: PartialNote) -> None:
        self.note = msgspec.structs.replace(note, boot=boot_id())
        # Not synced: a lost note costs a new fetch, never a wrong one.
        write_file(self._files, self._note_path, msgspec.json.encode(self.note), durable=False)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; every 32 MiB they are synced.

        Raises:
            DiskFull: There is no room for them.
        """
        self._hash_what_is_there()
        self._files.write(self._file, data)
        self._hash.update(data)
        if self._hash.num_bytes - self.note.synced_bytes >= SYNC_EVERY_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._files.sync(self._file)
        self._write_note(msgspec.structs.replace(self.note, synced_bytes=self.size_bytes))

    def _hash_what_is_there(self) -> None:
        if not self._is_hashed:
            self._hash = hash_into(ChunkedHash(), self.path)
            self._is_hashed = True

    def restart(self) -> None:
        """Forget every byte."""
        self._files.truncate(self._file, 0)
        self._hash = ChunkedHash()
        self._is_hashed = True
        self.note = PartialNote()

    def complete(self) -> Staged:
        """All bytes are there: sync them and give their digest. The partial stays until it is published."""
        self._hash_what_is_there()
        self._files.sync(self._file)
        digest = self._hash.digest()
        self._lists.put(digest, self._hash.chunks())
        note = msgspec.structs.replace(self.note, digest=str(digest), synced_bytes=self.size_bytes)
        self._write_note(note)
        return Staged(self.path, digest, self._hash.num_bytes)

    @property
    def folder(self) -> Path:
        """Where its holder may keep scratch files; it need not exist, and goes when the partial is discarded."""
        return self.path.with_suffix(".d")

    @property
    def published(self) -> Digest | None:
        """What its bytes were published as, when the holder died right after that; else None."""
        return Digest(self.note.digest) if self.note.digest and not self.size_bytes else None

    def discard(self) -> None:
        """Remove bytes, note and folder: after publishing, or when the bytes turned out wrong. Close it then."""
        self._end_claim()
        self._files.remove_tree(self.folder)
        self._files.remove(self._note_path)
        self._files.remove(self.path)
        self._files.remove(self._lock_path)

    def close(self) -> None:
        """Let go of it; the bytes stay for a resumed fetch. Closing twice is fine."""
        try:
            self._end_claim()
        finally:
            self._file.close()
            self._lock.close()

    def _end_claim(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None
            self._files.remove(self.path.with_suffix(".room"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def key_of(digest: Digest) -> str:
    """Of a blob's partial. Where the bytes come from does not matter: what one source began another one can end."""
    return f"blob {digest}"


class BlobStore:
    """The blobs of one layout directory. Safe to use from any number of threads and processes."""

    def __init__(self, root: Path, *, files: FileOps | None = None) -> None:
        self.root = root
        self.files = files or FileOps()
        self.blobs_dir = root / "blobs" / "sha256"
        self.ingest_dir = root / "ingest"
        self.room = Room(root, self.ingest_dir, self.files)
        self._lists = ChunkLists(root / "chunks", self.ingest_dir, self.files)

    def has_directories(self) -> bool:
        """Whether `create` has nothing to do."""
        return self.blobs_dir.is_dir() and self.ingest_dir.is_dir()

    def create(self) -> None:
        """Make the directories; existing ones are fine."""
        for directory in (self.blobs_dir, self.ingest_dir):
            self.files.make_dir(directory)
        for directory in (self.root / "blobs", self.root, self.root.parent):
            self.files.sync_dir(directory)

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return self.blobs_dir / digest.hex

    def has(self, digest: Digest) -> bool:
        """Whether the blob is there. Its bytes were right when it came; `actual_digest` looks again."""
        return self.path(digest).is_file()

    def actual_digest(self, digest: Digest, *, before_read: Callable[[], None] | None = None) -> Digest | None:
        """The digest of the bytes that stand under `digest` on the disk now, whatever memory has of them; None where
        the blob is absent. `before_read` runs before each MiB, and may raise to stop it.

        Raises:
            StoreError: The disk refuses to read it.
        """
        try:
            with DiskReader(self.path(digest)) as disk:
                return disk.digest(0, disk.size_bytes, before_read=before_read)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError(f"Reading {self.path(digest)} failed: {e.strerror or e}.") from e

    def has_sound(self, digest: Digest) -> bool:
        """Whether the blob is there and its bytes are right now."""
        return self.actual_digest(digest) == digest

    def chunks(self, digest: Digest) -> ChunkList | None:
        """The digests of a blob's pieces; None where they are not known, or for a blob of one piece."""
        return self._lists.get(digest)

    def make_chunks(self, digest: Digest, *, before_chunk: Callable[[], None] | None = None) -> ChunkList:
        """Read the blob, and keep the digests of its pieces; `before_chunk` may raise to stop it.

        Raises:
            DigestMismatch: Its bytes are not right as a whole; nothing is kept.
            StoreError: It is missing, or cannot be read.
        """
        with translated(self.path(digest), "Reading"):
            hashed = hash_into(ChunkedHash(), self.path(digest), before_chunk=before_chunk)
        if hashed.digest() != digest:
            raise DigestMismatch(f"The blob {self.path(digest)}", expected=digest, actual=hashed.digest())
        self._lists.put(digest, hashed.chunks())
        return hashed.chunks()

    def hash_in_place(self, path: Path, *, before_chunk: Callable[[], None] | None = None) -> Staged:
        """Hash a file where it lies, and keep the digests of its pieces.

        Raises:
            StoreError: It cannot be read.
        """
        with translated(path, "Reading"):
            hashed = hash_into(ChunkedHash(), path, before_chunk=before_chunk)
        self._lists.put(hashed.digest(), hashed.chunks())
        return Staged(path, hashed.digest(), hashed.num_bytes)

    def forget_chunks(self) -> None:
        """Remove the lists of blobs that are not there. Hold the store's lock."""
        for digest in self._lists.blobs():
            if not self.has(digest):
                self._lists.remove(digest)

    def digests(self) -> Iterator[Digest]:
        """Every blob there is, in no order; files of other names are passed over."""
        if self.blobs_dir.is_dir():
            for entry in self.blobs_dir.iterdir():
                if is_hex(entry.name):
                    yield Digest(f"sha256:{entry.name}")

    def ingest(self, key: str, *, before_poll: Callable[[], None] | None = None) -> Partial:
        """Open the partial for `key` (any text that names the source and version), resuming what is there.

        Waits while another process holds it; `before_poll` runs meanwhile and may raise to give up.

        Raises:
            StoreError: The directory cannot be written, or the other process kept it for an hour.
        """
        self.files.make_dir(self.ingest_dir)
        return Partial(self.partial_path(key), self.files, self._lists, self.room, before_poll=before_poll)

    def left_bytes(self, digest: Digest, size_bytes: int) -> int:
        """What is still to come of a blob of this size, a part of which may have been fetched."""
        return max(0, size_bytes - size_of(self.partial_path(key_of(digest))))

    def partial_path(self, key: str) -> Path:
        """Where the partial for `key` is, or would be."""
        return self.ingest_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.partial"

    def copy_in(self, source: Path, partial: Partial, *, before_chunk: Callable[[], None] | None = None) -> Staged:
        """Copy a file's bytes into a partial, from the start.

        Raises:
            StoreError: The file cannot be read, or the disk is full.
        """
        partial.restart()
        with translated(source, "Reading"), source.open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                if before_chunk:
                    before_chunk()
                partial.write(data)
        return partial.complete()

    def publish(self, staged: Sequence[Staged]) -> None:
        """Give complete, synced files of the same file system their digests' names. Hold the store's lock.

        Raises:
            StoreError: A file has gone, or the system refuses.
        """
        for item in staged:
            self.files.rename(item.path, self.path(item.digest))
        self.files.sync_dir(self.blobs_dir)

    def put(self, data: bytes, *, is_suspect: bool = False) -> Digest:
        """Store a small document, also anew where what is there is suspect. Hold the store's lock."""
        digest = digest_bytes(data)
        target = self.path(digest)
        if is_suspect or not (target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data):
            temporary = self.ingest_dir / f"{digest.hex[:32]}.document"
            with self.files.open_append(temporary) as file:
                self.files.truncate(file, 0)
                self.files.write(file, data)
                self.files.sync(file)
            self.publish([Staged(temporary, digest, len(data))])
        return digest

    def remove(self, digest: Digest) -> int:
        """Remove a blob and give the bytes it had; an absent one is 0. Hold the store's lock."""
        try:
            size_bytes = self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0
        self.files.remove(self.path(digest))
        return size_bytes

    def remove_stale_partials(self, *, now: float, min_age_s: float) -> int:
        """Remove what nobody is fetching and nobody touched for `min_age_s`; give the bytes freed.

        The clock decides only how long a fetch can be resumed: a wrong one costs a new fetch.
        """
        freed = 0
        for name, paths in self._ingesting().items():
            if now - max(_mtime(path) for path in paths) >= min_age_s:
                freed += self._remove_if_free(self.ingest_dir / f"{name}.lock", paths)
        return freed

    def _ingesting(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(self.ingest_dir.glob("*")) if self.ingest_dir.is_dir() else ():
            found.setdefault(path.name.partition(".")[0], []).append(path)
        return found

    def _remove_if_free(self, lock: Path, paths: Sequence[Path]) -> int:
        with self.files.open_append(lock) as file:
            if not try_lock(file) or not _is_same_file(file.fileno(), lock):
                return 0
            freed = sum(size_of(path) for path in paths)
            for path in (*(path for path in paths if path != lock), lock):
                if path.is_dir():
                    self.files.remove_tree(path)
                else:
                    self.files.remove(path)
            return freed


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # published meanwhile
