"""The model store: a reference names a manifest, the manifest names blobs.

The directory is an OCI image layout, so any OCI tool reads it. ``index.json`` is the one list of references: it is
replaced whole under the lock and read without one, and it is written only after every blob that it leads to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from edge.errors import (
    DigestMismatch,
    InvalidModelFile,
    InvalidReference,
    ModelNotFound,
    Quarantined,
    StoreError,
    UnsupportedFormat,
)

from .blobs import BlobStore, Staged
from .details import ModelDetails, annotations_of, config_of
from .digest import Digest, digest_bytes, is_hex
from .files import FileOps, translated, wait_for_lock, write_file
from .index import ADDED, layer_of, manifest_descriptor, models_of, with_entry, with_referrer
from .leases import Leases
from .manifest import (
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    EMPTY,
    EMPTY_TYPE,
    INDEX_TYPE,
    LAYOUT,
    MANIFEST_TYPE,
    MAX_DOCUMENT_BYTES,
    REF_NAME,
    SUBJECT,
    Descriptor,
    Index,
    Manifest,
    ModelConfig,
    ModelRef,
    Referrer,
    check_file_name,
    decode,
    encode,
    subject_of,
)
from .named import link_named
from .quarantine import QUARANTINE_NAME, read_marks, write_marks
from .reachable import Reachable, Root, reachable
from .room import give_up_reserve, take_reserve
from .scan import Part, scan_package
from .seed import take_over
from .side_files import read_document
from .slots import SLOTS_NAME, ChangeSlots, Slot, read_slots, write_slots
from .stored import Collected, DamagedModel, FileCheck, PackageFile, StoredFile, StoredModel

__all__ = ["Collected", "DamagedModel", "FileCheck", "ModelStore", "PackageFile", "StoredFile", "StoredModel"]

PARTIAL_KEPT_S = 7 * 86400.0
PINS_NAME = "pins.json"
"""Beside the index: the names of pinned models, as a JSON list."""
DRAFTS_NAME = "drafts.json"
"""Beside the index too: for models by name, the name of the draft model that the operator chose, empty for none."""
log = logging.getLogger("edge.store")

_LOCK_TIMEOUT_S = 60.0
_MEND = "Pull the model again; edge verify shows all that is amiss."

# Inside a class that has a method `list`, the word means the method.
_Models = list[StoredModel]
_Checks = list[FileCheck]
_Damage = list[DamagedModel]


class ModelStore:
    """The models of one directory. Any number of threads and processes may use it at once.

    Args:
        root: The layout's directory; created when something is first written.
        seed: A layout from which a store that was never written to is filled when it is first used.
        clock: Gives Unix time, for what `created` says.
    """

    def __init__(
        self,
        root: Path,
        *,
        seed: Path | None = None,
        files: FileOps | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.blobs = BlobStore(root, files=files)
        self._files = self.blobs.files
        self._leases = Leases(root / "leases", self._files)
        self._seed = seed
        self._clock = clock

    def list(self) -> _Models:
        """The models that are there whole, by name. See `damaged` for the others."""
        return [found for found in self._scan() if isinstance(found, StoredModel)]

    def damaged(self) -> _Damage:
        """References whose manifest or files are missing or of the wrong size."""
        return [found for found in self._scan() if isinstance(found, DamagedModel)]

    def _scan(self) -> Iterator[StoredModel | DamagedModel]:
        entries = self._entries()
        for ref in sorted(entries):
            if found := self._look(ref, entries[ref]):
                yield found

    def _look(self, ref: ModelRef, entry: Descriptor) -> StoredModel | DamagedModel | None:
        """Open a model. One that was replaced or removed while we looked is looked at as it is now, or None."""
        while True:
            try:
                return self._open(ref, entry)
            except (InvalidModelFile, StoreError) as e:
                now = self._entries().get(ref)
                if now is None or now == entry:
                    return now and DamagedModel(ref, e.message, e)
                entry = now

    def get(self, ref: str | ModelRef) -> StoredModel:
        """One model. A name without a tag also finds the only model of that name.

        Raises:
            ModelNotFound: There is none of that name.
            InvalidReference: It is not a model's name.
            InvalidModelFile: Its manifest is damaged.
            StoreError: One of its files is missing or of the wrong size.
        """
        entries = self._entries()
        resolved = self._resolve(ref, entries)
        match self._look(resolved, entries[resolved]):
            case StoredModel() as found:
                return found
            case DamagedModel(error=error):
                raise error
            case None:
                raise ModelNotFound(str(ref), known=[str(known) for known in self.refs()])

    def version(self, digest: Digest, name: str) -> StoredModel:
        """One version of a model, by the digest of its manifest and the name that it had: that may lead to another one
        by now, or nowhere.

        Raises:
            InvalidModelFile: Its manifest is damaged.
            StoreError: It, or one of its files, is missing or of the wrong size.
        """
        return self._open(ModelRef.parse(name), self._version_entry(digest))

    def _version_entry(self, digest: Digest) -> Descriptor:
        path = self.blobs.path(digest)
        with translated(path, "Looking at"):
            size_bytes = path.stat().st_size
        return Descriptor(media_type=MANIFEST_TYPE, digest=digest, size=size_bytes)

    def refs(self) -> Sequence[ModelRef]:
        """Every name there is, of whole models and damaged ones."""
        return sorted(self._entries())

    def resolve(self, ref: str | ModelRef) -> ModelRef:
        """The full name that is meant.

        Raises:
            ModelNotFound: There is none of that name.
            InvalidReference: It is not a model's name.
        """
        return self._resolve(ref, self._entries())

    def _resolve(self, ref: str | ModelRef, entries: dict[ModelRef, Descriptor]) -> ModelRef:
        wanted = ModelRef.parse(ref) if isinstance(ref, str) else ref
        if wanted in entries:
            return wanted
        same_name = [known for known in entries if known.name == wanted.name]
        if isinstance(ref, str) and ":" not in ref and len(same_name) == 1:
            return same_name[0]
        raise _not_found(str(ref), [str(known) for known in sorted(same_name)], [str(known) for known in entries])

    def _open(self, ref: ModelRef, entry: Descriptor) -> StoredModel:
        manifest = Manifest.parse(self._document(entry), what=f"The manifest of {ref}")
        self._refuse_quarantined(entry, manifest.config, *manifest.layers)
        config = ModelConfig.parse(self._document(manifest.config), what=f"The config of {ref}")
        files = tuple(self._stored_file(layer) for layer in manifest.layers)
        try:
            created = float(entry.annotations.get(ADDED, "0"))
        except ValueError:
            created = 0.0
        return StoredModel(ref, entry.digest, manifest, config, files, created)

    def _document(self, descriptor: Descriptor) -> bytes:
        self._check_size(descriptor)
        return self._checked_document(descriptor.digest)

    def _checked_document(self, digest: Digest) -> bytes:
        data = read_document(self.blobs.path(digest))
        if digest_bytes(data) != digest:
            raise InvalidModelFile(str(self.blobs.path(digest)), "its bytes are not those of its digest")
        return data

    def _refuse_quarantined(self, *descriptors: Descriptor) -> None:
        marks = self.quarantined()
        for found in descriptors:
            if reason := marks.get(found.digest):
                raise Quarantined(str(self.blobs.path(found.digest)), reason)

    def _check_size(self, descriptor: Descriptor) -> None:
        path = self.blobs.path(descriptor.digest)
        with translated(path, "Looking at"):
            size_bytes = path.stat().st_size if path.exists() else None
        if size_bytes is None:
            raise StoreError(f"{path} is missing.", hint=_MEND)
        if size_bytes != descriptor.size:
            raise StoreError(f"{path} has {size_bytes:,} bytes instead of {descriptor.size:,}.", hint=_MEND)

    def _stored_file(self, layer: Descriptor) -> StoredFile:
        self._check_size(layer)
        path = self.blobs.path(layer.digest).absolute()
        return StoredFile(layer.filepath or layer.digest.hex, path, layer.digest, layer.size, layer.media_type)

    def add(self, ref: str | ModelRef, files: Sequence[PackageFile], details: ModelDetails) -> StoredModel:
        """Package files as a model. What had the name before loses it; its blobs go with the next `collect`.

        Nothing is visible before everything is on the disk. Files with `move` are gone afterwards.

        Raises:
            InvalidReference: It is not a model's name.
            InvalidModelFile: A file's name is not allowed, two are the same, or `scan_package` refuses one.
            UnsupportedFormat: As `scan_package`.
            DiskFull: There is no room for the copies.
            StoreError: A file cannot be read, or the store not written.
        """
        ref = ModelRef.parse(ref) if isinstance(ref, str) else ref
        _check_names(files, what=str(ref))
        self._prepare()
        with ExitStack() as stack:
            staged = [self._stage(file, stack) for file in files]
            layers = [layer_of(file, item) for file, item in zip(files, staged, strict=True)]
            _scan(layers, [item.path for item in staged], annotations_of(details))
            with self._lock():
                self._publish(staged)
                self._set_entry(ref, self._put_manifest(ref, layers, details))
        for file, item in zip(files, staged, strict=True):
            if file.move and item.path != file.path:
                self._files.remove(file.path)  # it had to be copied; the others were renamed away
        return self.get(ref)

    def _stage(self, file: PackageFile, stack: ExitStack) -> Staged:
        with translated(file.path, "Reading"):
            status = file.path.stat()
        if file.digest and file.path == self.blobs.path(file.digest):
            return Staged(file.path, file.digest, status.st_size)
        if file.move and status.st_dev == self.blobs.ingest_dir.stat().st_dev:
            return self._stage_in_place(file)
        partial = stack.enter_context(self.blobs.ingest(f"copy {file.path.absolute()} as {file.name}"))
        stack.callback(partial.discard)
        return self.blobs.copy_in(file.path, partial)

    def _stage_in_place(self, file: PackageFile) -> Staged:
        with self._files.open_append(file.path) as opened:
            self._files.sync(opened)
        if file.digest:
            return Staged(file.path, file.digest, file.path.stat().st_size)
        return self.blobs.hash_in_place(file.path)

    def _publish(self, staged: Sequence[Staged]) -> None:
        fresh = [item for item in staged if item.path != self.blobs.path(item.digest)]
        self.blobs.publish(fresh)
        self._mark({item.digest: "" for item in fresh})
        for item in staged:
            if not self.blobs.has(item.digest):
                raise StoreError(f"{item.path} was removed by another process.", hint="Try again.")

    def _put_manifest(self, ref: ModelRef, layers: Sequence[Descriptor], details: ModelDetails) -> Descriptor:
        config = config_of(ref, details, [layer.digest for layer in layers]).encode()
        _check_length(config, what=f"The config of {ref}")
        manifest = Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(media_type=CONFIG_TYPE, digest=digest_bytes(config), size=len(config)),
            layers=[*layers],
            annotations=annotations_of(details),
        ).encode()
        _check_length(manifest, what=f"The manifest of {ref}")
        self._put(config)
        return manifest_descriptor(self._put(manifest), len(manifest), ARTIFACT_TYPE)

    def _put(self, data: bytes) -> Digest:
        digest = digest_bytes(data)
        is_suspect = digest in self.quarantined()
        self.blobs.put(data, is_suspect=is_suspect)
        self._mark({digest: ""})
        return digest

    def keep(self, staged: Staged) -> None:
        """Keep bytes under their digest for a model that is still to be added; the next `collect` takes those of which
        none was made.

        Raises:
            StoreError: The store cannot be written.
        """
        self._prepare()
        with self._lock():
            self._publish([staged])

    def keep_manifest(self, data: bytes) -> Digest:
        """Keep a manifest that has no name yet, exactly as it came. Lease its digest before, and `collect` leaves it
        and all that it leads to alone, also what comes later.

        Raises:
            StoreError: The store cannot be written.
        """
        self._prepare()
        with self._lock():
            return self._put(data)

    def add_manifest(self, ref: str | ModelRef, data: bytes) -> StoredModel:
        """Give a name to a manifest exactly as it came; its blobs are here. What had the name before loses it.

        Raises:
            InvalidReference: It is not a model's name.
            InvalidModelFile: It is no manifest of a model, its config is none, or `scan_package` refuses a file.
            UnsupportedFormat: As `scan_package`.
            StoreError: One of its blobs is not here, or the store cannot be written.
        """
        ref = ModelRef.parse(ref) if isinstance(ref, str) else ref
        manifest = Manifest.parse(data, what=f"The manifest of {ref}")
        self._prepare()
        self._require_blobs(manifest, what=f"The manifest of {ref}")
        _scan(manifest.layers, [self.blobs.path(layer.digest) for layer in manifest.layers], manifest.annotations)
        with self._lock():
            self._require_blobs(manifest, what=f"The manifest of {ref}")
            ModelConfig.parse(self._document(manifest.config), what=f"The config of {ref}")
            self._set_entry(ref, manifest_descriptor(self._put(data), len(data), ARTIFACT_TYPE))
        return self.get(ref)

    def blob_needs(self, manifest: Manifest | Referrer) -> Sequence[Descriptor]:
        """The blobs of a manifest that are not here, have the wrong size or are quarantined; each once."""
        marks = self.quarantined()
        needs = {blob.digest: blob for blob in (manifest.config, *manifest.layers) if not self._has(blob, marks)}
        return [*needs.values()]

    def _has(self, blob: Descriptor, marks: Mapping[Digest, str]) -> bool:
        try:
            return self.blobs.path(blob.digest).stat().st_size == blob.size and blob.digest not in marks
        except FileNotFoundError:
            return False

    def _require_blobs(self, manifest: Manifest | Referrer, *, what: str) -> None:
        if needs := self.blob_needs(manifest):
            raise StoreError(
                f"{what} names {len(needs)} blobs that are not in the store, as {needs[0].digest}.",
                hint="They were not fetched, or another process collected them; pull it again.",
            )

    def has_sound(self, digest: Digest) -> bool:
        """Whether the blob is here, its bytes are right now, and nobody found them wrong on the disk."""
        return digest not in self.quarantined() and self.blobs.has_sound(digest)

    def get_version(self, digest: Digest, ref: ModelRef) -> StoredModel:
        """The model of a manifest's digest, whether or not it has a name here; `ref` is what it is called.

        Raises:
            InvalidModelFile: Its manifest is damaged.
            StoreError: It is not here, or one of its files is missing or of the wrong size.
        """
        entries = [entry for entry in self._entries().values() if entry.digest == digest]
        return self._open(ref, entries[0] if entries else self._described(digest))

    def _described(self, digest: Digest) -> Descriptor:
        data = self._checked_document(digest)
        return manifest_descriptor(digest, len(data), decode(data, _Kind, what=digest).artifact_type)

    def attach(
        self,
        subject: Digest,
        artifact_type: str,
        files: Sequence[PackageFile],
        annotations: Mapping[str, str] | None = None,
    ) -> Descriptor:
        """Package files as something about a manifest, such as its signature (OCI 1.1, "referrers"). It goes when its
        subject goes.

        Raises:
            InvalidModelFile: A file's name is not allowed, or two are the same.
            DiskFull: There is no room for the copies.
            StoreError: The subject is not here, a file cannot be read, or the store not written.
        """
        _check_names(files, what=artifact_type)
        self._prepare()
        with ExitStack() as stack:
            staged = [self._stage(file, stack) for file in files]
            with self._lock():
                self._publish(staged)
                referrer = Referrer(
                    schema_version=2,
                    media_type=MANIFEST_TYPE,
                    artifact_type=artifact_type,
                    config=Descriptor(media_type=EMPTY_TYPE, digest=self._put(EMPTY), size=len(EMPTY)),
                    layers=[layer_of(file, item) for file, item in zip(files, staged, strict=True)],
                    subject=self._described(subject),
                    annotations=dict(annotations or {}),
                )
                return self._set_referrer(referrer, referrer.encode())

    def add_referrer(self, data: bytes) -> Descriptor:
        """Attach a manifest exactly as it came; its subject and its blobs are here.

        Raises:
            InvalidModelFile: It is no manifest, or has no subject.
            StoreError: Its subject or one of its blobs is not here, or the store cannot be written.
        """
        referrer = Referrer.parse(data)
        self._prepare()
        with self._lock():
            self._checked_document(referrer.subject.digest)
            self._require_blobs(referrer, what=f"A manifest attached to {referrer.subject.digest}")
            return self._set_referrer(referrer, data)

    def _set_referrer(self, referrer: Referrer, data: bytes) -> Descriptor:
        found = manifest_descriptor(self._put(data), len(data), referrer.kind)
        self._write_index(with_referrer(self._read_index(), found, referrer.subject.digest))
        return found

    def referrers(self, subject: Digest, artifact_type: str = "") -> Sequence[Descriptor]:
        """What is attached to a manifest, of one artifact type or of all; damaged ones are passed over."""
        if self._is_unseeded():
            self._prepare()
        found: list[Descriptor] = []
        for entry in self._read_index().manifests:
            if REF_NAME in entry.annotations or (artifact_type and entry.artifact_type not in (None, artifact_type)):
                continue
            try:
                referrer = self._referrer_of(subject, entry)
            except (InvalidModelFile, InvalidReference, StoreError) as e:
                log.warning("something attached to %s is passed over: %s", subject, e.message)
                continue
            if referrer and artifact_type in ("", referrer.kind):
                found.append(manifest_descriptor(entry.digest, entry.size, referrer.kind))
        return found

    def _referrer_of(self, subject: Digest, entry: Descriptor) -> Referrer | None:
        if entry.annotations.get(SUBJECT, subject) != subject:
            return None
        data = self._document(entry)
        is_about_it = subject_of(data, what=f"The manifest {entry.digest}") == subject
        return Referrer.parse(data) if is_about_it else None

    def read_referrer(self, descriptor: Descriptor) -> Referrer:
        """The manifest of what is attached; its layers' bytes are at `blobs.path(layer.digest)`.

        Raises:
            InvalidModelFile: It is damaged.
            StoreError: It, or one of its files, is missing, of the wrong size or quarantined.
        """
        referrer = Referrer.parse(self._document(descriptor))
        self._refuse_quarantined(descriptor, referrer.config, *referrer.layers)
        for blob in (referrer.config, *referrer.layers):
            self._check_size(blob)
        return referrer

    @contextmanager
    def lease(self, *digests: Digest) -> Generator[None]:
        """Keep manifests, and all that they lead to, from `collect` while the block runs, whatever becomes of their
        names; also across processes. What is not here yet is kept once it comes.

        Raises:
            StoreError: The store cannot be written.
        """
        self._prepare()
        with ExitStack() as held:
            with self._lock():  # else a collection under way could take what it did not see leased
                self._leases.take(digests, held)
            yield

    def leased(self) -> frozenset[Digest]:
        """What somebody holds a lease of, in any process.

        Raises:
            StoreError: The store cannot be written.
        """
        self._prepare()
        with self._lock():
            return self._leases.held()

    def slots(self) -> Mapping[str, Slot]:
        """The slots, by their names.

        Raises:
            StoreError: Their list is damaged.
        """
        return read_slots(self.root)

    def write_slots(self, change: ChangeSlots) -> Mapping[str, Slot]:
        """Replace the slots by what `change` makes of them, under the lock; gives what they are now.

        Raises:
            InvalidModelFile: The manifest of a version that comes in is damaged.
            StoreError: It is not here, or the list is damaged or cannot be written.
        """
        self._prepare()
        with self._lock():
            before = self.slots()
            after = change(before)
            known = {digest for slot in before.values() for digest in slot.digests()}
            for digest in {digest for slot in after.values() for digest in slot.digests()} - known:
                self._checked_document(digest)
            if after != before:
                write_slots(self.root, after, self._files)
        return after

    def quarantined(self) -> Mapping[Digest, str]:
        """Blobs that proved damaged, and why: models that have one cannot be opened."""
        return read_marks(self.root)

    def quarantine(self, digest: Digest, reason: str) -> None:
        """Mark a blob as damaged, until it comes anew or `release` says that it is sound."""
        self._prepare()
        with self._lock():
            self._mark({digest: reason})

    def release(self, digest: Digest) -> None:
        """Take a blob's mark away; one without a mark is fine."""
        self._prepare()
        with self._lock():
            self._mark({digest: ""})

    def _mark(self, reasons: Mapping[Digest, str]) -> None:
        before = self.quarantined()
        after = {digest: reason for digest, reason in {**before, **reasons}.items() if reason}
        if after != before:
            write_marks(self.root, after, self._files)

    def named_directory(self, model: StoredModel) -> Path:
        """A directory with the model's files under their own names, for formats that find files by name. It is there
        for as long as the model is.

        Raises:
            StoreError: The file system has no hard links, or a file has gone.
        """
        self._prepare()
        directory = self.root / "named" / model.digest.hex
        with self._lock():
            files = [(file.name, self.blobs.path(file.digest), file.digest) for file in model.files]
            return link_named(directory, files, self._files).absolute()

    def generation(self) -> object:
        """Changes with every change of names, slots and quarantine: each list is replaced whole."""
        return tuple(_identity(self.root / name) for name in ("index.json", SLOTS_NAME, QUARANTINE_NAME))

    def copy(self, source: str | ModelRef, target: str | ModelRef) -> StoredModel:
        """Give a model a second name. What had the name before loses it.

        Raises:
            ModelNotFound: There is none of the first name.
            InvalidReference: The second is not a model's name.
        """
        ref = ModelRef.parse(target) if isinstance(target, str) else target
        self._prepare()
        with self._lock():
            entries = models_of(self._read_index())
            self._set_entry(ref, entries[self._resolve(source, entries)])
        return self.get(ref)

    def remove(self, ref: str | ModelRef) -> ModelRef:
        """Take the reference away and give the one that was meant. Its blobs go with the next `collect`.

        Raises:
            ModelNotFound: There is none of that name.
        """
        self._prepare()
        with self._lock():
            found = self._resolve(ref, models_of(self._read_index()))
            give_up_reserve(self.root, self._files)
            self._set_entry(found, None)
            self._write_pin(found, is_pinned=False)
            self._write_draft(found, None)
        return found

    def pins(self) -> frozenset[str]:
        """Names of the models that stay in memory once they are there. A damaged list counts as an empty one."""
        path = self.root / PINS_NAME
        if not path.exists():
            return frozenset()
        try:
            return frozenset(decode(read_document(path), list[str], what=PINS_NAME))
        except (InvalidModelFile, StoreError) as e:
            log.warning("no model counts as pinned: %s", e)
            return frozenset()

    def pin(self, ref: str | ModelRef, *, is_pinned: bool = True) -> ModelRef:
        """Keep a model in memory once it is there, or no longer; gives the one that was meant.

        Raises:
            ModelNotFound: There is none of that name.
        """
        self._prepare()
        with self._lock():
            found = self._resolve(ref, models_of(self._read_index()))
            self._write_pin(found, is_pinned=is_pinned)
        return found

    def drafts(self) -> dict[str, str]:
        """The draft models that the operator chose, by the model they guess for; empty where none shall. A damaged list
        counts as an empty one."""
        path = self.root / DRAFTS_NAME
        if not path.exists():
            return {}
        try:
            return decode(read_document(path), dict[str, str], what=DRAFTS_NAME)
        except (InvalidModelFile, StoreError) as e:
            log.warning("no draft model counts as chosen: %s", e)
            return {}

    def set_draft(self, ref: str | ModelRef, draft: str | ModelRef | None) -> ModelRef:
        """Have a model of the store guess for another; "" for none, None for what the package says. Gives the model.

        Raises:
            ModelNotFound: There is none of that name.
            UnsupportedFormat: One of them makes no text.
        """
        self._prepare()
        model, guesser = self.get(ref), self.get(draft) if draft else None
        for one in (model, guesser):
            if one is not None and one.kind != "text":
                raise UnsupportedFormat(f"'{one.ref}' makes no text.", hint="Models that do: edge list.")
        with self._lock():
            self._write_draft(model.ref, str(guesser.ref) if guesser else draft and str(draft))
        return model.ref

    def _write_draft(self, ref: ModelRef, draft: str | None) -> None:
        before = self.drafts()
        after = {name: chosen for name, chosen in before.items() if name != str(ref)}
        if draft is not None:
            after[str(ref)] = draft
        if after != before:
            write_file(self._files, self.root / DRAFTS_NAME, msgspec.json.encode(dict(sorted(after.items()))))

    def _write_pin(self, ref: ModelRef, *, is_pinned: bool) -> None:
        before = self.pins()
        after = before | {str(ref)} if is_pinned else before - {str(ref)}
        if after != before:
            write_file(self._files, self.root / PINS_NAME, msgspec.json.encode(sorted(after)))

    def collect(self, *, partial_age_s: float = PARTIAL_KEPT_S) -> Collected:
        """Remove the blobs that no name, slot or lease leads to, and fetches that nobody took up for `partial_age_s`.
        What is attached to a manifest stays as long as that does."""
        self._prepare()
        with self._lock():
            give_up_reserve(self.root, self._files)
            freed = self.blobs.remove_stale_partials(now=self._clock(), min_age_s=partial_age_s)
            found = self._reachable()
            dead = [] if found.blocked_by else [d for d in self.blobs.digests() if d not in found.digests]
            if not found.blocked_by:
                freed += self._sweep(found, dead)
            take_reserve(self.root, self._files)
        return Collected(len(dead), freed, found.blocked_by)

    def _reachable(self) -> Reachable:
        index = self._read_index()
        roots = [Root("a loaded model", digest, may_be_blob=True) for digest in self._leases.held()]
        try:
            slots = self.slots()
        except StoreError as e:
            log.warning("nothing is collected: %s", e)
            return Reachable(frozenset(), index.manifests, (SLOTS_NAME,))
        roots += [Root(f"slot {name}", digest) for name, slot in slots.items() for digest in slot.digests()]
        return reachable(index.manifests, roots, self._checked_document)

    def _sweep(self, found: Reachable, dead: Sequence[Digest]) -> int:
        index = self._read_index()
        if len(found.entries) < len(index.manifests):
            self._write_index(msgspec.structs.replace(index, manifests=[*found.entries]))
        named = self.root / "named"
        for directory in named.iterdir() if named.is_dir() else ():
            if is_hex(directory.name) and Digest(f"sha256:{directory.name}") not in found.digests:
                self._files.remove_tree(directory)
        freed_bytes = sum(self.blobs.remove(digest) for digest in dead)
        self.blobs.forget_chunks()
        self._mark(dict.fromkeys(dead, ""))
        return freed_bytes

    def manifest(self, ref: str | ModelRef) -> Manifest:
        """The manifest of a model, also of one that cannot be opened because a file of it is damaged.

        Raises:
            ModelNotFound: There is none of that name.
            InvalidModelFile: It is damaged itself.
            StoreError: It is missing.
        """
        entries = self._entries()
        resolved = self._resolve(ref, entries)
        return Manifest.parse(self._document(entries[resolved]), what=f"The manifest of {resolved}")

    def parts(self, ref: str | ModelRef) -> Sequence[tuple[str, Descriptor]]:
        """Every blob of a model, also of a damaged one, under its name there: the manifest, and where that is right the
        config, the files, and what is attached.

        Raises:
            ModelNotFound: There is none of that name.
        """
        entries = self._entries()
        return self._parts(entries[self._resolve(ref, entries)])

    def parts_of_version(self, digest: Digest) -> Sequence[tuple[str, Descriptor]]:
        """The same of one version, by the digest of its manifest.

        Raises:
            StoreError: It is not here.
        """
        return self._parts(self._version_entry(digest))

    def _parts(self, entry: Descriptor) -> Sequence[tuple[str, Descriptor]]:
        found = [("manifest", entry)]
        try:
            manifest = Manifest.parse(self._document(entry), what="The manifest")
        except (InvalidModelFile, StoreError):
            return found
        found += [("config", manifest.config), *((layer.filepath or layer.digest, layer) for layer in manifest.layers)]
        for referrer in self.referrers(entry.digest):
            attached = Referrer.parse(self._document(referrer))
            found += [(f"attached {d.digest}", d) for d in (referrer, attached.config, *attached.layers)]
        return found

    def verify(self, ref: str | ModelRef, *, before_read: Callable[[], None] | None = None) -> _Checks:
        """Hash every blob of a model again, from the disk and not from memory: its files, its config, its manifest, and
        what is attached. `before_read` runs before each MiB, and may raise to stop it.

        Raises:
            ModelNotFound: There is none of that name.
            StoreError: The disk refuses to read.
        """
        while True:
            entries = self._entries()
            resolved = self._resolve(ref, entries)
            checks = [self._check(*part, before_read) for part in self._parts(entries[resolved])]
            if all(check.is_good for check in checks) or self._entries().get(resolved) == entries[resolved]:
                return checks  # else it was replaced or removed while we looked

    def _check(self, name: str, descriptor: Descriptor, before_read: Callable[[], None] | None) -> FileCheck:
        path, digest = self.blobs.path(descriptor.digest), descriptor.digest
        actual = self.blobs.actual_digest(digest, before_read=before_read)
        return FileCheck(name, path.absolute(), descriptor.size, digest, actual)

    def _prepare(self) -> None:
        """Make the directories of a new store, and fill it from the seed."""
        # The directories by themselves, too: copies of a layout often lack the empty ones.
        if not (self.root / "oci-layout").exists() or not self.blobs.has_directories():
            self.blobs.create()
            with self._lock():
                write_file(self._files, self.root / "oci-layout", LAYOUT)
                take_reserve(self.root, self._files)
        if self._is_unseeded():
            self._fill(ModelStore(self._seed or self.root))

    def _is_unseeded(self) -> bool:
        # An emptied store has an index, so what was removed on purpose does not come back.
        has_seed = self._seed is not None and (self._seed / "index.json").exists()
        return has_seed and not (self.root / "index.json").exists()

    def _fill(self, seed: ModelStore) -> None:
        with self._lock():
            if not self._is_unseeded():
                return
            index = self._read_index()
            for ref, entry in seed._entries().items():
                attached = seed.referrers(entry.digest)
                try:
                    for one in (entry, *attached):
                        take_over(seed.blobs, self.blobs, one)
                except (DigestMismatch, InvalidModelFile, StoreError) as e:
                    log.warning("%s is not taken from the seed: %s", ref, e.message)
                    continue
                index = with_entry(index, ref, entry, added=self._clock())
                for one in attached:
                    index = with_referrer(index, one, entry.digest)
            if index.manifests:
                self._write_index(index)

    @contextmanager
    def _lock(self) -> Generator[None]:
        with self._files.open_append(self.root / "lock") as file:
            wait_for_lock(file, timeout_s=_LOCK_TIMEOUT_S, busy=f"The store {self.root} is in use by another process.")
            yield

    def _read_index(self) -> Index:
        try:
            data = read_document(self.root / "index.json")
        except StoreError as e:
            if isinstance(e.__cause__, FileNotFoundError):
                return Index(schema_version=2, media_type=INDEX_TYPE, manifests=[])
            raise
        try:
            return decode(data, Index, what="index")
        except InvalidModelFile as e:
            path = self.root / "index.json"
            # The blobs are whole; what is lost is which names they have.
            raise StoreError(
                f"The store's list {path} is damaged: {e.reason}.",
                hint=f"Put a copy of it back, or take it away (mv {path} {path}.damaged) and pull the models again.",
            ) from e

    def _entries(self) -> dict[ModelRef, Descriptor]:
        if self._is_unseeded():
            self._prepare()
        return models_of(self._read_index())

    def _set_entry(self, ref: ModelRef, entry: Descriptor | None) -> None:
        self._write_index(with_entry(self._read_index(), ref, entry, added=self._clock()))

    def _write_index(self, index: Index) -> None:
        data = msgspec.json.format(encode(index), indent=2)  # indented, because people look into it
        if len(data) > MAX_DOCUMENT_BYTES:  # which nobody could read any more
            raise StoreError(
                f"The store's list {self.root / 'index.json'} would be longer than {MAX_DOCUMENT_BYTES:,} bytes.",
                hint="Remove models that are not needed: edge rm MODEL.",
            )
        write_file(self._files, self.root / "index.json", data)


