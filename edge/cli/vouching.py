"""Who vouches for a model, as commands show it."""

from __future__ import annotations

import msgspec

from edge.config import Settings
from edge.errors import EdgeError, ModelNotFound
from edge.store.files import translated
from edge.store.models import ModelStore, StoredModel
from edge.trust.keys import TrustFiles
from edge.trust.policy import judge, sbom_of


class Vouching(msgspec.Struct, frozen=True, kw_only=True):
    """What the signatures of a model are worth on this device.

    Attributes:
        state: ``trusted``, ``unsigned`` or ``untrusted``.
        reason: Why it is not trusted, in words that end a sentence.
        sbom: Digest of the bill of materials that is attached.
    """

    state: str
    reason: str = ""
    release: int | None = None
    key_id: str | None = None
    key_name: str | None = None
    sbom: str | None = None

    @property
    def in_words(self) -> str:
        if self.state == "trusted":
            return f"good, release {self.release}, by {self.key_name}"
        return "none" if self.state == "unsigned" else f"NOT TRUSTED: {self.reason}"


def vouching(store: ModelStore, model: StoredModel, settings: Settings) -> Vouching:
    """Judge a model as it would be if the policy were to enforce; what cannot be read is a reason."""
    try:
        found = judge(store, model.digest, model.ref, TrustFiles.of(settings).load())
        attached = sbom_of(store, model.digest)
    except EdgeError as e:
        return Vouching(state="untrusted", reason=e.message.rstrip("."))
    return Vouching(
        state=found.state, reason=found.reason, release=found.release, key_id=found.key_id, key_name=found.key_name,
        sbom=attached and str(attached.digest),
    )  # fmt: skip


def read_sbom(store: ModelStore, model: StoredModel) -> str:
    """The bill of materials that is attached to a model.

    Raises:
        ModelNotFound: None is.
        StoreError: It cannot be read.
    """
    attached = sbom_of(store, model.digest)
    if attached is None:
        message = f"No bill of materials is attached to '{model.ref}'."
        raise ModelNotFound(str(model.ref), message=message, hint="edge sign attaches one, and so does edge quantize.")
    path = store.blobs.path(attached.digest)
    with translated(path, "Reading"):
        return path.read_text("utf-8", "replace")
