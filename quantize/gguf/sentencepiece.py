"""The pieces of a sentencepiece model file: the few fields of its protobuf that a converter needs.

Source: sentencepiece_model.proto of google/sentencepiece (`ModelProto.pieces` = 1; `SentencePiece`: piece 1, score 2,
type 3), wire format after the protobuf encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edge.errors import InvalidModelFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`SentencePiece.Type`; the same numbers as llama.cpp's token types."""

MAX_BYTES = 64 << 20
MAX_PIECES = 1 << 20

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One vocabulary entry."""

    text: str
    score: float
    kind: int


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for a varint, else its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if length > len(data) - at:
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = float(struct.unpack("<f", value)[0])
        elif number == 3 and isinstance(value, int):
            kind = value
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise ValueError(f"piece type {kind} is unknown")
    return Piece(text.decode("utf-8"), score, kind)


def read_pieces(data: bytes, *, name: str = "tokenizer.model") -> list[Piece]:
    """The vocabulary in the order of its ids.

    Raises:
        InvalidModelFile: Not a sentencepiece model, too large, or cut short.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        pieces = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
        if not 0 < len(pieces) <= MAX_PIECES:
            raise ValueError(f"it has {len(pieces):,} pieces")
    except (ValueError, IndexError) as e:
        raise InvalidModelFile(name, f"it is not a sentencepiece model ({e})") from e
    return pieces
