"""Weights on huge pages, in place, while they are in use.

A token reads every weight once. Through 4 kB pages of a mapped file the processor spends a tenth of a step on walking
page tables (docs/performance.md), and the kernel gives files of ordinary filesystems no larger ones. Reading the file
into huge pages at the start instead costs half a second, at the worst moment. So the file is mapped as always, and once
the model answers, its pages are replaced window by window: a copy on huge pages is moved over the same addresses.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger("edge.huge_pages")

MAX_WINDOWS = 4096
"""Each window stays a mapping of its own, of which a process may have 65,530 (vm.max_map_count)."""
_MADV_HUGEPAGE = 14  # linux/mman.h
_MREMAP_MAYMOVE_FIXED = 1 | 2
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class Mapping:
    """A range of addresses that shows a file."""

    start: int
    end: int


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = libc.mremap.restype = address
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [address, size, size, number, address]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, size, number]
    return libc


def huge_page_bytes(root: Path = Path("/")) -> int:
    """Size of the kernel's huge pages; 0 where it gives none to who asks."""
    directory = root / "sys/kernel/mm/transparent_hugepage"
    try:
        if "[never]" in (directory / "enabled").read_text("ascii"):
            return 0
        return int((directory / "hpage_pmd_size").read_text("ascii"))
    except (OSError, ValueError):
        return 0


def mappings_of(path: Path, maps: str) -> list[Mapping]:
    """The read-only mappings of a file in the text of /proc/self/maps (proc(5)). Code is none of them: a library on
    another filesystem may have the same inode number."""
    wanted = path.stat().st_ino
    found: list[Mapping] = []
    for line in maps.splitlines():
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if int(inode) == wanted and permissions.startswith("r--"):
            start, end = (int(a, 16) for a in addresses.split("-"))
            found.append(Mapping(start, end))
    return found


def windows(mapping: Mapping, page_bytes: int) -> list[Mapping]:
    """The parts of a mapping that whole huge pages can replace: a page each, more where that would be very many."""
    start = -(-mapping.start // page_bytes) * page_bytes
    end = mapping.end // page_bytes * page_bytes
    size = page_bytes * -(-(end - start) // (page_bytes * MAX_WINDOWS))
    return [Mapping(at, min(at + size, end)) for at in range(start, end, size)] if end > start else []


def replace(path: Path) -> Iterator[int]:
    """Replace the mapped pages of a file that nobody writes, one window (2 MB take 9 ms) for each step of the iterator.

    Other threads may read the addresses meanwhile: one that faults during a move waits for it, since the kernel holds
    the address space's lock throughout (mremap(2)).

    Yields:
        Bytes replaced so far. Ends early where the kernel has no huge pages left.
    """
    if not (page_bytes := huge_page_bytes()):
        return
    maps = Path("/proc/self/maps").read_text("utf-8", "replace")
    done = 0
    for mapping in mappings_of(path, maps):
        for window in windows(mapping, page_bytes):
            if not _replace_window(window, page_bytes):
                return
            done += window.end - window.start
            yield done


def _replace_window(window: Mapping, page_bytes: int) -> bool:
    """Copy a window to huge pages and move them over it. False where the kernel gave none; the window is as before."""
    libc, size = _libc(), window.end - window.start
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    taken = libc.mmap(None, size + page_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if taken == _FAILED:
        return False
    copy = -(-taken // page_bytes) * page_bytes
    libc.madvise(copy, size, _MADV_HUGEPAGE)
    ctypes.memmove(copy, window.start, size)
    moved = _huge_bytes_at(copy) >= size // 2 and not libc.mprotect(copy, size, mmap.PROT_READ)
    moved = moved and libc.mremap(copy, size, size, _MREMAP_MAYMOVE_FIXED, window.start) != _FAILED
    for start, end in [
        (taken, copy),
        (copy + size, taken + size + page_bytes),
        *([] if moved else [(copy, copy + size)]),
    ]:
        if end > start:
            libc.munmap(start, end - start)
    return moved


def _huge_bytes_at(address: int) -> int:
    """Huge pages under a mapping, in bytes (proc(5), smaps)."""
    inside = False
    with Path("/proc/self/smaps").open("r", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            head = line.split(maxsplit=1)[0]
            if "-" in head:
                start, end = (int(a, 16) for a in head.split("-"))
                inside = start <= address < end
            elif inside and head == "AnonHugePages:":
                return int(line.split()[1]) * 1024
    return 0
