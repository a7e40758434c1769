"""Blobs taken over from another layout on this machine, such as the one that comes with the installation."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from edge.errors import DigestMismatch

from .blobs import BlobStore, Staged
from .digest import Digest
from .files import translated
from .manifest import MAX_DOCUMENT_BYTES, Descriptor, references_of


def take_over(source: BlobStore, target: BlobStore, entry: Descriptor) -> None:
    """Publish in `target` every blob of one model of `source`. Hold the target's lock.

    Raises:
        DigestMismatch: A blob of the source is damaged.
        InvalidModelFile: Its manifest is.
        StoreError: A blob of the source is missing, or the target cannot be written.
    """
    path = source.path(entry.digest)
    with translated(path, "Reading"), path.open("rb") as file:
        references = references_of(file.read(MAX_DOCUMENT_BYTES + 1), what="The seed's manifest")
    for digest in (*sorted(references.blobs), entry.digest):
        if not target.has(digest):
            with ExitStack() as stack:
                target.publish([_stage(source.path(digest), digest, target, stack)])


def _stage(path: Path, digest: Digest, target: BlobStore, stack: ExitStack) -> Staged:
    linked = target.ingest_dir / f"{digest.hex[:32]}.link"
    target.files.remove(linked)
    if not target.files.link(path, linked):
        partial = stack.enter_context(target.ingest(f"seed {digest}"))
        stack.callback(partial.discard)
        staged = target.copy_in(path, partial)
        _check(staged.digest, digest, path)
        return staged
    with translated(linked, "Reading"), linked.open("rb", buffering=0) as file:
        staged = target.hash_in_place(linked)
        target.files.sync(file)
    _check(staged.digest, digest, path)
    return staged


def _check(actual: Digest, expected: Digest, path: Path) -> None:
    if actual != expected:
        raise DigestMismatch(f"The seed {path} is damaged", expected=expected, actual=actual)
