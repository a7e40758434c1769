"""What a worker is doing now, in a page of memory that outlives it: the worker writes, the front reads after a death.

Each value is eight bytes at its own place, so a reader meanwhile sees old and new values mixed, but none torn.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_IDS = 256
"""Requests of one step that are named; a wider step hides the others."""
_DECAY = 0.99
_STEP = struct.Struct("@ddQQ")  # began, slowest, tokens, ids
_TEXT = struct.Struct("@dQ")  # began, request
_TEXT_AT = _STEP.size
_IDS_AT = _TEXT_AT + _TEXT.size
_SIZE = _IDS_AT + 8 * MAX_IDS


@dataclass(frozen=True, slots=True)
class Activity:
    """What a worker does, or did last. Times are of the monotonic clock, which all processes share.

    Attributes:
        step_began: When the present step began; 0 between steps of an idle engine.
        step_tokens: How wide it is.
        slowest_token_s: The longest that a step took, for each of its tokens; fades. 0 before the first.
        step_ids: Requests in the step.
        text_began: When the text thread took up the request that it prepares; 0 if it prepares none.
        text_id: That request.
    """

    step_began: float
    step_tokens: int
    slowest_token_s: float
    step_ids: tuple[int, ...]
    text_began: float
    text_id: int

    @property
    def ids(self) -> frozenset[int]:
        """Every request that was touched."""
        in_step = self.step_ids if self.step_began else ()
        in_text = (self.text_id,) if self.text_began else ()
        return frozenset(in_step + in_text)


class BlackBox:
    """A page shared by a front and its worker. Either side closes its own end.

    Args:
        fd: Of the page; owned from now on.
    """

    def __init__(self, fd: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, _SIZE)
        self._clock = clock
        self._began = self._slowest = 0.0
        self._num_tokens = 1

    @classmethod
    def create(cls) -> BlackBox:
        """A new page. Close-on-exec, as every descriptor of Python: hand it on by ``pass_fds``."""
        fd = os.memfd_create("edge-blackbox")
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def close(self) -> None:
        """Give the page back, once both sides did."""
        self._page.close()
        os.close(self.fd)

    def begin_step(self, ids: Sequence[int], num_tokens: int) -> None:
        """A step begins, and the one before it is over. The engine's thread."""
        now = self._clock()
        if self._began:
            self._slowest = max((now - self._began) / self._num_tokens, self._slowest * _DECAY)
        named = ids[:MAX_IDS]
        self._began, self._num_tokens = now, max(1, num_tokens)
        struct.pack_into(f"@{len(named)}Q", self._page, _IDS_AT, *named)
        _STEP.pack_into(self._page, 0, now, self._slowest, self._num_tokens, len(named))

    def idle(self) -> None:
        """The engine waits for work."""
        self._began = 0.0
        _STEP.pack_into(self._page, 0, 0.0, self._slowest, 1, 0)

    def begin_text(self, request_id: int) -> None:
        """A request's template, tokens or grammar are being worked on. The text thread."""
        _TEXT.pack_into(self._page, _TEXT_AT, self._clock(), request_id)

    def end_text(self) -> None:
        """That is done."""
        _TEXT.pack_into(self._page, _TEXT_AT, 0.0, 0)

    def read(self) -> Activity:
        """What the worker is doing, or was doing when it ended."""
        began, slowest, num_tokens, num_ids = _STEP.unpack_from(self._page, 0)
        text_began, text_id = _TEXT.unpack_from(self._page, _TEXT_AT)
        ids: tuple[int, ...] = struct.unpack_from(f"@{min(num_ids, MAX_IDS)}Q", self._page, _IDS_AT)
        return Activity(began, num_tokens, slowest, ids, text_began, text_id)
