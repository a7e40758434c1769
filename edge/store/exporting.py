"""Export: models of the store, and what is attached to them, into one bundle."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec

from edge.errors import DigestMismatch, DiskFull, InvalidModelFile, StoreError

from .blobs import SYNC_EVERY_BYTES
from .bundle import INDEX_NAME, LAYOUT_NAME, Bundle
from .digest import READ_BYTES, Digest, StreamingHash
from .files import FileOps, translated, try_lock
from .index import manifest_descriptor
from .manifest import ARTIFACT_TYPE, INDEX_TYPE, LAYOUT, REF_NAME, Descriptor, Index, Referrer, encode
from .models import ModelStore, StoredModel
from .transfer import Progress

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(tarfile.RECORDSIZE)
_FAT_MAX_BYTES = (4 << 30) - 1


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of the archive. Only blobs have a digest, which their bytes are held against."""

    name: str
    size_bytes: int
    read: Callable[[], Iterator[bytes]]
    digest: Digest | None = None

    @property
    def header(self) -> bytes:
        """The same for the same blob, so that a bundle tells nothing of when and where it was made."""
        entry = tarfile.TarInfo(self.name)
        entry.size = self.size_bytes
        return entry.tobuf(tarfile.PAX_FORMAT)

    @property
    def padding(self) -> bytes:
        return bytes(-self.size_bytes % _BLOCK)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What a bundle will hold, and how large it will be."""

    path: Path
    models: Sequence[StoredModel]
    images: Sequence[str]
    size_bytes: int
    free_bytes: int
    parts: Sequence[_Part]


def plan_export(store: ModelStore, refs: Sequence[str], path: Path, *, image: Bundle | None = None) -> ExportPlan:
    """What `export` would write. Nothing is written.

    Args:
        image: A container image that travels too, as an archive of its own; open until the export is done.

    Raises:
        ModelNotFound: There is none of such a name.
        InvalidModelFile, StoreError: One of them is damaged.
    """
    models = list({model.ref: model for model in map(store.get, refs)}.values())
    entries: list[Descriptor] = []
    blobs: dict[Digest, _Part] = {}
    for model in models:
        found = [(_described(store, model), model.manifest), *attached_to(store, model.digest)]
        entries += [descriptor for descriptor, _ in found]
        for descriptor, document in found:
            named = (descriptor, document.config, *document.layers)
            blobs |= {blob.digest: _of_store(store, blob) for blob in named}
    if image is not None:
        entries += image.index.manifests
        blobs |= {digest: _of_image(image, digest, size) for digest, size in image.blob_sizes().items()}
    index = encode(Index(schema_version=2, media_type=INDEX_TYPE, manifests=list(_unique(entries))))
    # What is small first: then the documents lie together, and a reader has them at once.
    ordered = sorted(blobs.values(), key=lambda part: (part.size_bytes, part.name))
    parts = [_of_bytes(LAYOUT_NAME, LAYOUT), _of_bytes(INDEX_NAME, index), *ordered]
    size_bytes = sum(len(part.header) + part.size_bytes + len(part.padding) for part in parts) + len(_END)
    images = [found.name or str(found.digest) for found in image.images] if image else []
    return ExportPlan(path, models, images, size_bytes, store.blobs.files.free_bytes(path.absolute().parent), parts)


def export(
    store: ModelStore, plan: ExportPlan, *, check: bool = True, progress: Callable[[Progress], None] = lambda _: None
) -> None:
    """Write the bundle: beside its name first, then under it. What an interrupted export wrote is not written again.

    Args:
        check: Read all of it back from the medium at the end.

    Raises:
        DiskFull: The medium has no room.
        DigestMismatch: A blob of the store is damaged.
        StoreError: The medium cannot be written, or gives back other bytes than it was given.
    """
    files, partial = store.blobs.files, plan.path.with_name(f"{plan.path.name}.partial")
    with ExitStack() as stack:
        for model in plan.models:
            stack.enter_context(store.lease(model.digest))
        file = stack.enter_context(files.open_append(partial))
        if not try_lock(file):
            raise StoreError(f"{plan.path} is being written by another process.", hint="Wait for it, or take another.")
        writer = _Writer(file, files)
        _check_room(plan, already_bytes=writer.had_bytes)
        try:
            _write(plan, writer, progress)
        except DiskFull as e:
            raise _no_room(plan.size_bytes, writer.at_bytes) from e
        if check:
            _read_back(partial, plan, progress)
        files.rename(partial, plan.path)
        files.sync_dir(plan.path.absolute().parent)


def _write(plan: ExportPlan, writer: _Writer, progress: Callable[[Progress], None]) -> None:
    for part in plan.parts:
        writer.write(part.header)
        hashed = StreamingHash()
        for data in part.read():
            writer.write(data)
            hashed.update(data)
            progress(Progress(writer.at_bytes, plan.size_bytes, f"writing {plan.path.name}"))
        if part.digest and hashed.digest() != part.digest:
            hint = "The store is damaged: edge verify tells which model, and how to mend it."
            raise DigestMismatch(part.name, expected=part.digest, actual=hashed.digest(), hint=hint)
        writer.write(part.padding)
    writer.write(_END)
    writer.finish()


def _read_back(partial: Path, plan: ExportPlan, progress: Callable[[Progress], None]) -> None:
    done_bytes = 0
    try:
        with Bundle(partial) as bundle:
            bundle.forget_cached()
            for digest in bundle.blob_sizes():
                hashed = StreamingHash()
                for data in bundle.open_blob_range(digest):
                    hashed.update(data)
                    done_bytes += len(data)
                    progress(Progress(done_bytes, plan.size_bytes, f"reading {plan.path.name} back"))
                if hashed.digest() != digest:
                    raise DigestMismatch(str(partial), expected=digest, actual=hashed.digest())
    except (DigestMismatch, InvalidModelFile) as e:
        hint = "If it says nothing of a bound, the medium is damaged or smaller than it says. Take another one."
        raise StoreError(f"{partial} does not read back as it was written: {e.message}", hint=hint) from e


class _Writer:
    """Writes a file that may hold its beginning already, from an attempt before."""

    def __init__(self, file: FileIO, files: FileOps) -> None:
        self._file = file
        self._files = files
        self.had_bytes = os.fstat(file.fileno()).st_size
        self.at_bytes = 0
        self._synced_bytes = 0

    def write(self, data: bytes) -> None:
        if self.at_bytes < self.had_bytes and not self._has(data):
            self._files.truncate(self._file, self.at_bytes)
            self.had_bytes = self.at_bytes
        if self.at_bytes >= self.had_bytes:
            self._files.write(self._file, data)
        self.at_bytes += len(data)
        # As it goes, else all of it would be waited for at the end of a slow medium.
        if self.at_bytes - self._synced_bytes >= SYNC_EVERY_BYTES:
            self._files.sync(self._file)
            self._synced_bytes = self.at_bytes

    def _has(self, data: bytes) -> bool:
        with translated(Path(str(self._file.name)), "Reading"):
            return os.pread(self._file.fileno(), len(data), self.at_bytes) == data

    def finish(self) -> None:
        if self.at_bytes < self.had_bytes:
            self._files.truncate(self._file, self.at_bytes)
        self._files.sync(self._file)


def _described(store: ModelStore, model: StoredModel) -> Descriptor:
    size_bytes = store.blobs.path(model.digest).stat().st_size
    found = manifest_descriptor(model.digest, size_bytes, ARTIFACT_TYPE)
    return msgspec.structs.replace(found, annotations={REF_NAME: str(model.ref)})


def attached_to(store: ModelStore, subject: Digest) -> Iterator[tuple[Descriptor, Referrer]]:
    """What is attached to a manifest, and to that in turn."""
    pending = [subject]
    while pending:
        for descriptor in store.referrers(pending.pop()):
            yield descriptor, store.read_referrer(descriptor)
            pending.append(descriptor.digest)


def _unique(entries: Sequence[Descriptor]) -> Iterator[Descriptor]:
    """What is attached to a model that has two names is listed once."""
    seen: set[tuple[Digest, str]] = set()
    for entry in entries:
        key = (entry.digest, entry.annotations.get(REF_NAME, ""))
        if key not in seen:
            seen.add(key)
            yield entry


def _of_bytes(name: str, data: bytes) -> _Part:
    return _Part(name, len(data), lambda: iter([data]))


def _of_store(store: ModelStore, blob: Descriptor) -> _Part:
    path = store.blobs.path(blob.digest)
    return _Part(f"blobs/sha256/{blob.digest.hex}", blob.size, lambda: _read(path), blob.digest)


def _of_image(image: Bundle, digest: Digest, size_bytes: int) -> _Part:
    return _Part(f"blobs/sha256/{digest.hex}", size_bytes, lambda: image.open_blob_range(digest), digest)


def _read(path: Path) -> Iterator[bytes]:
    with translated(path, "Reading"), path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            yield data


def _check_room(plan: ExportPlan, *, already_bytes: int) -> None:
    needed_bytes = plan.size_bytes - already_bytes
    if needed_bytes > plan.free_bytes:
        raise _no_room(needed_bytes, plan.free_bytes)
    if plan.size_bytes > _FAT_MAX_BYTES and _file_system(plan.path.absolute().parent) in ("vfat", "msdos"):
        raise StoreError(
            f"The bundle has {plan.size_bytes:,} bytes, and a FAT file system takes no file of 4 GiB or more.",
            hint="Format the medium as exFAT or ext4, or export fewer models into each file.",
        )


def _no_room(needed_bytes: int, free_bytes: int) -> DiskFull:
    error = DiskFull(required_bytes=needed_bytes, available_bytes=free_bytes)
    error.hint = "Make room on the medium, or export fewer models."
    return error


def _file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, after proc_pid_mountinfo(5); empty where it is not listed."""
    device = directory.stat().st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    numbers = f"{os.major(device)}:{os.minor(device)}"
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == numbers), "")
