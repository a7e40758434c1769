"""Strict, bounded reading of safetensors headers: where each tensor lies, without reading one.

Source: the format's README in huggingface/safetensors, whose rules (header size, no holes, no overlap, no duplicate
keys) are enforced here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edge.errors import InvalidModelFile

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

MAX_DIMENSIONS = 8

# Bytes of one element. The sub-byte types of later versions are left out: nothing here reads them.
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        dtype: The format's own name: ``F32``, ``F16``, ``BF16``, …
        offset: Of its first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked header. `tensors` is in the order of the bytes on disk."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size_bytes: int


class _Broken(Exception):
    """What breaks the format."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise _Broken("a name stands twice in the header")
    return table


def _header_of(path: Path) -> tuple[dict[str, object], int, int]:
    """The header's table, where the data begins, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _Broken(f"its header claims {length:,} bytes and the file has {size:,}")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _Broken("its header is not a JSON object")
    try:
        table: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:  # also bad UTF-8, and an integer of a million digits
        raise _Broken(f"its header is not valid JSON ({e})") from e
    if not isinstance(table, dict):
        raise _Broken("its header is not a JSON object")
    return cast("dict[str, object]", table), 8 + length, size


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(name: str, entry: object, data_offset: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _Broken(f"tensor '{name}' is not described by an object")
    fields = cast("dict[str, object]", entry)
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise _Broken(f"tensor '{name}' has the unknown type {dtype!r}")
    if not isinstance(shape, list) or len(cast("list[object]", shape)) > MAX_DIMENSIONS:
        raise _Broken(f"tensor '{name}' has no usable shape")
    if not isinstance(span, list) or len(cast("list[object]", span)) != 2:
        raise _Broken(f"tensor '{name}' has no usable data_offsets")
    if not all(_natural(n) for n in cast("list[object]", shape + span)):
        raise _Broken(f"tensor '{name}' has a size or an offset that is no natural number")
    sides, (begin, end) = tuple(cast("list[int]", shape)), cast("list[int]", span)
    if end - begin != math.prod(sides) * ELEMENT_BYTES[dtype]:
        raise _Broken(f"tensor '{name}' spans {end - begin:,} bytes, which is not its shape {sides} of {dtype}")
    return StoredTensor(name, dtype, sides, data_offset + begin, end - begin)


def _check_cover(tensors: list[StoredTensor], data_offset: int, size: int) -> None:
    """The tensors lie one after the other and fill the file."""
    at = data_offset
    for tensor in tensors:
        if tensor.offset != at:
            raise _Broken(f"tensor '{tensor.name}' begins at byte {tensor.offset:,}, where {at:,} was due")
        at += tensor.size_bytes
    if at != size:
        raise _Broken(f"its tensors end at byte {at:,} and the file at {size:,}")


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file. No tensor is read.

    Raises:
        InvalidModelFile: It cannot be read, or breaks the format: cut short, overlapping or missing ranges, a size that
            is not its shape's, a name twice.
    """
    try:
        table, data_offset, size = _header_of(path)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise _Broken("its __metadata__ is not an object")
        tensors = [_tensor(name, entry, data_offset) for name, entry in table.items()]
        tensors.sort(key=lambda t: (t.offset, t.size_bytes))
        _check_cover(tensors, data_offset, size)
    except (OSError, _Broken) as e:
        raise InvalidModelFile(path.name, str(e)) from e
    notes = {str(k): str(v) for k, v in cast("dict[object, object]", metadata).items()}
    return SafetensorsFile(path, {t.name: t for t in tensors}, notes, size)
