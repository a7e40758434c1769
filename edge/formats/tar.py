"""A strict, bounded reader of tar archives: where the bytes of each file lie. Nothing is unpacked.

Formats: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU's binary sizes. What readers of
tar understand in different ways, and links and devices, which archives of data have no use for, are refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from io import FileIO

from edge.errors import InvalidModelFile

MAX_HEADERS = 1 << 14
MAX_PAX_BYTES = 1 << 20
"""Of all extended headers together; a writer needs some dozens of bytes for a file."""
MAX_NAME = 1024
_MAX_SIZE_BYTES = 1 << 53
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_LENGTH = re.compile(rb"[1-9][0-9]{0,6} ")
_DECIMAL = re.compile(r"[0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class TarMember:
    """One regular file of an archive."""

    name: str
    """Relative, without a leading ``./``."""
    offset: int
    """Of its first byte, from the start of the archive."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    kind: bytes
    name: bytes
    size_bytes: int


def read_tar(file: FileIO, *, what: str) -> dict[str, TarMember]:
    """The regular files of an archive, by name. Headers are read, contents passed over.

    Args:
        what: What to call the archive in an error.

    Raises:
        InvalidModelFile: Not a tar archive, cut short, damaged, or with entries that do not belong into one of data.
        OSError: The file cannot be read.
    """
    return _Reader(file, what).members()


class _Reader:
    def __init__(self, file: FileIO, what: str) -> None:
        self._descriptor = file.fileno()
        self._size_bytes = os.fstat(self._descriptor).st_size
        self._what = what
        self._pax_bytes = 0

    def members(self) -> dict[str, TarMember]:
        found: dict[str, TarMember] = {}
        at, more = 0, dict[str, str]()
        for _ in range(MAX_HEADERS):
            block = self._block(at)
            if block == _ZEROS:
                self._check_end(at + _BLOCK, more)
                return found
            header = self._header(block, at)
            start = at + _BLOCK
            is_extension = header.kind in (b"x", b"g")
            size_bytes = header.size_bytes if is_extension else self._size(header, more)
            at = start + -(-size_bytes // _BLOCK) * _BLOCK
            if at > self._size_bytes:
                raise self._refused("it is cut short")
            if header.kind == b"x":
                more = self._pax(start, size_bytes)
            elif header.kind == b"g":
                self._check_harmless(self._pax(start, size_bytes))
            else:
                self._add(found, header, more.get("path"), TarMember("", start, size_bytes))
                more = {}
        raise self._refused(f"it has more than {MAX_HEADERS:,} entries")

    def _block(self, at: int) -> bytes:
        block = os.pread(self._descriptor, _BLOCK, at)
        if len(block) < _BLOCK:
            raise self._refused("it is cut short")
        return block

    def _check_end(self, at: int, more: dict[str, str]) -> None:
        # Two empty blocks end an archive; some writers leave the second out, and then nothing follows.
        if more or os.pread(self._descriptor, _BLOCK, at).strip(b"\0"):
            raise self._refused("something stands behind its end")

    def _header(self, block: bytes, at: int) -> _Header:
        if block[257:262] != b"ustar":
            raise self._refused("it is no tar archive" if at == 0 else f"no entry begins at byte {at:,}")
        if sum(block[:148]) + sum(block[156:]) + 8 * ord(" ") != self._number(block[148:156]):
            raise self._refused(f"the entry at byte {at:,} is damaged")
        name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
        if prefix and block[257:265] == b"ustar\x0000":  # GNU keeps other things in that place
            name = prefix + b"/" + name
        return _Header(block[156:157], name, self._number(block[124:136]))

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:
            number = int.from_bytes(field[1:], "big")
        elif found := _OCTAL.fullmatch(field):
            number = int(found[1] or b"0", 8)
        else:
            raise self._refused("a number in a header is none")
        if number >= _MAX_SIZE_BYTES:
            raise self._refused(f"an entry claims {number:,} bytes")
        return number

    def _size(self, header: _Header, more: dict[str, str]) -> int:
        if (text := more.get("size")) is None:
            return header.size_bytes
        if not _DECIMAL.fullmatch(text) or int(text) >= _MAX_SIZE_BYTES:
            raise self._refused("a size in an extended header is none")
        return int(text)

    def _pax(self, start: int, size_bytes: int) -> dict[str, str]:
        """The records of an extended header: ``LENGTH KEY=VALUE\\n``, LENGTH counting all of it."""
        self._pax_bytes += size_bytes
        if self._pax_bytes > MAX_PAX_BYTES:
            raise self._refused(f"its extended headers have more than {MAX_PAX_BYTES:,} bytes")
        data, at = os.pread(self._descriptor, size_bytes, start), 0
        records: dict[str, str] = {}
        while at < len(data):
            found = _LENGTH.match(data, at)
            record = data[found.end() : at + int(found[0])] if found else b""
            key, equals, value = record.partition(b"=")
            if found is None or at + int(found[0]) > len(data) or not equals or not value.endswith(b"\n"):
                raise self._refused("an extended header is damaged")
            at += int(found[0])
            records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        if any(key.startswith("GNU.sparse.") for key in records):
            raise self._refused("a file in it is stored with holes")
        return records

    def _check_harmless(self, records: dict[str, str]) -> None:
        if records.keys() & {"path", "size", "linkpath"}:
            raise self._refused("it gives names or sizes for all entries at once")

    def _add(self, found: dict[str, TarMember], header: _Header, path: str | None, member: TarMember) -> None:
        name = path if path is not None else header.name.decode("utf-8", "replace")
        if header.kind == b"5":
            if name not in (".", "./"):
                self._checked_name(name.removesuffix("/"))
            return
        if header.kind not in (b"0", b"\0"):
            raise self._refused(f"{name[:80]!r} in it is neither a file nor a directory (type {header.kind!r})")
        name = self._checked_name(name)
        if name in found:
            raise self._refused(f"{name[:80]!r} stands in it twice")
        found[name] = TarMember(name, member.offset, member.size_bytes)

    def _checked_name(self, name: str) -> str:
        short = name.removeprefix("./")
        bad = any(part in ("", ".", "..") for part in short.split("/"))
        if bad or len(name) > MAX_NAME or not name.isprintable() or "\\" in name or "\N{REPLACEMENT CHARACTER}" in name:
            raise self._refused(f"the path {name[:80]!r} in it is not allowed")
        return short

    def _refused(self, reason: str) -> InvalidModelFile:
        return InvalidModelFile(self._what, reason)
