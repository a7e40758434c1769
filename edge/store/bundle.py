"""A bundle: models as one file, an OCI image layout in a tar archive, which skopeo and podman call ``oci-archive``.

It is read where it lies; nothing of it is unpacked beside it, and no name in it ever becomes a path. What is small
stands in front in those that we write, but any order is read. Every document is hostile until it is parsed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec

from edge.errors import DigestMismatch, InvalidModelFile, InvalidReference, SourceUnavailable
from edge.formats.tar import TarMember, read_tar

from .details import ModelDetails, details_from
from .digest import READ_BYTES, Digest, digest_bytes
from .manifest import (
    ARTIFACT_TYPE,
    MANIFEST_TYPE,
    MAX_DOCUMENT_BYTES,
    REF_NAME,
    Descriptor,
    Index,
    Manifest,
    ModelConfig,
    ModelRef,
    Referrer,
    decode,
)

MAX_ENTRIES = 1024
"""Of the list of references."""
MAX_ATTACHED = 64
"""To one model. They stay in the store's list with it, which may not become too long to be read."""
MAX_DOCUMENTS_BYTES = 8 << 20
"""Of all manifests and configs that are parsed; a model has about 2 kB of them."""
LAYOUT_NAME, INDEX_NAME = "oci-layout", "index.json"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


class _Layout(msgspec.Struct, frozen=True, rename="camel"):
    image_layout_version: str


