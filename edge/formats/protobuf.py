"""Protobuf messages in a file, taken apart field by field: no length is believed, nothing large is read.

Encoding: protobuf.dev/programming-guides/encoding. Groups, which nobody writes any more, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from edge.errors import InvalidModelFile

VARINT, I64, BYTES, I32 = 0, 1, 2, 5
"""The wire types."""
MAX_TEXT_BYTES = 4096
_WINDOW_BYTES = 1 << 16
_CONTINUED = bytes(range(0x80, 0x100))
_TOO_LONG = re.compile(rb"[\x80-\xff]{10}")


class Span(NamedTuple):
    """Bytes of the file, from the first to the one behind the last."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Field(NamedTuple):
    """One field as it stands in a message."""

    number: int
    wire: int
    value: int
    """Of a varint; 0 for all others."""
    span: Span
    """Its bytes, without tag and length."""


class MessageReader:
    """The messages of one file. What it holds of the file is a window.

    Args:
        max_fields: How many fields are read, of all messages together.

    Raises:
        InvalidModelFile: From every method, where the file breaks the encoding or a bound.
    """

    def __init__(self, file: BinaryIO, what: str, *, max_fields: int) -> None:
        self._file = file
        self.what = what
        self.size = file.seek(0, 2)
        self._left = self._max_fields = max_fields
        self._base, self._window = 0, b""

    def fail(self, reason: str) -> InvalidModelFile:
        """The error that says so of this file."""
        return InvalidModelFile(self.what, reason)

    def fields(self, message: Span) -> Iterator[Field]:
        """The fields of a message, in their order."""
        at, end = message
        while at < end:
            self._count(at)
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            value = length = 0
            if wire == VARINT:
                value, after = self._varint(at, end)
                length = after - at
            elif wire == BYTES:
                length, at = self._varint(at, end)
            elif wire in (I32, I64):
                length = 4 if wire == I32 else 8
            if (not length and wire != BYTES) or not 0 < number < 1 << 29:
                raise self.fail(f"at byte {at:,} stands a field {number} of wire type {wire}")
            if length > end - at:
                raise self.fail(f"a field at byte {at:,} wants {length:,} bytes and its message has {end - at:,}")
            yield Field(number, wire, value, Span(at, at + length))
            at += length

    def varints(self, packed: Span) -> Iterator[int]:
        """The numbers of a packed field; each counts as a field."""
        at, end = packed
        while at < end:
            self._count(at)
            value, at = self._varint(at, end)
            yield value

    def count_varints(self, packed: Span) -> int:
        """How many numbers a packed field of any size has."""
        count, carried = 0, b""
        self._file.seek(packed.start)
        for at in range(packed.start, packed.end, _WINDOW_BYTES):
            data = self._file.read(min(_WINDOW_BYTES, packed.end - at))
            count += len(data.translate(None, _CONTINUED))
            if not data or _TOO_LONG.search(carried + data):
                raise self.fail(f"at byte {at:,} stands a number without an end")
            carried = data[-10:]
        if carried and carried[-1] >= 0x80:
            raise self.fail(f"the numbers that end at byte {packed.end:,} are cut short")
        return count

    def read(self, span: Span, *, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Bytes of the file, `limit` at most."""
        if span.size > limit:
            raise self.fail(f"a text at byte {span.start:,} is {span.size:,} bytes long, more than {limit:,}")
        self._cover(span.start, span.size)
        data = self._window[span.start - self._base :][: span.size]
        if len(data) != span.size:
            raise self.fail("it became shorter while it was read")
        return data

    def text(self, span: Span) -> str:
        """A short text."""
        try:
            return self.read(span).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"a text at byte {span.start:,} is not UTF-8") from e

    def _count(self, at: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise self.fail(f"it has more than {self._max_fields:,} fields (at byte {at:,})")

    def _cover(self, start: int, num_bytes: int) -> None:
        first = start - self._base
        if first < 0 or first + num_bytes > len(self._window):
            self._file.seek(start)
            self._base, self._window = start, self._file.read(max(num_bytes, _WINDOW_BYTES))

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number, and the place behind it."""
        longest = min(10, end - at)
        self._cover(at, longest)
        first = at - self._base
        value = shift = 0
        for byte in self._window[first : first + longest]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + shift // 7
        raise self.fail(f"the number at byte {at:,} has no end")
