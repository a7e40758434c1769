"""The model store: a reference names a manifest, the manifest names blobs.

The directory is an OCI image layout, so any OCI tool reads it. ``index.json`` is the one list of references: it is
replaced whole under the lock and read without one, and it is written only after every blob that it leads to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from edge.errors import DigestMismatch, InvalidModelFile, InvalidReference, ModelNotFound, StoreError, UnsupportedFormat
from edge.kinds import CAPABILITIES, ModelKind

from .blobs import BlobStore, Staged
from .details import ModelDetails, annotations_of, config_of, details_from
from .digest import Digest, digest_bytes, hash_file
from .files import FileOps, translated, wait_for_lock, write_file
from .manifest import (
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    DOC_TYPE,
    FILEPATH,
    INDEX_TYPE,
    MANIFEST_TYPE,
    MAX_DOCUMENT_BYTES,
    OURS,
    REF_NAME,
    TITLE,
    WEIGHT_CONFIG_TYPE,
    WEIGHT_TYPE,
    Descriptor,
    Index,
    Manifest,
    ModelConfig,
    ModelRef,
    check_file_name,
    decode,
    encode,
    references_of,
)
from .seed import take_over

ADDED = f"{OURS}added"
"""Annotation of an index entry: the Unix time at which the model came into this store."""
REPORT_NAME = "report.json"
PARTIAL_KEPT_S = 7 * 86400.0
PINS_NAME = "pins.json"
"""Beside the index: the names of pinned models, as a JSON list."""
DRAFTS_NAME = "drafts.json"
"""Beside the index too: for models by name, the name of the draft model that the operator chose, empty for none."""
log = logging.getLogger("edge.store")

_LOCK_TIMEOUT_S = 60.0
_MEND = "Pull the model again; edge verify shows all that is amiss."
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file that goes into a package."""

    path: Path
    """Where the bytes are now."""
    name: str
    """The file's relative path inside the package."""
    media_type: str = ""
    """Chosen by the name where it is empty: weights for GGUF and safetensors, else a document."""
    move: bool = False
    """The file may be renamed away, which saves copying it where it lies on the store's file system."""
    digest: Digest | None = None
    """The digest of its synced bytes, where they were hashed already; then they are not read again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a stored model; `path` is the blob."""

    name: str
    path: Path
    digest: Digest
    size_bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What `verify` found about one blob."""

    name: str
    path: Path
    size_bytes: int
    expected: Digest
    actual: Digest | None
    """None where the file is missing."""

    @property
    def is_good(self) -> bool:
        return self.actual == self.expected


@dataclass(frozen=True, slots=True)
class DamagedModel:
    """A reference whose model cannot be used, and why."""

    ref: ModelRef
    reason: str
    error: InvalidModelFile | StoreError


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` did."""

    num_blobs: int
    freed_bytes: int
    blocked_by: tuple[str, ...] = ()
    """References whose manifest cannot be read: while there are any, no blob is removed, for one may be theirs."""


