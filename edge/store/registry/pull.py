"""Pull an artifact of a registry into the store: whole, compared with its digests, and visible last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from edge.errors import DigestMismatch, DiskFull, EdgeError, InvalidModelFile, InvalidReference, SourceUnavailable
from edge.formats.gguf import read_gguf

from ..blobs import Partial, Staged, key_of
from ..delta import DELTA_BYTES, DELTA_TYPE, delta_for, rebuilt
from ..details import Sampling, details_of
from ..digest import Digest
from ..manifest import DOC_TYPE, SIGNATURE_TYPE, WEIGHT_TYPE, Descriptor, Manifest, ModelRef, Referrer
from ..models import ModelStore, PackageFile, StoredModel
from ..network import Network
from ..sources import RegistrySource
from ..transfer import Control, Offer, require_room
from .artifacts import Part, is_model_pack, only_manifest, parts_of, sampling_of
from .client import Document, RegistryClient, clients_of, first_of

_MAX_TEXT_BYTES = 1 << 20
_MAX_NOTE_BYTES = 256 << 10
"""Of a system prompt or a template: it becomes an annotation of the manifest."""
_MAX_SIGNATURES_BYTES = 8 << 20
"""Of all signatures together: they are fetched before anybody is let in."""
_MAX_REFERRER_BYTES = 64 << 20
"""Of the files of one thing that is attached to a model; what is larger is left where it is."""
log = logging.getLogger("edge.store")

Admit = Callable[[Digest, ModelRef], object]
Check = Callable[[Staged, str], object]


@dataclass(frozen=True, slots=True)
class ArtifactPlan:
    """What a pull from a registry would do."""

    source: RegistrySource
    """With the digest of the manifest."""
    ref: ModelRef
    size_bytes: int
    is_present: bool


@dataclass(frozen=True, slots=True)
class _Pull:
    store: ModelStore
    source: RegistrySource
    clients: Sequence[RegistryClient]
    control: Control

    def document(self) -> Document:
        """The manifest that the source names."""
        found = self.manifest(self.source.reference)
        return only_manifest(found, lambda entry: self.manifest(entry.digest), what=str(self.source))

    def manifest(self, reference: str) -> Document:
        return first_of(self.clients, lambda client: client.manifest(self.source.repository, reference))

    def text(self, descriptor: Descriptor, limit: int = _MAX_TEXT_BYTES) -> bytes:
        """A small blob, in memory."""
        return first_of(self.clients, lambda client: client.blob(self.source.repository, descriptor, limit=limit))

    @contextmanager
    def fetched(
        self, blob: Descriptor, name: str, check: Check, *, given_up: tuple[type[EdgeError], ...] = ()
    ) -> Generator[Staged]:
        """A blob as a checked file, for as long as the block runs. What one place began another goes on with; what
        proved wrong, or failed by one of the errors `given_up`, is thrown away."""

        def waiting() -> None:
            self.control.report(0, None, "waiting for another pull of the same file")

        with (
            self.store.blobs.ingest(key_of(blob.digest), before_poll=waiting) as partial,
            _discarded_on(partial, given_up),
        ):
            offer = Offer(str(self.source), name, blob.size, blob.digest)

            def attempt(client: RegistryClient) -> Staged:
                fetcher = client.fetcher(self.source.repository, blob.digest, name)
                try:
                    return fetcher.fetch(offer, self.store.blobs, partial, self.control)
                except DigestMismatch:
                    partial.restart()
                    raise

            is_here = self.store.has_sound(blob.digest)  # somebody else fetched it, while this one waited
            here = Staged(self.store.blobs.path(blob.digest), blob.digest, blob.size)
            staged = here if is_here else first_of(self.clients, attempt)
            try:
                self.control.report(blob.size, blob.size, f"checking {name}")
                check(staged, name)
                yield staged
            except (DigestMismatch, InvalidModelFile):
                partial.discard()
                raise
            partial.discard()


@contextmanager
def _discarded_on(partial: Partial, errors: tuple[type[EdgeError], ...]) -> Generator[None]:
    try:
        yield
    except errors:
        partial.discard()
        raise


def plan_artifact(store: ModelStore, source: RegistrySource, *, name: str | None, network: Network) -> ArtifactPlan:
    """What `pull_artifact` would do. The registry is asked, nothing is fetched or written.

    Raises:
        SourceUnavailable, DigestMismatch, InvalidModelFile, UnsupportedFormat: As `pull_artifact`.
    """
    control = Control(lambda _: None, lambda: False)
    with clients_of(source.host, network, control) as clients:
        document = _Pull(store, source, clients, control).document()
    found = replace(source, digest=document.digest)
    if is_model_pack(document):
        manifest = Manifest.parse(document.data, what=str(source))
        blobs, is_present = manifest.layers, not store.blob_needs(manifest)
    else:
        blobs = [part.descriptor for part in parts_of(document, what=str(source))]
        is_present = all(store.blobs.has(blob.digest) for blob in blobs)
    return ArtifactPlan(found, ref_of(source, name), sum(blob.size for blob in blobs), is_present)


def pull_artifact(
    store: ModelStore, source: RegistrySource, *, name: str | None, network: Network, control: Control, admit: Admit
) -> StoredModel:
    """Fetch what a registry has under a name or a digest. A ModelPack is kept as it is, byte for byte, with what is
    attached to it; of anything else a package is made.

    Args:
        admit: Looks at the manifest and what is attached before the files are fetched, and raises to refuse it.

    Raises:
        SourceUnavailable: Neither the registry nor a mirror of it can be reached or has it.
        DigestMismatch: All of them have other bytes.
        InvalidModelFile: It is damaged, or no model.
        UnsupportedFormat: It is of a form that is not read.
        DiskFull: It does not fit on the disk.
        Cancelled: Somebody asked for it.
        StoreError: The store cannot be written.
    """
    store.refs()
    with clients_of(source.host, network, control) as clients:
        pull = _Pull(store, source, clients, control)
        control.report(0, None, f"asking {source.host}")
        document = pull.document()
        ref = ref_of(source, name)
        if is_model_pack(document):
            return _adopt(pull, document, ref, admit)
        admit(document.digest, ref)  # nothing is attached to what is not kept as it is, so a policy finds it unsigned
        return _package(pull, document, ref)


def ref_of(source: RegistrySource, name: str | None) -> ModelRef:
    """What the model is called here: as asked for, else the last part of its name there and its tag."""
    if name:
        return ModelRef.parse(name)
    try:
        return ModelRef(source.repository.rpartition("/")[2], source.tag or "latest")
    except InvalidReference as e:
        raise InvalidReference(e.message, hint="Give it a name with --name.") from e


def _adopt(pull: _Pull, document: Document, ref: ModelRef, admit: Admit) -> StoredModel:
    manifest = Manifest.parse(document.data, what=f"The manifest of {pull.source}")
    with ExitStack() as refused, pull.store.lease(document.digest):
        pull.store.keep_manifest(document.data)
        attached = first_of(pull.clients, lambda client: client.referrers(pull.source.repository, document.digest))
        left_bytes = _MAX_SIGNATURES_BYTES
        for descriptor in attached:
            if descriptor.artifact_type == SIGNATURE_TYPE and left_bytes > 0:
                left_bytes -= _attach(pull, descriptor, document.digest, left_bytes)
        try:
            admit(document.digest, ref)  # before all else: who is not let in costs no gigabytes
        except EdgeError:
            refused.callback(pull.store.collect)  # after the lease: what was attached goes again
            raise
        for descriptor in attached:
            if descriptor.artifact_type not in (SIGNATURE_TYPE, DELTA_TYPE):
                _attach(pull, descriptor, document.digest, _MAX_REFERRER_BYTES)
        _complete(pull, manifest, attached)
        return pull.store.add_manifest(ref, document.data)


def _complete(pull: _Pull, manifest: Manifest | Referrer, attached: Sequence[Descriptor] = ()) -> None:
    """Have every blob of a manifest in the store. Those that are there are hashed: pulling is how people mend. What a
    delta makes of other blobs here is not fetched."""
    blobs = {blob.digest: blob for blob in (manifest.config, *manifest.layers)}
    missing = [blob for blob in blobs.values() if not pull.store.has_sound(blob.digest)]
    require_room(pull.store.blobs, sum(pull.store.blobs.left_bytes(blob.digest, blob.size) for blob in missing))
    for blob in missing:
        delta = delta_for(blob, attached, pull.store.blobs)
        if delta is not None and _is_rebuilt(pull, blob, delta):
            continue
        with pull.fetched(blob, blob.filepath or "its config", _check) as staged:
            pull.store.keep(staged)


def _is_rebuilt(pull: _Pull, blob: Descriptor, delta: Descriptor) -> bool:
    """Make a blob of a delta and of what is here. One that is damaged, or cannot be had, is no reason to fail."""
    name = blob.filepath or "its weights"
    try:
        (layer,) = Referrer.parse(pull.manifest(delta.digest).data).layers
        if layer.size >= blob.size or str(layer.size) != delta.annotations.get(DELTA_BYTES):
            raise InvalidModelFile("The delta", f"it has {layer.size:,} bytes, other than it is said to have")
        given_up = (DigestMismatch, DiskFull, InvalidModelFile, SourceUnavailable)
        with (
            pull.fetched(layer, f"what is new in {name}", lambda _file, _name: None, given_up=given_up) as file,
            rebuilt(file.path, pull.store.blobs, blob, pull.control) as staged,
        ):
            _check(staged, name)
            pull.store.keep(staged)
            return True
    except (DigestMismatch, DiskFull, InvalidModelFile, SourceUnavailable, ValueError) as e:
        log.warning("%s is fetched whole, its delta is of no use: %s", name, e)
        return False


def _check(staged: Staged, name: str) -> None:
    if name.lower().endswith(".gguf"):
        read_gguf(staged.path, what=name)


def _attach(pull: _Pull, descriptor: Descriptor, subject: Digest, limit: int) -> int:
    """Bring what is attached to a model, up to so many bytes, and tell how many they were. What is broken, or about
    something else, is left out: a policy that wants it then finds it missing."""
    size_bytes = 0
    try:
        document = pull.manifest(descriptor.digest)
        referrer = Referrer.parse(document.data)
        size_bytes = len(document.data)
        if referrer.subject.digest != subject:
            raise InvalidModelFile("It", f"its subject is {referrer.subject.digest}")
        needed_bytes = sum(blob.size for blob in (referrer.config, *referrer.layers))
        if size_bytes + needed_bytes > limit:
            log.warning("%s is left at the registry: it is too large", descriptor.digest)
            return size_bytes
        size_bytes += needed_bytes
        with pull.store.lease(document.digest):
            pull.store.keep_manifest(document.data)
            _complete(pull, referrer)
            pull.store.add_referrer(document.data)
    except (DigestMismatch, InvalidModelFile, SourceUnavailable) as e:
        log.warning("what is attached as %s is left out: %s", descriptor.digest, e.message)
    return size_bytes


def _package(pull: _Pull, document: Document, ref: ModelRef) -> StoredModel:
    """Make a package of an artifact that is none of ours: its weights as they are, the rest as our annotations."""
    parts = parts_of(document, what=str(pull.source))
    stem = pull.source.repository.rpartition("/")[2]
    sampling, system, template = Sampling(), "", ""
    parts = _once_each(parts)
    with ExitStack() as stack:
        stack.enter_context(pull.store.lease(*{part.descriptor.digest for part in parts}))
        files: list[PackageFile] = []
        projector: str | None = None
        for part in parts:
            match part.role:
                case "weights":
                    files.append(_weights(pull, part, part.name or f"{stem}.gguf", stack))
                case "projector":
                    files.append(_weights(pull, part, projector := part.name or f"mmproj-{stem}.gguf", stack))
                case "license":
                    files.append(_weights(pull, part, f"LICENSE-{len(files)}" if part.name == "" else part.name, stack))
                case "template":
                    template = pull.text(part.descriptor, _MAX_NOTE_BYTES).decode("utf-8", "replace")
                case "system":
                    system = pull.text(part.descriptor, _MAX_NOTE_BYTES).decode("utf-8", "replace")
                case "params":
                    sampling = sampling_of(pull.text(part.descriptor))
        gguf = read_gguf(files[0].path, what=files[0].name)
        source = str(replace(pull.source, digest=document.digest))
        details = details_of(gguf, source=source, sampling=sampling)
        return pull.store.add(ref, files, replace(details, projector=projector, system=system, template=template))


def _once_each(parts: Sequence[Part]) -> Sequence[Part]:
    """Without the files that a manifest names again: one partial serves one of them."""
    found: dict[tuple[Digest, bool], Part] = {}
    for part in parts:
        found.setdefault((part.descriptor.digest, part.role in ("weights", "projector", "license")), part)
    return [*found.values()]


def _weights(pull: _Pull, part: Part, name: str, stack: ExitStack) -> PackageFile:
    is_document = part.role == "license"
    media_type = DOC_TYPE if is_document else WEIGHT_TYPE
    if is_document and part.descriptor.size > _MAX_TEXT_BYTES:
        raise InvalidModelFile(str(pull.source), f"its licence has {part.descriptor.size:,} bytes")
    digest = part.descriptor.digest
    if pull.store.has_sound(digest):
        return PackageFile(pull.store.blobs.path(digest), name, media_type, digest=digest)
    staged = stack.enter_context(pull.fetched(part.descriptor, name, _check))
    return PackageFile(staged.path, name, media_type, move=True, digest=staged.digest)
