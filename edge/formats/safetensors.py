"""A strict, bounded reader of safetensors: the header only, every offset checked.

Format: huggingface/safetensors README.md, "Format"; limits as its Rust reader (tensor.rs, 0.8).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edge.errors import InvalidModelFile

MAX_HEADER_BYTES = 8 << 20
"""The format allows 100 MB; a tensor takes about 100 bytes, so that is more than MAX_TENSORS need."""
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_NAME = 512
MAX_ELEMENTS = 1 << 48

# dtype -> bits of an element.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor's place in the file."""

    name: str
    dtype: str
    """As ``BF16``; a key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    """Row-major, as numpy's; ``()`` is a single number."""
    offset: int
    """Of the first byte, from the start of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The checked header of a safetensors file."""

    path: Path
    tensors: tuple[SafeTensor, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str]
    size: int
    """Of the file, in bytes."""

    def get(self, name: str) -> SafeTensor | None:
        """The tensor of that name, if there is one."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_safetensors(path: Path, *, what: str | None = None) -> SafetensorsFile:
    """Read and check a file's header, and that its tensors fill the file without gap or overlap.

    Args:
        what: What to call the file in an error; its name by default.

    Raises:
        InvalidModelFile: The file is missing, cut short, damaged, or no safetensors; the error has the reason.
    """
    what = what or path.name
    try:
        header, size = _read_header(path, what)
    except OSError as e:
        raise InvalidModelFile(what, f"it cannot be read ({e.strerror or e})") from e
    members = _parse(header, what)
    metadata = _metadata(members.pop("__metadata__", {}), what)
    start = 8 + len(header)
    found = [_tensor(name, member, start, what) for name, member in members.items()]
    tensors = tuple(sorted(found, key=lambda tensor: (tensor.offset, tensor.size_bytes)))
    _check_places(tensors, start, size, what)
    return SafetensorsFile(path, tensors, metadata, size)


def _read_header(path: Path, what: str) -> tuple[bytes, int]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size < 10:
            raise InvalidModelFile(what, f"it has only {size} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise InvalidModelFile(what, f"its header claims {length:,} bytes; it is cut short or no safetensors file")
        header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise InvalidModelFile(what, "its header is no JSON object")
    return header, size


def _parse(header: bytes, what: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise InvalidModelFile(what, "a name stands in its header twice")
        return members

    if header.count(b"[") > 2 * MAX_TENSORS or header.count(b"{") > MAX_TENSORS + 2:
        raise InvalidModelFile(what, f"its header describes more than {MAX_TENSORS:,} tensors")
    try:
        # Python's own parser, because it shows names that stand there twice.
        return json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise InvalidModelFile(what, f"its header is no JSON ({str(e)[:120]})") from e


def _metadata(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidModelFile(what, "its __metadata__ is no object")
    members = cast("dict[str, object]", value)
    if not all(isinstance(text, str) for text in members.values()):
        raise InvalidModelFile(what, "its __metadata__ holds more than text")
    return {name: str(text) for name, text in members.items()}


def _tensor(name: str, value: object, start: int, what: str) -> SafeTensor:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidModelFile(what, f"the tensor name {name[:60]!r} is empty, too long or not printable")
    if not isinstance(value, dict) or set(cast("dict[str, object]", value)) != {"dtype", "shape", "data_offsets"}:
        raise InvalidModelFile(what, f"tensor '{name}' is not described by dtype, shape and data_offsets")
    members = cast("dict[str, object]", value)
    shape, offsets = _naturals(members["shape"]), _naturals(members["data_offsets"])
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype := members["dtype"], str) else None
    if bits is None or shape is None or len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_ELEMENTS:
        raise InvalidModelFile(what, f"tensor '{name}' has dtype {str(dtype)[:20]} and shape {str(shape)[:80]}")
    size_bits = math.prod(shape) * bits
    if offsets is None or len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != size_bits:
        raise InvalidModelFile(what, f"the offsets of tensor '{name}' do not fit its {size_bits // 8:,} bytes")
    return SafeTensor(name, str(dtype), tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _naturals(value: object) -> Sequence[int] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    numbers = [item for item in items if type(item) is int and 0 <= item < 1 << 63]
    return numbers if len(numbers) == len(items) else None


def _check_places(tensors: Sequence[SafeTensor], start: int, size: int, what: str) -> None:
    expected = start
    for tensor in tensors:
        if tensor.offset != expected:
            problem = "overlaps the one before it" if tensor.offset < expected else "leaves a gap before it"
            raise InvalidModelFile(what, f"tensor '{tensor.name}' {problem}")
        expected += tensor.size_bytes
    if expected != size:
        problem = "is cut short" if expected > size else "has bytes after the last tensor"
        raise InvalidModelFile(what, f"it {problem}: {expected:,} bytes were expected and there are {size:,}")
