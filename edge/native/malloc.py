"""How the C library gives memory back."""

from __future__ import annotations

import ctypes

LARGE_BYTES = 2 << 20
"""Blocks from here on get pages of their own: saved states are larger, what a step needs for a moment is not."""
MOST_FREE_BYTES = 8 << 20
"""What may stay at the end of a heap for the next step."""
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3


def give_large_blocks_back() -> None:
    """Have each large block given back to the kernel when it is freed, in this process from now on.

    Of itself glibc raises the threshold to the size of any such block that is freed, up to 32 MiB (mallopt(3)). Saved
    states then lie in the heap between what stays, and the holes that they left grew to 34 MiB in a quarter of an hour
    of mixed load, beside 79 in use; with this, to 2 beside 38, and states in pages of their own. Those are fresh, which
    costs a state 1.3 ms. Does nothing where the C library knows no thresholds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, MOST_FREE_BYTES)
