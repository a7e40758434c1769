"""A small verifier of model-signing's signatures, on `cryptography` alone.

It accepts what model-signing 1.1.1 accepts of its own bundles, and nothing else: a test holds both side by side.
No verdict here asks a clock: certificates are judged at the time from which the signer's is valid, as model-signing
does, so a board that boots in 1970 verifies like any other. Who must not sign any longer is on the revocation list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from edge.errors import InvalidModelFile
from edge.store.digest import Digest

from .dsse import Bundle, Statement, pae, parse_statement

_HASHES: Mapping[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512,
}  # fmt: skip
"""The curves that model-signing signs with, and the hash that goes with each."""
_MAX_CHAIN = 8
_UNREADABLE = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What `cryptography` raises at certificates that break their format; they have no base class of their own."""


class BadSignature(Exception):
    """The signature is not this key's, or not of these bytes; says why in words that end a sentence."""


class UnknownSigner(Exception):
    """No authority that was given vouches for the signer's certificate; says why in words that end a sentence."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement that was verified.

    Attributes:
        key_ids: Of the key that signed and, with certificates, of each above it up to the authority.
    """

    statement: Statement
    key_ids: tuple[str, ...]
    signer: str = ""
    """The subject of the signer's certificate, where there is one."""


def check_curve(key: object) -> ec.EllipticCurvePublicKey:
    """The key, if it is of a kind that signatures may have.

    Raises:
        BadSignature: It is of another kind.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise BadSignature("its key is on none of the curves P-256, P-384 and P-521")
    return key


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """The SHA-256 of the key's PEM, as hexadecimal digits: what model-signing writes as a hint."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def verify_with_key(bundle: Bundle, key: ec.EllipticCurvePublicKey) -> Signed:
    """The statement, if this key signed it.

    Raises:
        BadSignature: It did not.
        InvalidModelFile: It did, and it is no statement of this kind.
    """
    named = bundle.verification_material.public_key
    if named is None:
        raise BadSignature("it was made with a certificate")
    if named.hint and named.hint != key_id(key):
        raise BadSignature("it was made with another key")
    _check(bundle, key)
    return Signed(parse_statement(bundle.dsse_envelope.payload), (key_id(key),))


def verify_with_authorities(bundle: Bundle, authorities: Sequence[x509.Certificate]) -> Signed:
    """The statement, if somebody signed it for whom one of these authorities vouches.

    Raises:
        UnknownSigner: None of them does, or not for signing.
        BadSignature: The certificate's key did not sign it.
        InvalidModelFile: It did, and it is no statement of this kind; or a certificate cannot be read.
    """
    leaf, *between = certificates_of(bundle)
    with _foreign_certificates():
        chain = _chain(leaf, between, authorities)
        if not _may_sign(leaf):
            raise UnknownSigner("the certificate is not for signing")
        _check(bundle, check_curve(leaf.public_key()))
        ids, signer = tuple(map(certificate_id, chain)), leaf.subject.rfc4514_string()
    return Signed(parse_statement(bundle.dsse_envelope.payload), ids, signer)


def certificates_of(bundle: Bundle) -> list[x509.Certificate]:
    """The certificates of a bundle, the signer's first.

    Raises:
        InvalidModelFile: One cannot be read, or there is none.
    """
    chain = bundle.verification_material.x509_certificate_chain
    if chain is None:
        raise InvalidModelFile("The signature", "it has no certificate")
    with _foreign_certificates():
        return [x509.load_der_x509_certificate(c.raw_bytes) for c in chain.certificates]


@contextmanager
def _foreign_certificates() -> Generator[None]:
    """Certificates are parsed piece by piece, when they are asked; any piece may prove broken."""
    try:
        yield
    except _UNREADABLE as e:
        raise InvalidModelFile("The signature", "a certificate in it cannot be read") from e


def certificate_id(certificate: x509.Certificate) -> str:
    """The id of a certificate's key, whatever kind it is: the SHA-256 of its PEM."""
    pem = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _check(bundle: Bundle, key: ec.EllipticCurvePublicKey) -> None:
    check_curve(key)
    envelope = bundle.dsse_envelope
    try:
        key.verify(envelope.signatures[0].sig, pae(envelope.payload), ec.ECDSA(_HASHES[key.curve.name]()))
    except InvalidSignature as e:
        raise BadSignature("it does not fit what it is said to have signed") from e


def _chain(
    leaf: x509.Certificate, between: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> list[x509.Certificate]:
    if not authorities:
        raise UnknownSigner("no authority is trusted here")
    # What the Web's certificates must have is none of a signer's business; what an authority must have is the same.
    policies = {"ca_policy": ExtensionPolicy.webpki_defaults_ca(), "ee_policy": ExtensionPolicy.permit_all()}
    builder = PolicyBuilder().store(Store(list(authorities))).time(leaf.not_valid_before_utc)
    verifier = builder.max_chain_depth(_MAX_CHAIN).extension_policies(**policies).build_client_verifier()
    try:
        return verifier.verify(leaf, list(between)).chain
    except VerificationError as e:
        raise UnknownSigner("no trusted authority vouches for its certificate") from e


def _may_sign(leaf: x509.Certificate) -> bool:
    extensions = leaf.extensions
    try:
        if extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            return True
    except x509.ExtensionNotFound:
        pass
    try:
        return ExtendedKeyUsageOID.CODE_SIGNING in extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False


def difference(signed: Mapping[str, Digest], found: Mapping[str, Digest]) -> str:
    """What is not as it was signed, in words that end a sentence; empty where all is."""
    if extra := sorted(found.keys() - signed.keys()):
        return f"the file {extra[0]!r} was added after it was signed"
    if missing := sorted(signed.keys() - found.keys()):
        return f"the file {missing[0]!r} was signed and is missing"
    if changed := sorted(name for name in signed if signed[name] != found[name]):
        return f"the file {changed[0]!r} is not the one that was signed"
    return ""
