"""Who vouches for a model, as commands show it."""

from __future__ import annotations

import msgspec

from edge.config import Settings
from edge.errors import EdgeError, ModelNotFound, StoreError
from edge.store.digest import Digest, digest_bytes
from edge.store.files import translated
from edge.store.manifest import MAX_DOCUMENT_BYTES
from edge.store.models import ModelStore, StoredModel
from edge.trust.keys import TrustFiles
from edge.trust.policy import judge, sbom_of


class Vouching(msgspec.Struct, frozen=True, kw_only=True):
    """What the signatures of a model are worth on this device.

    Attributes:
        state: ``trusted``, ``unsigned`` or ``untrusted``.
        reason: Why it is not trusted, in words that end a sentence.
        sbom: Digest of the bill of materials that is attached; where one was signed by who is trusted, only that one.
        is_sbom_signed: It is that one.
    """

    state: str
    reason: str = ""
    release: int | None = None
    key_id: str | None = None
    key_name: str | None = None
    sbom: str | None = None
    is_sbom_signed: bool = False

    @property
    def in_words(self) -> str:
        if self.state == "trusted":
            return f"good, release {self.release}, by {self.key_name}"
        return "none" if self.state == "unsigned" else f"NOT TRUSTED: {self.reason}"


def vouching(store: ModelStore, model: StoredModel, settings: Settings) -> Vouching:
    """Judge a model as it would be if the policy were to enforce; what cannot be read is a reason."""
    try:
        found = judge(store, model.digest, model.ref, TrustFiles.of(settings).load())
        signed = found.sbom if found.state == "trusted" else None
        attached = sbom_of(store, model.digest, signed=signed)
    except EdgeError as e:
        return Vouching(state="untrusted", reason=e.message.rstrip("."))
    return Vouching(
        state=found.state, reason=found.reason, release=found.release, key_id=found.key_id, key_name=found.key_name,
        sbom=attached and str(attached.digest), is_sbom_signed=bool(attached and signed),
    )  # fmt: skip


def read_sbom(store: ModelStore, model: StoredModel, vouched: Vouching) -> str:
    """The bill of materials of a model that `vouching` found.

    Raises:
        ModelNotFound: None is attached, or not the one that was signed.
        StoreError: It cannot be read, is too long, or is not the one of its digest.
    """
    if vouched.sbom is None:
        message = f"No bill of materials is attached to '{model.ref}'."
        raise ModelNotFound(str(model.ref), message=message, hint="edge sign attaches one, and so does edge quantize.")
    digest = Digest(vouched.sbom)
    path = store.blobs.path(digest)
    with translated(path, "Reading"), path.open("rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES or digest_bytes(data) != digest:
        raise StoreError(f"The bill of materials {path} is damaged or too long.", hint="Fetch the model again.")
    return data.decode("utf-8", "replace")
