"""Sign packages of a store with OpenSSF model-signing, offline: with an EC key, or with a certificate of an authority.

One statement covers the files, as model-signing has it, and beside them what it has no place for: the digest of the
manifest, the name, and a release number that rises. So `model_signing verify` accepts the same bundle for the
directory of the files, and a registry that moves a tag to something else that we signed once is found out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from edge.errors import ConfigError, DigestMismatch, InvalidModelFile, MissingExtra, root_cause
from edge.store.digest import Digest
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.trust.dsse import BUNDLE_TYPE, CLAIM, MAX_RELEASE
from edge.trust.policy import SIGNATURE_TYPE, sbom_of

RELEASE = "dev.slm-edge.release"
"""Annotation of the attached signature, for people; what counts stands in the statement."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """What to sign with.

    Attributes:
        key: PEM file of the private key, on P-256, P-384 or P-521.
        password: Of that file, where it is encrypted.
        certificate: PEM file of the key's certificate; None signs with the bare key.
        chain: PEM files of the certificates between that one and its authority, which devices trust.
    """

    key: Path
    password: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()


class _Signature(Protocol):
    def write(self, path: Path) -> None: ...


class _Signer(Protocol):
    def sign(self, payload: Any) -> _Signature: ...


def sign_model(store: ModelStore, ref: str | ModelRef, signing_key: SigningKey, *, release: int) -> StoredModel:
    """Sign a model and attach the signature. Reads every byte of its files.

    Args:
        release: Higher than that of any release of this name before; devices refuse to go back.

    Raises:
        MissingExtra: model-signing is not installed.
        ConfigError: The key or the certificate cannot be used, or the release is no number that it can be.
        DigestMismatch: A file of the model is damaged.
        ModelNotFound: There is no such model.
        StoreError: The store cannot be read or written.
    """
    if not 0 < release <= MAX_RELEASE:
        raise ConfigError(f"A release is a number from 1 to {MAX_RELEASE}, got {release}.")
    model = store.get(ref)
    directory = store.named_directory(model)
    claim: dict[str, object] = {"manifest": str(model.digest), "name": str(model.ref), "release": str(release)}
    if (sbom := sbom_of(store, model.digest)) is not None:
        claim["sbom"] = str(sbom.digest)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.sig"
        _signature(model, directory, claim, signing_key).write(path)
        store.attach(model.digest, SIGNATURE_TYPE, [PackageFile(path, path.name, BUNDLE_TYPE)], {RELEASE: str(release)})
    return model


def _signature(model: StoredModel, directory: Path, claim: dict[str, object], signing_key: SigningKey) -> _Signature:
    try:
        hashing: Any = import_module("model_signing.hashing")
        # Inside it, because its API signs files and nothing else; the version is pinned.
        signing: Any = import_module("model_signing._signing.signing")
    except ImportError as e:
        raise MissingExtra("sign", needed_for="Signing a model") from e
    hashed = hashing.Config().hash(directory)
    found = {item.identifier: Digest(f"sha256:{item.digest.digest_hex}") for item in hashed.resource_descriptors()}
    _check_bytes(model, found)
    payload = signing.Payload(hashed)
    payload.statement.pb.predicate.update({CLAIM: claim})
    return _signer(signing_key).sign(payload)


def _check_bytes(model: StoredModel, found: dict[str, Digest]) -> None:
    expected = {file.name: file.digest for file in model.files}
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            raise DigestMismatch(f"The file {name} of {model.ref}", expected=expected[name], actual=found[name])
    if other := sorted(expected.keys() ^ found.keys()):
        raise InvalidModelFile(str(model.ref), f"model-signing passes over its file {other[0]!r}")


def _signer(signing_key: SigningKey) -> _Signer:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        if signing_key.certificate is None:
            password = signing_key.password.encode() if signing_key.password else None
            by_key: Any = import_module("model_signing._signing.sign_ec_key")
            return by_key.Signer(signing_key.key, password)
        by_certificate: Any = import_module("model_signing._signing.sign_certificate")
        chain = signing_key.chain or (signing_key.certificate,)  # it reads no empty list
        return by_certificate.Signer(signing_key.key, signing_key.certificate, chain)
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as e:
        raise ConfigError(
            f"{signing_key.key} cannot be signed with: {root_cause(e).rstrip('.')}.",
            hint="It takes the PEM file of a private key on P-256, P-384 or P-521: "
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        ) from e