class _AnyManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What tells models from what is attached to them, and from container images."""

    artifact_type: str = ""
    config: Descriptor
    layers: Annotated[list[Descriptor], msgspec.Meta(max_length=4096)] = []
    subject: Descriptor | None = None


@dataclass(frozen=True, slots=True)
class Attached:
    """What is attached to a model by a manifest of its own: a signature, a list of parts."""

    descriptor: Descriptor
    """Of its manifest."""
    data: bytes
    """The manifest."""
    referrer: Referrer

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(blob.size for blob in (self.referrer.config, *self.referrer.layers))


@dataclass(frozen=True)
class BundledModel:
    """One model of a bundle. Its documents are parsed, its files were not looked at."""

    ref: ModelRef | None
    """None where the bundle has no name for it that is one here."""
    digest: Digest
    """Of the manifest."""
    data: bytes
    """The manifest."""
    manifest: Manifest
    config: ModelConfig
    attached: Sequence[Attached] = ()

    @cached_property
    def details(self) -> ModelDetails:
        return details_from(self.manifest, self.config)

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(layer.size for layer in self.manifest.layers)

    @property
    def documents(self) -> Sequence[Manifest | Referrer]:
        """Its manifest, and those of what is attached to it."""
        return [self.manifest, *(found.referrer for found in self.attached)]

    def attached_by_size(self) -> tuple[Sequence[Attached], Sequence[Attached]]:
        """What is looked at before the model is let in, as signatures are, bounded in all; and what comes after it."""
        small: list[Attached] = []
        large: list[Attached] = []
        left_bytes = MAX_DOCUMENTS_BYTES
        for found in self.attached:
            is_small = found.size_bytes <= left_bytes
            left_bytes -= found.size_bytes if is_small else 0
            (small if is_small else large).append(found)
        return small, large


@dataclass(frozen=True, slots=True)
class BundledImage:
    """Something else that travels in a bundle: a container image."""

    name: str
    digest: Digest
    size_bytes: int | None
    """None where it is a list of images."""


class Bundle:
    """A bundle that is open for reading; closed by who opened it. Its methods may be called from any thread.

    Raises:
        SourceUnavailable: The file cannot be read.
        InvalidModelFile: It is no bundle, damaged, or hostile.
        DigestMismatch: A document in it is not what its digest says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._documents_bytes = 0
        with ExitStack() as on_failure:
            with self._reading():
                if not path.is_file():
                    reason = "is not a file" if path.exists() else "does not exist"
                    raise SourceUnavailable(f"{path} {reason}.", hint="Make one with: edge export MODEL -o stick.tar")
                self._file = on_failure.enter_context(path.open("rb", buffering=0))
                members = read_tar(self._file, what=path.name)
            self._small = {name: members[name] for name in (LAYOUT_NAME, INDEX_NAME) if name in members}
            found = ((_BLOB.fullmatch(name), member) for name, member in members.items())
            self._blobs = {Digest(f"sha256:{match[1]}"): member for match, member in found if match}
            self.index = self._read_index()
            self.models, self.images = self._read_entries()
            on_failure.pop_all()

    @contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except OSError as e:
            hint = "Put the medium in again; if that does not help, make the bundle anew on another."
            raise SourceUnavailable(f"{self.path} cannot be read: {e.strerror or e}.", hint=hint) from e

    def _read_index(self) -> Index:
        layout, index = (self._small.get(name) for name in (LAYOUT_NAME, INDEX_NAME))
        if layout is None or index is None:
            raise InvalidModelFile(self.path.name, f"it is no OCI archive: it has no {LAYOUT_NAME} or no {INDEX_NAME}")
        version = decode(self._document(layout), _Layout, what=LAYOUT_NAME).image_layout_version
        if not version.startswith("1."):
            raise InvalidModelFile(self.path.name, f"its layout is of version {version[:20]!r}, and 1 is read here")
        found = decode(self._document(index), Index, what=f"{INDEX_NAME} of {self.path.name}")
        if len(found.manifests) > MAX_ENTRIES:
            raise InvalidModelFile(self.path.name, f"it has more than {MAX_ENTRIES:,} references")
        return found

    def _read_entries(self) -> tuple[Sequence[BundledModel], Sequence[BundledImage]]:
        models: list[BundledModel] = []
        images: list[BundledImage] = []
        attached: dict[Digest, dict[Digest, Attached]] = {}
        for entry in self.index.manifests:
            name = entry.annotations.get(REF_NAME, "")
            if entry.media_type != MANIFEST_TYPE:
                images.append(BundledImage(name, entry.digest, None))
                continue
            data = self.document(entry)
            found = decode(data, _AnyManifest, what=f"The manifest {entry.digest}")
            if found.subject is not None:
                referrer = Referrer.parse(data, what=f"The manifest {entry.digest}")
                attached.setdefault(found.subject.digest, {})[entry.digest] = Attached(entry, data, referrer)
            elif found.artifact_type == ARTIFACT_TYPE:
                models.append(self._model(_ref_of(name), entry.digest, data))
            else:
                images.append(
                    BundledImage(name, entry.digest, found.config.size + sum(layer.size for layer in found.layers))
                )
        names = [model.ref for model in models if model.ref]
        if len(set(names)) != len(names):
            raise InvalidModelFile(self.path.name, "two models in it have the same name")
        whole = [replace(model, attached=list(_attached_to(model.digest, attached))) for model in models]
        if any(len(model.attached) > MAX_ATTACHED for model in whole):
            raise InvalidModelFile(self.path.name, f"it attaches more than {MAX_ATTACHED} things to a model")
        return whole, images

    def _model(self, ref: ModelRef | None, digest: Digest, data: bytes) -> BundledModel:
        what = str(ref or digest)
        manifest = Manifest.parse(data, what=f"The manifest of {what}")
        config = ModelConfig.parse(self.document(manifest.config), what=f"The config of {what}")
        return BundledModel(ref, digest, data, manifest, config)

    def document(self, descriptor: Descriptor) -> bytes:
        """A small blob, checked.

        Raises:
            InvalidModelFile: It is not there, of another size, or there are too many such.
            DigestMismatch: Its bytes are not those of its digest.
        """
        data = self._document(self._member(descriptor))
        if (actual := digest_bytes(data)) != descriptor.digest:
            raise DigestMismatch(f"A document of {self.path.name}", expected=descriptor.digest, actual=actual)
        return data

    def _document(self, member: TarMember) -> bytes:
        self._documents_bytes += member.size_bytes
        if member.size_bytes > MAX_DOCUMENT_BYTES or self._documents_bytes > MAX_DOCUMENTS_BYTES:
            bounds = f"{MAX_DOCUMENT_BYTES:,} bytes in one document, or {MAX_DOCUMENTS_BYTES:,} in all"
            raise InvalidModelFile(self.path.name, f"it has more than {bounds}")
        with self._reading():
            return os.pread(self._file.fileno(), member.size_bytes, member.offset)

    def _member(self, descriptor: Descriptor) -> TarMember:
        member = self._blobs.get(descriptor.digest)
        if member is None:
            raise InvalidModelFile(self.path.name, f"it lacks the blob {descriptor.digest}")
        if member.size_bytes != descriptor.size:
            was = f"{member.size_bytes:,} bytes instead of {descriptor.size:,}"
            raise InvalidModelFile(self.path.name, f"its blob {descriptor.digest} has {was}")
        return member

    def check_has(self, descriptors: Sequence[Descriptor]) -> None:
        """Look whether blobs are there with their sizes; their bytes are not read.

        Raises:
            InvalidModelFile: One is not.
        """
        for descriptor in descriptors:
            self._member(descriptor)

    def blob_sizes(self) -> dict[Digest, int]:
        """All blobs there are."""
        return {digest: member.size_bytes for digest, member in self._blobs.items()}

    def open_blob_range(self, digest: Digest, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes of a blob from `start` up to `stop`, its end where None; at most a MiB at a time, not checked.

        Raises:
            InvalidModelFile: There is no such blob, or the file was cut short meanwhile.
            SourceUnavailable: The medium refuses to read.
        """
        if (member := self._blobs.get(digest)) is None:
            raise InvalidModelFile(self.path.name, f"it lacks the blob {digest}")
        at = member.offset + start
        end = member.offset + min(member.size_bytes if stop is None else stop, member.size_bytes)
        while at < end:
            with self._reading():
                data = os.pread(self._file.fileno(), min(READ_BYTES, end - at), at)
            if not data:
                raise InvalidModelFile(self.path.name, "it is cut short")
            at += len(data)
            yield data

    def forget_cached(self) -> None:
        """Have what is read next come from the medium, not from memory, as far as the system obliges."""
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _attached_to(subject: Digest, attached: dict[Digest, dict[Digest, Attached]]) -> Iterator[Attached]:
    """What is attached to a manifest, and to that in turn, as a signature is to a list of parts."""
    pending = [*attached.get(subject, {}).values()]
    while pending:
        yield (found := pending.pop(0))
        pending += attached.get(found.descriptor.digest, {}).values()


def _ref_of(name: str) -> ModelRef | None:
    try:
        return ModelRef.parse(name)
    except InvalidReference:  # another tool's name, as one with a registry's host
        return None
