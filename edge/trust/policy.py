"""Whether a model may come in, be activated and be loaded: its signatures, held against what this device trusts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from edge.config import Settings
from edge.errors import (
    ConfigError,
    EdgeError,
    ReleaseTooOld,
    StoreError,
    Unsigned,
)
from edge.store.digest import Digest
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore

from .dsse import BUNDLE_TYPE
from .keys import Trust, TrustFiles

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
        error: What `enforce` refuses it with; None where it does not.
    """

    state: State
    reason: str = ""
    release: int | None = None
    key_id: str | None = None
    key_name: str | None = None
    name: str | None = None
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
        force: Take an older release than was confirmed, and others from that one on.

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
        files.lower(verdict.name, verdict.release)
        return admit(store, manifest_digest, ref, settings)
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
    shown = str(ref or manifest_digest)
    error = Unsigned(shown, "it has no signature", hint="Have it signed where it is made: edge sign MODEL.")
    return Verdict("unsigned", error.reason, error=error)