@dataclass(frozen=True)
class StoredModel:
    """One model of the store; its files are there with the right sizes."""

    ref: ModelRef
    digest: Digest
    """Of the manifest."""
    manifest: Manifest
    config: ModelConfig
    files: tuple[StoredFile, ...]
    created: float
    """Unix time at which it came into this store."""

    @cached_property
    def details(self) -> ModelDetails:
        return details_from(self.manifest, self.config)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def weights(self) -> Path:
        """The one weight file beside a projector, in ``blobs/``.

        Raises:
            UnsupportedFormat: The model has none, or several.
        """
        weights = [file for file in self.files if file.media_type == WEIGHT_TYPE]
        paths = [file.path for file in weights if file.name != self.details.projector]
        if len(paths) != 1:
            raise UnsupportedFormat(f"The model '{self.ref}' has {len(paths)} weight files; one is supported.")
        return paths[0]

    @property
    def projector(self) -> Path | None:
        """What makes images readable for the model, in ``blobs/``; None where it reads text only."""
        name = self.details.projector
        return next((file.path for file in self.files if file.name == name), None) if name else None

    @property
    def capabilities(self) -> Sequence[str]:
        """What it does, in the words that Ollama has for it."""
        return CAPABILITIES[self.kind] + (["vision"] if self.projector else [])

    @property
    def kind(self) -> ModelKind:
        """What it is for."""
        return self.details.kind

    @property
    def is_adapter(self) -> bool:
        """Whether it changes a model instead of being one."""
        return self.kind == "adapter"

    @property
    def architecture(self) -> str | None:
        return self.details.architecture

    @property
    def quantization(self) -> str | None:
        return self.details.quantization

    @property
    def num_parameters(self) -> int | None:
        return self.details.num_parameters

    @property
    def context_tokens(self) -> int | None:
        return self.details.context_tokens

    @property
    def license(self) -> str | None:
        return self.details.license

    @property
    def source(self) -> str | None:
        return self.details.source

    @cached_property
    def report(self) -> dict[str, object] | None:
        """The quality report that came with the model; None where there is none.

        Raises:
            InvalidModelFile: It is not a JSON object.
        """
        file = next((file for file in self.files if file.name == REPORT_NAME), None)
        if file is None:
            return None
        return decode(_read_document(file.path), dict[str, object], what=f"{REPORT_NAME} of {self.ref}")


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
        data = _read_document(self.blobs.path(digest))
        if digest_bytes(data) != digest:
            raise InvalidModelFile(str(self.blobs.path(digest)), "its bytes are not those of its digest")
        return data

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
            InvalidModelFile: A file's name is not allowed, or two are the same.
            DiskFull: There is no room for the copies.
            StoreError: A file cannot be read, or the store not written.
        """
        ref = ModelRef.parse(ref) if isinstance(ref, str) else ref
        _check_names(files, what=str(ref))
        self._prepare()
        with ExitStack() as stack:
            staged = [self._stage(file, stack) for file in files]
            with self._lock():
                self._publish(staged)
                layers = [_layer(file, item) for file, item in zip(files, staged, strict=True)]
                self._set_entry(ref, self._put_manifest(ref, layers, details))
        for file in files:
            if file.move and file.path.parent != self.blobs.blobs_dir:
                self._files.remove(file.path)  # one that had to be copied; the others were renamed away
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
        with translated(file.path, "Reading"):
            hashed = hash_file(file.path)
        return Staged(file.path, hashed.digest(), hashed.num_bytes)

    def _publish(self, staged: Sequence[Staged]) -> None:
        self.blobs.publish([item for item in staged if item.path != self.blobs.path(item.digest)])
        for item in staged:
            if not self.blobs.has(item.digest):
                raise StoreError(f"{item.path} was removed by another process.", hint="Try again.")

    def _put_manifest(self, ref: ModelRef, layers: Sequence[Descriptor], details: ModelDetails) -> Descriptor:
        config = config_of(ref, details, [layer.digest for layer in layers]).encode()
        manifest = Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(media_type=CONFIG_TYPE, digest=self.blobs.put(config), size=len(config)),
            layers=[*layers],
            annotations=annotations_of(details),
        ).encode()
        return Descriptor(
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            digest=self.blobs.put(manifest),
            size=len(manifest),
        )

    def keep(self, staged: Staged) -> None:
        """Keep bytes under their digest for a model that is still to be added; the next `collect` takes those of which
        none was made.

        Raises:
            StoreError: The store cannot be written.
        """
        self._prepare()
        with self._lock():
            self._publish([staged])

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
            return frozenset(decode(_read_document(path), list[str], what=PINS_NAME))
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
            return decode(_read_document(path), dict[str, str], what=DRAFTS_NAME)
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
        """Remove the blobs that no reference leads to, and fetches that nobody took up for `partial_age_s`."""
        self._prepare()
        with self._lock():
            freed = self.blobs.remove_stale_partials(now=self._clock(), min_age_s=partial_age_s)
            alive, blocked_by = self._alive()
            dead = [] if blocked_by else [digest for digest in self.blobs.digests() if digest not in alive]
            freed += sum(self.blobs.remove(digest) for digest in dead)
        return Collected(len(dead), freed, blocked_by)

    def _alive(self) -> tuple[set[Digest], tuple[str, ...]]:
        alive: set[Digest] = set()
        blocked_by: list[str] = []
        for entry in self._read_index().manifests:
            name = entry.annotations.get(REF_NAME, str(entry.digest))
            pending = [entry.digest]
            while pending:
                digest = pending.pop()
                alive.add(digest)
                try:
                    found = references_of(self._checked_document(digest), what=name)
                except (InvalidModelFile, StoreError):
                    blocked_by.append(name)
                    continue
                pending.extend(found.documents - alive)
                alive |= found.blobs
        return alive, tuple(blocked_by)

    def verify(self, ref: str | ModelRef) -> _Checks:
        """Hash every blob of a model again: its files, its config, its manifest.

        Raises:
            ModelNotFound: There is none of that name.
            StoreError: The disk refuses to read.
        """
        while True:
            entries = self._entries()
            resolved = self._resolve(ref, entries)
            checks = self._check_all(resolved, entries[resolved])
            if all(check.is_good for check in checks) or self._entries().get(resolved) == entries[resolved]:
                return checks  # else it was replaced or removed while we looked

    def _check_all(self, ref: ModelRef, entry: Descriptor) -> _Checks:
        checks = [self._check("manifest", entry)]
        if not checks[0].is_good:
            return checks
        manifest = Manifest.parse(self._document(entry), what=f"The manifest of {ref}")
        named = [("config", manifest.config), *((layer.filepath or "layer", layer) for layer in manifest.layers)]
        return checks + [self._check(name, descriptor) for name, descriptor in named]

    def _check(self, name: str, descriptor: Descriptor) -> FileCheck:
        path, digest = self.blobs.path(descriptor.digest), descriptor.digest
        return FileCheck(name, path.absolute(), descriptor.size, digest, self.blobs.actual_digest(digest))

    def _prepare(self) -> None:
        """Make the directories of a new store, and fill it from the seed."""
        # The directories by themselves, too: copies of a layout often lack the empty ones.
        if not (self.root / "oci-layout").exists() or not self.blobs.has_directories():
            self.blobs.create()
            with self._lock():
                write_file(self._files, self.root / "oci-layout", _LAYOUT)
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
                try:
                    take_over(seed.blobs, self.blobs, entry)
                except (DigestMismatch, InvalidModelFile, StoreError) as e:
                    log.warning("%s is not taken from the seed: %s", ref, e.message)
                    continue
                index = _with_entry(index, ref, entry, added=self._clock())
            if index.manifests:
                self._write_index(index)

    @contextmanager
    def _lock(self) -> Generator[None]:
        with self._files.open_append(self.root / "lock") as file:
            wait_for_lock(file, timeout_s=_LOCK_TIMEOUT_S, busy=f"The store {self.root} is in use by another process.")
            yield

    def _read_index(self) -> Index:
        try:
            data = _read_document(self.root / "index.json")
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
        self._write_index(_with_entry(self._read_index(), ref, entry, added=self._clock()))

    def _write_index(self, index: Index) -> None:
        # Indented, because people look into it.
        write_file(self._files, self.root / "index.json", msgspec.json.format(encode(index), indent=2))


def _not_found(ref: str, same_name: Sequence[str], known: Sequence[str]) -> ModelNotFound:
    if not same_name:
        return ModelNotFound(ref, known=sorted(known))
    tags = ", ".join(found.partition(":")[2] for found in same_name)
    message = f"'{ref}' is not in the store" if ":" in ref else f"The name '{ref}' is not enough"
    return ModelNotFound(
        ref, known=sorted(known), message=f"{message}; its tags there: {tags}.", hint=f"Name one, as {same_name[0]}."
    )


def models_of(index: Index) -> dict[ModelRef, Descriptor]:
    """The index's entries that are models under a name; others belong to other tools and are left alone."""
    found: dict[ModelRef, Descriptor] = {}
    for entry in index.manifests:
        name = entry.annotations.get(REF_NAME)
        if name and entry.media_type == MANIFEST_TYPE and entry.artifact_type == ARTIFACT_TYPE:
            try:
                found[ModelRef.parse(name)] = entry
            except InvalidReference as e:  # another tool's name for a model must not hide ours
                log.warning("an entry of the index is passed over: %s", e.message)
    return found


