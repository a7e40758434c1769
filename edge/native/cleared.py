"""Memory that the library has cleared and not used yet, given back to the kernel until it is.

llama.cpp writes zeros to all cells of a context when it makes one, and so takes their memory at once: at 32,768 cells
of the default model 752 MB, of which a few short chats use 30. Pages that are given back read as zeros again and are
taken as they are written. What they amount to stays promised: who loads or saves something has to leave it free.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge.native.huge_pages import Mapping

log = logging.getLogger("edge.cleared")

_PAGE = mmap.PAGESIZE
_MADV_NOHUGEPAGE = 15  # linux/mman.h
_HEADER_AT = 48
"""A chunk that glibc maps for posix_memalign with 64 bytes of alignment has so much before its header: two words, which
are these bytes, and the size with flags (malloc/malloc.c, `mmapped chunk`)."""
_IS_MMAPPED = 2
_MAX_ABOVE = 16 << 20
_LEAST = 2 << 20
"""Less is not worth the search, and may lie among other data."""
_DATA_AT = _HEADER_AT + 16
_LOWEST_BIT = bytes(i & 1 for i in range(256))


@dataclass(frozen=True, slots=True)
class Cleared:
    """Memory that was zeros and belonged to nobody when its whole pages were given back."""

    address: int
    size: int

    @property
    def start(self) -> int:
        """Where its whole pages begin."""
        return -(-self.address // _PAGE) * _PAGE

    @property
    def end(self) -> int:
        """Where they end; not after `start` where there are none."""
        return (self.address + self.size) // _PAGE * _PAGE

    def unused_bytes(self) -> int:
        """What of it is not taken yet (mincore(2))."""
        pages = (self.end - self.start) // _PAGE
        resident = (ctypes.c_ubyte * pages)()
        if _libc().mincore(self.start, self.end - self.start, resident):
            return 0
        return (pages - bytes(resident).translate(_LOWEST_BIT).count(1)) * _PAGE

    def give_back(self) -> bool:
        """Have all of it read as zeros, its pages given back; nobody may use it meanwhile. False where the kernel
        keeps them, and then nothing is changed."""
        if self.end <= self.start or _libc().madvise(self.start, self.end - self.start, mmap.MADV_DONTNEED):
            return False
        ctypes.memset(self.address, 0, self.start - self.address)
        ctypes.memset(self.end, 0, self.address + self.size - self.end)
        return True


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc


def anonymous_mappings(maps: str) -> list[Mapping]:
    """The writable mappings of no file, and of no name, in the text of /proc/self/maps (proc(5))."""
    found: list[Mapping] = []
    for line in maps.splitlines():
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and not name:
            start, end = (int(a, 16) for a in addresses.split("-"))
            found.append(Mapping(start, end))
    return found


def own_mappings() -> list[Mapping]:
    """Those of this process now."""
    return anonymous_mappings(Path("/proc/self/maps").read_text("utf-8", "replace"))


def added(before: list[Mapping], after: list[Mapping]) -> list[Mapping]:
    """The parts of `after` that no mapping of `before` covers. The kernel joins neighbours, so they may be parts."""
    parts = after
    for old in before:
        parts = [
            Mapping(start, end)
            for part in parts
            for start, end in ((part.start, min(part.end, old.start)), (max(part.start, old.end), part.end))
            if start < end
        ]
    return parts


def give_back(size: int, before: list[Mapping]) -> Cleared | None:
    """Give back an allocation that is still all zeros; None where none of that size was made, or not by glibc.

    Args:
        size: Its bytes.
        before: The mappings before it was made. No other thread may have run since.
    """
    if size < _LEAST:
        return None
    new = added(before, own_mappings())
    for mapping in new:  # those beside it too: what is used of them is little, and huge pages would take all
        _libc().madvise(mapping.start, mapping.end - mapping.start, _MADV_NOHUGEPAGE)
    found = next((at for mapping in new if (at := _find(mapping, size))), None)
    if found is None:
        log.info("the cells are not where they were looked for: all of their memory stays taken")
        return None
    cleared = Cleared(found, size)
    return cleared if cleared.give_back() else None


def _find(mapping: Mapping, size: int) -> int | None:
    """Where the data of a chunk of this size begins, near the end of a mapping: what is mapped first lies highest."""
    least = size + _DATA_AT - _HEADER_AT
    last = mapping.end - size // _PAGE * _PAGE
    for at in range(last, max(mapping.start - 1, last - _MAX_ABOVE), -_PAGE):
        before, chunk = (ctypes.c_uint64.from_address(at + _HEADER_AT + i).value for i in (0, 8))
        if before == _HEADER_AT and chunk & 7 == _IS_MMAPPED and least <= chunk - _IS_MMAPPED < least + 2 * _PAGE:
            return at + _DATA_AT
    return None