def _not_found(ref: str, same_name: Sequence[str], known: Sequence[str]) -> ModelNotFound:
    if not same_name:
        return ModelNotFound(ref, known=sorted(known))
    tags = ", ".join(found.partition(":")[2] for found in same_name)
    message = f"'{ref}' is not in the store" if ":" in ref else f"The name '{ref}' is not enough"
    return ModelNotFound(
        ref, known=sorted(known), message=f"{message}; its tags there: {tags}.", hint=f"Name one, as {same_name[0]}."
    )


class _Kind(msgspec.Struct, frozen=True, rename="camel"):
    """What every manifest may say of itself."""

    artifact_type: str | None = None


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def _scan(layers: Sequence[Descriptor], paths: Sequence[Path], notes: Mapping[str, str]) -> None:
    pairs = zip(layers, paths, strict=True)
    scan_package([Part(layer.filepath, path, layer.media_type) for layer, path in pairs], notes)


def _check_length(document: bytes, *, what: str) -> None:
    if len(document) > MAX_DOCUMENT_BYTES:  # nobody could read it again
        raise InvalidModelFile(what, f"it would have {len(document):,} bytes; {MAX_DOCUMENT_BYTES:,} are allowed")


def _check_names(files: Sequence[PackageFile], *, what: str) -> None:
    for file in files:
        check_file_name(file.name, what=what)
    if not files or len({file.name for file in files}) != len(files):
        raise InvalidModelFile(what, "a package needs files, each under its own name")
