"""Keys, authorities and signed packages for the tests of trust."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge.config import Settings

PAST = datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC)
YEAR = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Pair:
    """A private key and its public one, as PEM files."""

    private: Path
    public: Path
    key: ec.EllipticCurvePrivateKey


def make_pair(directory: Path, name: str, curve: ec.EllipticCurve | None = None) -> Pair:
    """A new key pair, on P-256 unless said otherwise."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    pair = Pair(directory / f"{name}.key", directory / f"{name}.pem", key)
    pair.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return pair


@dataclass(frozen=True)
class Holder:
    """Somebody with a certificate."""

    pair: Pair
    certificate: x509.Certificate
    path: Path


def make_holder(
    directory: Path, name: str, *, by: Holder | None = None, is_authority: bool = False, can_sign: bool = True,
    start: datetime.datetime = PAST, years: int = 60,
) -> Holder:  # fmt: skip
    """A certificate, of itself where nobody else vouches."""
    pair = make_pair(directory, name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_key = by.pair.key if by else pair.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(pair.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + years * YEAR)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(_usage(is_authority=is_authority, can_sign=can_sign), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(pair.key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if can_sign and not is_authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    path = directory / f"{name}.crt.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return Holder(pair, certificate, path)


def _usage(*, is_authority: bool, can_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=can_sign and not is_authority, content_commitment=False, key_encipherment=not can_sign,
        data_encipherment=False, key_agreement=False, key_cert_sign=is_authority, crl_sign=is_authority,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def settings_at(home: Path, trust: str = "enforce") -> Settings:
    """An appliance that came with no keys."""
    return replace(Settings(home=home), trust=trust, trusted_keys=home / "installed", seed=home / "no-seed")
