"""A model as a seed: an OCI layout of its own, from which a device's empty store is filled."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge.errors import DigestMismatch
from edge.store.exporting import attached_to
from edge.store.manifest import ARTIFACT_TYPE, INDEX_TYPE, LAYOUT, MANIFEST_TYPE, REF_NAME, Descriptor, Index, encode
from edge.store.models import ModelStore


def write_seed(store: ModelStore, ref: str, directory: Path) -> str:
    """Copy one model of `store`, and what is attached to it as its signature, into a new layout, readable by any user,
    and check every byte; its full name.

    The same model gives the same bytes, so the layer of an image does too.

    Raises:
        ModelNotFound: There is no such model.
        DigestMismatch: A blob of it is damaged.
    """
    model = store.get(ref)
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    attached = list(attached_to(store, model.digest))
    documents = [model.manifest, *(referrer for _, referrer in attached)]
    files = {blob.digest for document in documents for blob in (document.config, *document.layers)}
    for digest in sorted({model.digest, *(found.digest for found, _ in attached)} | files):
        shutil.copyfile(store.blobs.path(digest), blobs / digest.hex)
    entry = Descriptor(
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        digest=model.digest,
        size=(blobs / model.digest.hex).stat().st_size,
        annotations={REF_NAME: str(model.ref)},
    )
    (directory / "oci-layout").write_bytes(LAYOUT)
    index = Index(schema_version=2, media_type=INDEX_TYPE, manifests=[entry, *(found for found, _ in attached)])
    (directory / "index.json").write_bytes(encode(index))
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for check in ModelStore(directory).verify(model.ref):
        if not check.is_good:
            raise DigestMismatch(f"{check.name} of {model.ref}", expected=check.expected, actual=str(check.actual))
    return str(model.ref)
