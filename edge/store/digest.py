"""Digests that name their algorithm, and a hash that is fed as bytes arrive.

Format: OCI image specification 1.1, descriptor.md, "Digests". Only sha256 is written and read here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edge.errors import InvalidReference

READ_BYTES = 1 << 20
"""How much of a file is read at once."""
_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


class Digest(str):
    """``sha256:`` and 64 lower-case hexadecimal digits.

    Raises:
        InvalidReference: The text is anything else.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        if not _PATTERN.fullmatch(text):
            raise InvalidReference(f"{text[:80]!r} is not a digest.", hint="A digest is sha256: and 64 hex digits.")
        return super().__new__(cls, text)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Accept ``sha256:…`` or the bare 64 digits in either case, as people paste them.

        Raises:
            InvalidReference: It is neither.
        """
        lowered = text.strip().lower()
        return cls(lowered if lowered.startswith("sha256:") else f"sha256:{lowered}")

    @property
    def hex(self) -> str:
        """The 64 digits without the algorithm."""
        return self[len("sha256:") :]


class StreamingHash:
    """A digest in the making."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self.num_bytes += len(data)

    def digest(self) -> Digest:
        """The digest of all bytes so far; more may follow."""
        return Digest(f"sha256:{self._sha256.hexdigest()}")


_Hash = TypeVar("_Hash", bound=StreamingHash)


def digest_bytes(data: bytes) -> Digest:
    """The digest of bytes in memory."""
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def is_hex(name: str) -> bool:
    """Whether a file's name is the 64 digits of a digest."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def hash_into(into: _Hash, path: Path, *, before_chunk: Callable[[], None] | None = None) -> _Hash:
    """Feed a whole file to a hash, one MiB at a time; `before_chunk` may raise to stop it.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        while True:
            if before_chunk:
                before_chunk()
            if not (data := file.read(READ_BYTES)):
                return into
            into.update(data)


def hash_file(path: Path, *, before_chunk: Callable[[], None] | None = None) -> StreamingHash:
    """Hash a whole file, one MiB at a time; `before_chunk` may raise to stop it.

    Raises:
        OSError: The file cannot be read.
    """
    return hash_into(StreamingHash(), path, before_chunk=before_chunk)


def digest_file(path: Path) -> Digest:
    """The digest of a file's content.

    Raises:
        OSError: The file cannot be read.
    """
    return hash_file(path).digest()
