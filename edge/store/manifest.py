"""Names of models and the documents that describe them: parse and format are inverse.

Formats: OCI image specification 1.1 (manifest.md, descriptor.md, image-layout.md) and CNCF ModelPack model-spec
v0.0.7 (docs/spec.md, docs/config.md). Every document is foreign until parsed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from typing_extensions import override

from edge.errors import InvalidModelFile, InvalidReference

from .digest import Digest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"

FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
"""Written beside FILEPATH: the oras command skips layers without it."""
REF_NAME = "org.opencontainers.image.ref.name"
OURS = "dev.slm-edge."
"""Prefix of our own annotations."""
SUBJECT = f"{OURS}subject"
"""Annotation of an index entry: the manifest that it is attached to. Entries of other tools are read to know it."""
SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
"""Artifact type of what carries a signature."""
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
"""The config of artifacts that have none (OCI image specification 1.1, manifest.md, "Guidance for an Empty
Descriptor")."""

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
"""What stands in the file ``oci-layout`` (OCI image specification 1.1, image-layout.md)."""
MAX_DOCUMENT_BYTES = 4 << 20
"""What registries accept for a manifest (OCI distribution specification, "Pushing Manifests")."""
_MAX_LAYERS = 4096
_MAX_SIZE_BYTES = 1 << 53

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MAX_NAME = 200
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
"""RFC 6838, section 4.2."""


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """What people type to name a model: ``name:tag``, OCI's grammar for both (distribution specification).

    Raises:
        InvalidReference: Name or tag breaks the grammar.
    """

    name: str
    tag: str = "latest"

    def __post_init__(self) -> None:
        if len(self.name) > _MAX_NAME or not REPOSITORY.fullmatch(self.name) or not TAG.fullmatch(self.tag):
            raise InvalidReference(
                f"{f'{self.name}:{self.tag}'[:240]!r} is not a model name.",
                hint="A name is lower-case letters, digits and . _ - / between them, then perhaps :tag, "
                "as in smollm2:135m-instruct.",
            )

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read ``name`` or ``name:tag``; without a tag it is ``latest``."""
        name, colon, tag = text.partition(":")
        return cls(name, tag) if colon else cls(name)

    @override
    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


Size = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_SIZE_BYTES)]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A blob as a document names it: what it is, its digest, its size."""

    media_type: str
    digest: Digest
    size: Size
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    urls: list[str] = []
    data: str | None = None
    platform: dict[str, Any] | None = None

    @property
    def filepath(self) -> str:
        """The file's path inside the package; empty where the layer has no name."""
        return self.annotations.get(FILEPATH) or self.annotations.get(TITLE) or ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The manifest of one model: a config and one layer a file."""

    # Required on the wire (no defaults): omit_defaults must not leave them out.
    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.cncf.model.manifest.v1+json"]
    config: Descriptor
    layers: Annotated[list[Descriptor], msgspec.Meta(min_length=1, max_length=_MAX_LAYERS)]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}

    @classmethod
    def parse(cls, data: bytes, *, what: str = "The manifest") -> Manifest:
        """Read and check a manifest.

        Raises:
            InvalidModelFile: Not a ModelPack manifest, or a layer's path could lead out of a directory.
        """
        manifest = decode(data, cls, what=what)
        _check_paths(manifest.layers, what=what)
        return manifest

    def encode(self) -> bytes:
        """The canonical bytes: compact, keys in a fixed order."""
        return encode(self)


class Referrer(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A manifest about another one, such as its signature or bill of materials (OCI 1.1, "referrers")."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: str = ""
    config: Descriptor
    layers: Annotated[list[Descriptor], msgspec.Meta(max_length=_MAX_LAYERS)]
    subject: Descriptor
    annotations: dict[str, str] = {}

    @classmethod
    def parse(cls, data: bytes, *, what: str = "The attached manifest") -> Referrer:
        """Read and check a manifest with a subject.

        Raises:
            InvalidModelFile: It has none, is no manifest, its kind is no media type, or a layer's path could lead out
                of a directory.
        """
        manifest = decode(data, cls, what=what)
        _check_paths(manifest.layers, what=what)
        if not _MEDIA_TYPE.fullmatch(manifest.kind):
            raise InvalidModelFile(what, f"its artifact type {manifest.kind[:80]!r} is no media type")
        return manifest

    @property
    def kind(self) -> str:
        """Its artifact type, or the config's where it does not say (OCI 1.1, "Listing Referrers")."""
        return self.artifact_type or self.config.media_type

    def encode(self) -> bytes:
        """The canonical bytes."""
        return encode(self)


def _check_paths(layers: list[Descriptor], *, what: str) -> None:
    names = [layer.filepath for layer in layers if layer.filepath]
    for name in names:
        check_file_name(name, what=what)
    if len(set(names)) != len(names):
        raise InvalidModelFile(what, "two layers have the same path")


class ModelDescriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """ModelPack's general information about a model."""

    created_at: str | None = None
    """RFC 3339."""
    family: str | None = None
    name: str | None = None
    title: str | None = None
    description: str | None = None
    version: str | None = None
    vendor: str | None = None
    licenses: list[str] = []
    """SPDX expressions where they are known."""
    source_url: str | None = msgspec.field(default=None, name="sourceURL")


class ModelProperties(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """ModelPack's technical information about a model."""

    architecture: str | None = None
    """ModelPack's word: ``transformer``. The GGUF's own is the descriptor's `family`."""
    format: str | None = None
    param_size: str | None = None
    """As ``135m``, ``1.1b``."""
    precision: str | None = None
    quantization: str | None = None


class ModelFs(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The digests of the uncompressed layers, in the manifest's order."""

    type: Literal["layers"]
    diff_ids: list[Digest]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The config document of a ModelPack artifact."""

    descriptor: ModelDescriptor
    modelfs: ModelFs
    config: ModelProperties = msgspec.field(default_factory=ModelProperties)

    @classmethod
    def parse(cls, data: bytes, *, what: str = "The model config") -> ModelConfig:
        """Read and check a config.

        Raises:
            InvalidModelFile: It is not a ModelPack config.
        """
        return decode(data, cls, what=what)

    def encode(self) -> bytes:
        """The canonical bytes."""
        return encode(self)


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """``index.json`` of an OCI layout: the list of references."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.index.v1+json"] | None = None
    manifests: list[Descriptor]
    annotations: dict[str, str] = {}


_T = TypeVar("_T")


def _decode_digest(kind: type, value: object) -> object:
    if kind is Digest:
        if not isinstance(value, str):
            raise ValueError("Expected a digest")
        try:
            return Digest(value)
        except InvalidReference as e:
            raise ValueError(e.message) from e
    if kind is object:
        return value
    raise NotImplementedError


def decode(data: bytes, kind: type[_T], *, what: str) -> _T:
    """Parse a JSON document of a known shape. Unknown members are ignored, as OCI demands.

    Raises:
        InvalidModelFile: Too long, not JSON, or of another shape.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidModelFile(what, f"it is longer than {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_decode_digest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        reason = "".join(c if c.isprintable() else "?" for c in str(e)[:300])  # it may repeat what was sent
        raise InvalidModelFile(what, reason.rstrip(".") or "nested too deeply") from e


def encode(document: msgspec.Struct) -> bytes:
    """The canonical bytes of a document."""
    return msgspec.json.encode(document, order="deterministic", enc_hook=str)


def check_file_name(name: str, *, what: str) -> None:
    """Refuse a path that could leave the directory it is unpacked in.

    Raises:
        InvalidModelFile: Absolute, empty, with ``..``, a backslash or control characters, or too long.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
    if bad or len(name) > 1024 or "\\" in name or not name.isprintable():
        raise InvalidModelFile(what, f"the path {name[:80]!r} is not allowed")


@dataclass(frozen=True, slots=True)
class PackageReferences:
    """The digests that a document keeps alive, and those among them that are documents themselves."""

    blobs: frozenset[Digest]
    documents: frozenset[Digest] = field(default_factory=frozenset[Digest])


def _digest(text: str, what: str) -> Digest:
    try:
        return Digest(text)
    except InvalidReference as e:
        raise InvalidModelFile(what, e.message.rstrip(".")) from e


def references_of(data: bytes, *, what: str) -> PackageReferences:
    """Every blob that a manifest or index of any kind refers to, ours or foreign. What it is attached to is none of
    them: a subject need not be there.

    Raises:
        InvalidModelFile: The document is not JSON.
    """
    blobs: set[Digest] = set()
    documents: set[Digest] = set()
    document = decode(data, object, what=what)
    if isinstance(document, dict):
        document = {k: v for k, v in cast("dict[str, object]", document).items() if k != "subject"}
    pending: list[object] = [document]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(cast("list[object]", node))
        elif isinstance(node, dict):
            members = cast("dict[str, object]", node)
            pending.extend(members.values())
            if isinstance(text := members.get("digest"), str):
                blobs.add(digest := _digest(text, what))
                if members.get("mediaType") in (MANIFEST_TYPE, INDEX_TYPE):
                    documents.add(digest)
    return PackageReferences(frozenset(blobs), frozenset(documents))


class _About(msgspec.Struct, frozen=True):
    subject: Descriptor | None = None


def subject_of(data: bytes, *, what: str) -> Digest | None:
    """What a manifest of any kind is attached to; None where it stands for itself.

    Raises:
        InvalidModelFile: It is not JSON, or its subject is no descriptor.
    """
    subject = decode(data, _About, what=what).subject
    return subject and subject.digest
