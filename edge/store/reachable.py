"""What the index, the slots and the leases lead to: all else may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edge.errors import EdgeError, InvalidModelFile, StoreError

from .digest import Digest
from .manifest import REF_NAME, SUBJECT, Descriptor, references_of, subject_of

Read = Callable[[Digest], bytes]
"""Gives a document's bytes, which are right. Raises InvalidModelFile or StoreError."""


@dataclass(frozen=True, slots=True)
class Root:
    """Something that must stay, with all that it leads to."""

    name: str
    """For people."""
    digest: Digest
    may_be_blob: bool = False
    """It may be a file as well as a document, and need not have come yet."""


@dataclass(frozen=True, slots=True)
class Reachable:
    """What stays."""

    digests: frozenset[Digest]
    entries: Sequence[Descriptor]
    """Of the index: all but the referrers whose subject goes."""
    blocked_by: tuple[str, ...]
    """Documents that cannot be read: while there are any, nobody knows what they lead to."""


def reachable(entries: Sequence[Descriptor], roots: Iterable[Root], read: Read) -> Reachable:
    """Follow every reference.

    Args:
        entries: Those of the index.
        roots: What stays besides.
    """
    walk = _Walk(read)
    subjects = {entry.digest: subject for entry in entries if (subject := _subject(entry, read))}
    for entry in entries:
        if entry.digest not in subjects:
            walk.follow(Root(entry.annotations.get(REF_NAME, entry.digest), entry.digest))
    for root in roots:
        walk.follow(root)
    # A referrer may be about a referrer, as a signature is of an SBOM.
    waiting = subjects
    while found := {digest for digest, subject in waiting.items() if subject in walk.alive}:
        for digest in found:
            walk.follow(Root(f"what is attached to {subjects[digest]}", digest))
        waiting = {digest: subject for digest, subject in waiting.items() if digest not in found}
    kept = [entry for entry in entries if entry.digest not in waiting]
    return Reachable(frozenset(walk.alive), kept, tuple(dict.fromkeys(walk.blocked_by)))


def _subject(entry: Descriptor, read: Read) -> Digest | None:
    """What a nameless entry is about; None for a root of its own."""
    if REF_NAME in entry.annotations:
        return None
    try:
        if subject := entry.annotations.get(SUBJECT):
            return Digest(subject)
        return subject_of(read(entry.digest), what=entry.digest)
    except EdgeError:
        return None


class _Walk:
    def __init__(self, read: Read) -> None:
        self._read = read
        self.alive: set[Digest] = set()
        self.blocked_by: list[str] = []

    def follow(self, root: Root) -> None:
        pending = [root.digest]
        while pending:
            digest = pending.pop()
            self.alive.add(digest)
            try:
                found = references_of(self._read(digest), what=root.name)
            except (InvalidModelFile, StoreError):
                if not root.may_be_blob:
                    self.blocked_by.append(root.name)
                continue
            pending.extend(found.documents - self.alive)
            self.alive |= found.blobs
