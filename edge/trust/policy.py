"""Whether a model may come in, be activated and be loaded: its signatures, held against what this device trusts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edge.config import Settings
from edge.errors import (
    ConfigError,
    EdgeError,
    InvalidModelFile,
    InvalidReference,
    KeyNotTrusted,
    KeyRevoked,
    ReleaseRevoked,
    ReleaseTooOld,
    SignatureInvalid,
    SignatureMismatch,
    SignedForOtherName,
    StoreError,
    Unsigned,
    Untrusted,
)
from edge.store.digest import Digest, digest_bytes
from edge.store.files import translated
from edge.store.manifest import MAX_DOCUMENT_BYTES, Descriptor, Manifest, ModelRef
from edge.store.models import ModelStore

from .dsse import BUNDLE_TYPE, Bundle, Claim, Statement, parse_bundle
from .keys import Trust, TrustedKey, TrustFiles

SIGNATURE_TYPE = BUNDLE_TYPE
"""Artifact type of the referrer that carries a signature, and media type of its one layer."""
SBOM_TYPE = "application/vnd.cyclonedx+json"
"""The same of an SBOM."""
MAX_SIGNATURES = 32
"""Of one model; what more there are is not looked at."""

State = Literal["off", "trusted", "unsigned", "untrusted"]
log = logging.getLogger("edge.trust")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the signatures of a model are worth here.

    Attributes:
        reason: In words, as the end of a sentence; empty where it is trusted.
        name: The name that it was signed for, where a trusted key signed it.
        release: The number of that release.
        key_id: Of the trusted key, or of the authority that vouches for the signer.
        key_name: What that is called here.
        sbom: Digest of the bill of materials that was signed with it.
        error: What `enforce` refuses it with; None where it does not.
    """

    state: State
    reason: str = ""
    release: int | None = None
    key_id: str | None = None
    key_name: str | None = None
    name: str | None = None
    sbom: Digest | None = None
    error: EdgeError | None = field(default=None, compare=False)


def admit(
    store: ModelStore,
    manifest_digest: Digest,
    ref: str | ModelRef | None,
    settings: Settings,
    *,
    force: bool = False,
) -> Verdict:
    """Judge a model by the policy: before a name becomes visible, at activation and at load.

    The manifest and its signatures (referrers of type `SIGNATURE_TYPE`) are in the store; the files need not be yet.
    Their bytes are not read here: the manifest is what is signed, and whoever brings a blob checks its digest.

    Args:
        ref: The name that it has or shall have here, or had in the place that it comes from; None where it has none.
            It has to be the name that was signed, or end in it after a slash: ``plant/smollm2:135m`` is one of
            ``smollm2:135m``.
        force: Take an older release than was confirmed. Others from that one on are only taken after `insist`.

    Raises:
        Untrusted: The policy is `enforce`, and a subclass says what is wrong.
        ConfigError: The policy is `enforce`, and what is trusted cannot be read.
    """
    if settings.trust == "off":
        return Verdict("off", "the trust policy is off")
    files = TrustFiles.of(settings)
    try:
        trust = files.load()
        verdict = judge(store, manifest_digest, ref, trust)
    except (ConfigError, StoreError) as e:
        trust, verdict = None, Verdict("untrusted", e.message.rstrip("."), error=e)
    if force and isinstance(verdict.error, ReleaseTooOld) and verdict.name and verdict.release is not None:
        assert trust is not None
        releases = {**trust.releases, verdict.name: verdict.release}
        verdict = judge(store, manifest_digest, ref, replace(trust, releases=releases))
    if verdict.error is not None and settings.trust == "enforce":
        raise verdict.error
    if verdict.error is not None and (trust is None or trust.keys):
        log.warning("%s Under trust = enforce it is refused.", verdict.error.message)
    return verdict


def confirm(store: ModelStore, manifest_digest: Digest, settings: Settings) -> None:
    """A release proved itself: older ones of its name are refused from now on. Nothing happens where no trusted key
    signed it, or the policy is off.

    Raises:
        ConfigError, StoreError: What is trusted cannot be read or written.
    """
    if settings.trust == "off":
        return
    files = TrustFiles.of(settings)
    verdict = judge(store, manifest_digest, None, files.load())
    if verdict.state == "trusted" and verdict.name and verdict.release is not None:
        files.confirm(verdict.name, verdict.release)


