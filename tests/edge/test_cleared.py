"""Cleared memory that is given back reads as zeros, and is taken as it is written."""

from __future__ import annotations

import ctypes

from hypothesis import given
from hypothesis import strategies as st

from edge.native.cleared import Cleared, added, anonymous_mappings, give_back, own_mappings
from edge.native.huge_pages import Mapping

SIZE = 48 << 20

_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


def _allocate(size: int) -> int:
    """As ggml does it, cleared."""
    address = ctypes.c_void_p()
    assert _libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
    assert address.value is not None
    ctypes.memset(address, 0, size)
    return address.value


def test_what_was_cleared_is_given_back_and_taken_again_as_it_is_written() -> None:
    before = own_mappings()
    address = _allocate(SIZE)
    try:
        cleared = give_back(SIZE, before)
        assert cleared is not None
        assert address <= cleared.start < address + 4096
        assert address + SIZE - 4096 < cleared.end <= address + SIZE
        assert cleared.unused_bytes() == cleared.end - cleared.start
        ctypes.memset(cleared.start + 8192, 7, 4097)
        assert cleared.unused_bytes() == cleared.end - cleared.start - 8192
        assert ctypes.string_at(address, SIZE).count(0) == SIZE - 4097
        ctypes.memset(address, 7, SIZE)
        assert cleared.unused_bytes() == 0
        assert cleared.give_back()
        assert cleared.unused_bytes() == cleared.end - cleared.start
        assert ctypes.string_at(address, SIZE).count(0) == SIZE, "also what lies on pages with others"
    finally:
        _libc.free(address)


def test_an_allocation_of_another_size_is_left_alone() -> None:
    before = own_mappings()
    address = _allocate(SIZE)
    try:
        assert give_back(SIZE + (1 << 20), before) is None
        assert give_back(SIZE - (1 << 20), before) is None
        assert Cleared(address, SIZE).unused_bytes() == 0
    finally:
        _libc.free(address)


def test_only_memory_of_no_file_counts() -> None:
    maps = """7f0000000000-7f0000001000 rw-p 00000000 00:00 0
7f0000001000-7f0000002000 r--p 00000000 00:00 0
7f0000002000-7f0000003000 rw-p 00000000 00:1f 123 /a file
7f0000003000-7f0000004000 rw-s 00000000 00:01 5 /memfd:x (deleted)
55d000000000-55d000100000 rw-p 00000000 00:00 0 [heap]
"""
    assert anonymous_mappings(maps) == [Mapping(0x7F0000000000, 0x7F0000001000)]


_pages = st.sets(st.integers(0, 40))


def _joined(pages: set[int]) -> list[Mapping]:
    """Mappings of these pages, neighbours in one, as the kernel shows them."""
    firsts = sorted(p for p in pages if p - 1 not in pages)
    return [Mapping(p, next(q for q in range(p, 99) if q not in pages)) for p in firsts]


@given(_pages, _pages)
def test_what_is_new_is_all_that_was_not_there(before: set[int], after: set[int]) -> None:
    new = added(_joined(before), _joined(after))
    assert [p for m in new for p in range(m.start, m.end)] == sorted(after - before)


def test_less_than_a_page_is_left_where_it_is() -> None:
    before = own_mappings()
    address = _allocate(2048)
    try:
        assert give_back(2048, before) is None
    finally:
        _libc.free(address)
