"""Small documents beside the index, replaced whole under the store's lock and read without one."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edge.errors import InvalidModelFile, StoreError

from .files import FileOps, translated, write_file
from .manifest import MAX_DOCUMENT_BYTES, decode

_T = TypeVar("_T")


def read_document(path: Path) -> bytes:
    """The first bytes of a file: one more than a document may have, at most.

    Raises:
        StoreError: It cannot be read.
    """
    with translated(path, "Reading"), path.open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


def read_side_file(path: Path, kind: type[_T], *, absent: _T, hint: str) -> _T:
    """What the file says, or `absent` where there is none.

    Raises:
        StoreError: It is damaged or cannot be read.
    """
    if not path.exists():
        return absent
    try:
        return decode(read_document(path), kind, what=path.name)
    except InvalidModelFile as e:
        raise StoreError(f"{path} is damaged: {e.reason}.", hint=hint) from e


def write_side_file(files: FileOps, path: Path, value: object) -> None:
    """Replace the file. Hold the store's lock."""
    write_file(files, path, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2))
