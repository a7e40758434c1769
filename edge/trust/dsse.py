"""Signed statements in Sigstore bundles, as OpenSSF model-signing 1.x writes them; read strictly.

Formats: DSSE v1.0.2 (protocol.md, envelope.md), Sigstore bundle v0.3 (protobuf-specs, sigstore_bundle.proto), in-toto
Statement v1, and the predicate ``https://model_signing/signature/v1.0`` (model-signing 1.1.1, ``_signing/signing.py``).
Not read: bundles of model-signing before 1.0, other hashes than sha256, and files hashed in shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from edge.errors import InvalidModelFile
from edge.store.digest import Digest
from edge.store.manifest import SIGNATURE_TYPE, ModelRef, decode

BUNDLE_TYPE = SIGNATURE_TYPE
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
CLAIM = "dev.slm-edge.release"
"""Member of the predicate with what model-signing has no place for. Its readers pass over members they do not know, as
version 1.0 of the predicate demands."""
MAX_RELEASE = 10**15 - 1
_MAX_FILES = 8192
_MAX_CERTIFICATES = 16


class _Strict(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What model-signing's own reader refuses to have more members of."""


class Signature(_Strict, frozen=True):
    """One signature of an envelope."""

    sig: bytes
    keyid: str | None = None


class Envelope(_Strict, frozen=True):
    """Signed bytes, their kind, and the signature over both."""

    payload: bytes
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[Signature], msgspec.Meta(min_length=1, max_length=1)]


class PublicKey(_Strict, frozen=True):
    """Says which key it was, and gives none."""

    hint: str | None = None


class Certificate(_Strict, frozen=True):
    """DER."""

    raw_bytes: bytes


class Certificates(_Strict, frozen=True):
    """The signer's first, then those between it and its authority."""

    certificates: Annotated[list[Certificate], msgspec.Meta(min_length=1, max_length=_MAX_CERTIFICATES)]


class Material(_Strict, frozen=True):
    """What a verifier needs besides the keys that it trusts. Entries of transparency logs are passed over."""

    public_key: PublicKey | None = None
    x509_certificate_chain: Certificates | None = None
    tlog_entries: list[object] = []


class Bundle(_Strict, frozen=True):
    """A Sigstore bundle around an envelope."""

    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: Material
    dsse_envelope: Envelope


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What our own signatures say beyond the files: which manifest, under which name, and how new it is."""

    manifest: Digest
    name: str
    """``name:tag``."""
    digits: Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{0,14}$")] = msgspec.field(name="release")
    """A text, because model-signing turns numbers into floating point."""
    sbom: Digest | None = None
    """Of the bill of materials that was attached when it was signed."""

    @property
    def release(self) -> int:
        """Rises with each release of that name."""
        return int(self.digits)


@dataclass(frozen=True, slots=True)
class Statement:
    """What was signed."""

    name: str
    """The directory's name, as the signer had it; nothing rests on it."""
    files: dict[str, Digest]
    claim: Claim | None
    """None where it was signed by another tool."""


def parse_bundle(data: bytes) -> Bundle:
    """Read a bundle, which nobody has verified yet.

    Raises:
        InvalidModelFile: It is no bundle of this kind, or longer than 4 MiB.
    """
    bundle = decode(data, Bundle, what="The signature")
    material = bundle.verification_material
    if (material.public_key is None) == (material.x509_certificate_chain is None):
        raise InvalidModelFile("The signature", "it names a key and certificates, or neither")
    return bundle


def pae(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of an in-toto payload."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


class _Resource(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    algorithm: Literal["sha256"]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Serialization(msgspec.Struct):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: Annotated[list[_Resource], msgspec.Meta(max_length=_MAX_FILES)]
    claim: Claim | None = msgspec.field(default=None, name=CLAIM)


class _Subject(msgspec.Struct):
    name: str
    digest: dict[str, str]


class _Statement(msgspec.Struct):
    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[list[_Subject], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: Literal["https://model_signing/signature/v1.0"] = msgspec.field(name="predicateType")
    predicate: _Predicate


def parse_statement(payload: bytes) -> Statement:
    """Read what a verified envelope holds.

    Raises:
        InvalidModelFile: It is no statement of this kind, or contradicts itself.
    """
    found = decode(payload, _Statement, what="The signed statement")
    resources = found.predicate.resources
    root = hashlib.sha256(b"".join(bytes.fromhex(r.digest) for r in resources)).hexdigest()
    if found.subject[0].digest.get("sha256") != root:
        raise InvalidModelFile("The signed statement", "its list of files is not the one that it names")
    files = {r.name: Digest(f"sha256:{r.digest}") for r in resources}
    if len(files) != len(resources):
        raise InvalidModelFile("The signed statement", "it has a file twice")
    if (claim := found.predicate.claim) is not None:
        ModelRef.parse(claim.name)
    return Statement(found.subject[0].name, files, claim)