def insist(store: ModelStore, manifest_digest: Digest, ref: str | ModelRef | None, settings: Settings) -> None:
    """What `admit` took by force has come: it and later releases of its name are taken from now on.

    Raises:
        ConfigError, StoreError: What is trusted cannot be read or written.
    """
    if settings.trust == "off":
        return
    files = TrustFiles.of(settings)
    verdict = judge(store, manifest_digest, ref, files.load())
    if isinstance(verdict.error, ReleaseTooOld) and verdict.name and verdict.release is not None:
        files.lower(verdict.name, verdict.release)


def sbom_of(store: ModelStore, manifest_digest: Digest, *, signed: Digest | None = None) -> Descriptor | None:
    """The bill of materials that is attached to a model; None where none is.

    Args:
        signed: Only the one of this digest.

    Raises:
        InvalidModelFile, StoreError: What is attached is damaged.
    """
    for descriptor in store.referrers(manifest_digest, SBOM_TYPE):
        for layer in store.read_referrer(descriptor).layers:
            if layer.media_type == SBOM_TYPE and signed in (None, layer.digest):
                return layer
    return None


def check_source(source: str, settings: Settings) -> None:
    """Refuse beforehand what can have no signature where it comes from.

    Raises:
        Unsigned: The policy is `enforce`, and the source is no registry.
    """
    if settings.trust == "enforce" and not source.startswith("oci://"):
        raise Unsigned(
            source,
            "only packages carry signatures, and this is none",
            hint="Pull it from a registry (oci://HOST/NAME:TAG) or import a bundle (edge import FILE). The policy is "
            "the setting 'trust'.",
        )


def judge(store: ModelStore, manifest_digest: Digest, ref: str | ModelRef | None, trust: Trust) -> Verdict:
    """What the best of a model's signatures is worth, whatever the policy. Reads the store and changes nothing.

    Raises:
        StoreError: The store's list cannot be read.
    """
    case = _Case(store, manifest_digest, str(ref or ""), trust)
    if (why := trust.revoked.get(manifest_digest)) is not None:
        reason = f"this release of it is revoked{f' ({why})' if why else ''}"
        error = ReleaseRevoked(case.shown, reason, hint="Get a newer release.")
        return Verdict("untrusted", error.reason, error=error)
    descriptors = store.referrers(manifest_digest, SIGNATURE_TYPE)[:MAX_SIGNATURES]
    verdicts = [case.verdict(descriptor) for descriptor in descriptors]
    if not verdicts:
        error = Unsigned(case.shown, "it has no signature", hint="Have it signed where it is made: edge sign MODEL.")
        return Verdict("unsigned", error.reason, error=error)
    return min(verdicts, key=lambda verdict: (_RANKS.index(type(verdict.error)), -(verdict.release or 0)))


_RANKS: list[type[object]] = [
    type(None), KeyRevoked, ReleaseTooOld, SignedForOtherName, SignatureMismatch, SignatureInvalid, KeyNotTrusted,
]  # fmt: skip
"""Of several signatures the good one of the highest release counts, else the one that says most."""
_AGAIN = "Fetch it again from who makes it: what is here was changed, or is damaged."


