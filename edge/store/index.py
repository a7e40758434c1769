"""Entries of the index, and the descriptors that stand in manifests."""

from __future__ import annotations

import logging

import msgspec

from edge.errors import InvalidReference

from .blobs import Staged
from .digest import Digest
from .manifest import (
    ARTIFACT_TYPE,
    DOC_TYPE,
    FILEPATH,
    MANIFEST_TYPE,
    OURS,
    REF_NAME,
    SUBJECT,
    TITLE,
    WEIGHT_CONFIG_TYPE,
    WEIGHT_TYPE,
    Descriptor,
    Index,
    ModelRef,
)
from .stored import PackageFile

ADDED = f"{OURS}added"
"""Annotation of an index entry: the Unix time at which the model came into this store."""
log = logging.getLogger("edge.store")


def models_of(index: Index) -> dict[ModelRef, Descriptor]:
    """The index's entries that are models under a name; others belong to other tools and are left alone."""
    found: dict[ModelRef, Descriptor] = {}
    for entry in index.manifests:
        name = entry.annotations.get(REF_NAME)
        if name and entry.media_type == MANIFEST_TYPE and entry.artifact_type == ARTIFACT_TYPE:
            try:
                found[ModelRef.parse(name)] = entry
            except InvalidReference as e:  # another tool's name for a model must not hide ours
                log.warning("an entry of the index is passed over: %s", e.message)
    return found


def with_entry(index: Index, ref: ModelRef, entry: Descriptor | None, *, added: float) -> Index:
    """The index with another entry under a name, or with none where `entry` is None.

    Args:
        added: The Unix time now.
    """
    kept = [known for known in index.manifests if known.annotations.get(REF_NAME) != str(ref)]
    if entry:
        notes = {REF_NAME: str(ref), ADDED: f"{added:.3f}"}
        kept.append(msgspec.structs.replace(entry, annotations=notes))
    return msgspec.structs.replace(index, manifests=kept)


def with_referrer(index: Index, found: Descriptor, subject: Digest) -> Index:
    """The index with a manifest that is attached to another one, and has no name. One that is there keeps its place:
    who looks at a bounded number of them sees the oldest, whatever is attached later."""
    entry = msgspec.structs.replace(found, annotations={SUBJECT: subject})
    kept = [
        entry if known.digest == found.digest and REF_NAME not in known.annotations else known
        for known in index.manifests
    ]
    return msgspec.structs.replace(index, manifests=kept if entry in kept else [*kept, entry])


def manifest_descriptor(digest: Digest, size_bytes: int, artifact_type: str | None) -> Descriptor:
    """How an index names a manifest."""
    return Descriptor(media_type=MANIFEST_TYPE, artifact_type=artifact_type, digest=digest, size=size_bytes)


def layer_of(file: PackageFile, staged: Staged) -> Descriptor:
    """How a manifest names one of its files."""
    return Descriptor(
        media_type=file.media_type or _media_type(file.name),
        digest=staged.digest,
        size=staged.size_bytes,
        annotations={FILEPATH: file.name, TITLE: file.name},
    )


def _media_type(name: str) -> str:
    if name.endswith((".gguf", ".safetensors", ".onnx")):
        return WEIGHT_TYPE
    return WEIGHT_CONFIG_TYPE if name in ("config.json", "tokenizer.json", "tokenizer_config.json") else DOC_TYPE