def _with_entry(index: Index, ref: ModelRef, entry: Descriptor | None, *, added: float) -> Index:
    kept = [known for known in index.manifests if known.annotations.get(REF_NAME) != str(ref)]
    if entry:
        notes = {REF_NAME: str(ref), ADDED: f"{added:.3f}"}
        kept.append(msgspec.structs.replace(entry, annotations=notes))
    return msgspec.structs.replace(index, manifests=kept)


def _read_document(path: Path) -> bytes:
    with translated(path, "Reading"), path.open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


def _check_names(files: Sequence[PackageFile], *, what: str) -> None:
    for file in files:
        check_file_name(file.name, what=what)
    if not files or len({file.name for file in files}) != len(files):
        raise InvalidModelFile(what, "a package needs files, each under its own name")


def _layer(file: PackageFile, staged: Staged) -> Descriptor:
    return Descriptor(
        media_type=file.media_type or _media_type(file.name),
        digest=staged.digest,
        size=staged.size_bytes,
        annotations={FILEPATH: file.name, TITLE: file.name},
    )


def _media_type(name: str) -> str:
    if name.endswith((".gguf", ".safetensors", ".onnx")):
        return WEIGHT_TYPE
    return WEIGHT_CONFIG_TYPE if name in ("config.json", "tokenizer.json", "tokenizer_config.json") else DOC_TYPE