@dataclass(frozen=True, slots=True)
class _Case:
    """A model that is judged."""

    store: ModelStore
    digest: Digest
    name: str
    trust: Trust

    @property
    def shown(self) -> str:
        return self.name or str(self.digest)

    def verdict(self, descriptor: Descriptor) -> Verdict:
        """What one signature is worth."""
        key, claim, error = None, None, None
        try:
            key, statement = self._verified(parse_bundle(self._bundle(descriptor)))
            claim = statement.claim
            self._check_files(statement)
            self._check_claim(claim)
        except Untrusted as e:
            error = e
        except (InvalidModelFile, InvalidReference, StoreError) as e:
            reason = f"its signature cannot be read ({e.message.rstrip('.')})"
            error = SignatureInvalid(self.shown, reason, hint=_AGAIN)
        return Verdict(
            state="untrusted" if error else "trusted",
            reason=error.reason if error else "",
            release=claim.release if claim else None,
            key_id=key.id if key else None,
            key_name=key.name if key else None,
            name=claim.name if claim else None,
            sbom=claim.sbom if claim else None,
            error=error,
        )

    def _bundle(self, descriptor: Descriptor) -> bytes:
        layers = self.store.read_referrer(descriptor).layers
        found = [layer for layer in layers if layer.media_type == BUNDLE_TYPE]
        if len(found) != 1:
            raise InvalidModelFile("The signature", f"it has {len(found)} layers of its type instead of one")
        return self._document(found[0].digest)

    def _document(self, digest: Digest) -> bytes:
        path = self.store.blobs.path(digest)
        with translated(path, "Reading"), path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
        if digest_bytes(data) != digest:
            raise InvalidModelFile(str(path), "its bytes are not those of its digest")
        return data

    def _verified(self, bundle: Bundle) -> tuple[TrustedKey, Statement]:
        from .verify import BadSignature, UnknownSigner  # brings cryptography, which nobody needs who has no signature

        try:
            named = bundle.verification_material.public_key
            return self._by_authority(bundle) if named is None else self._by_key(bundle, named.hint or "")
        except BadSignature as e:
            raise SignatureInvalid(self.shown, f"its signature is not good, for {e}", hint=_AGAIN) from e
        except UnknownSigner as e:
            raise self._not_trusted(str(e)) from e

    def _by_key(self, bundle: Bundle, hint: str) -> tuple[TrustedKey, Statement]:
        from .verify import BadSignature, verify_with_key

        self._check_revoked((hint,))
        bad: BadSignature | None = None
        for candidate in self.trust.keys:
            if candidate.key is None or hint not in ("", candidate.id):
                continue
            try:
                signed = verify_with_key(bundle, candidate.key)
            except BadSignature as e:
                bad = e
            else:
                self._check_revoked(signed.key_ids)
                return candidate, signed.statement
        raise bad or self._not_trusted(f"nobody here trusts the key {hint[:64]!r} that signed it")

    def _by_authority(self, bundle: Bundle) -> tuple[TrustedKey, Statement]:
        from .verify import verify_with_authorities

        authorities = [key for key in self.trust.keys if key.authority is not None]
        signed = verify_with_authorities(bundle, [key.authority for key in authorities if key.authority])
        self._check_revoked(signed.key_ids)
        return next(key for key in authorities if key.id == signed.key_ids[-1]), signed.statement

    def _not_trusted(self, reason: str) -> KeyNotTrusted:
        hint = (
            "If you know whose it is, get the key from them, not from where the model is, and: edge trust add KEY.pem."
        )
        return KeyNotTrusted(self.shown, reason, hint=hint)

    def _check_revoked(self, key_ids: Sequence[str]) -> None:
        for key_id in key_ids:
            if (why := self.trust.revoked.get(key_id)) is not None:
                reason = f"the key {key_id[:16]}… that signed it is revoked{f' ({why})' if why else ''}"
                raise KeyRevoked(self.shown, reason, hint="Get a release that was signed with another key.")

    def _check_files(self, statement: Statement) -> None:
        from .verify import difference

        manifest = Manifest.parse(self._document(self.digest), what=f"The manifest of {self.shown}")
        files = {layer.filepath or layer.digest.hex: layer.digest for layer in manifest.layers}
        problem = difference(statement.files, files)
        if not problem and statement.claim is None:
            problem = "the signature is for its files only, and says no name and no release"
        if not problem and statement.claim and statement.claim.manifest != self.digest:
            problem = "its files are those that were signed, and its manifest is another"
        if problem:
            raise SignatureMismatch(self.shown, problem, hint=_AGAIN)

    def _check_claim(self, claim: Claim | None) -> None:
        if claim is None:
            return
        if self.name and self.name != claim.name and not self.name.endswith(f"/{claim.name}"):
            raise SignedForOtherName(
                self.shown,
                f"it was signed as '{claim.name}'",
                hint="Use it under that name. If nobody here renamed it, the tag was moved where it came from.",
            )
        if claim.release < (least := self.trust.releases.get(claim.name, 0)):
            raise ReleaseTooOld(self.shown, release=claim.release, least=least)
