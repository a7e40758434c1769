"""The door through which lines of batches come: a few at a time, and only where nobody else wants the room."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

MOST_AT_ONCE = 4
POLL_S = 0.5
"""How often to look whether others left room: they tell nobody when they do."""


def lines_at_once(slots: int) -> int:
    """How many lines may be under way on an engine of so many slots."""
    return max(1, min(MOST_AT_ONCE, slots // 4))


def has_room(*, own: int, active: int, waiting: int, slots: int) -> bool:
    """Whether another line may start: one slot always stays free for who comes next.

    Args:
        own: Lines under way.
        active: Requests in the engines, these lines among them.
        waiting: Those of them that have no slot.
    """
    others = max(0, active - own)
    return own < lines_at_once(slots) and waiting == 0 and own + others < max(1, slots - 1)


class Gate:
    """Lets lines in, in the order in which they came to it, so that batches take turns.

    Args:
        may_enter: Whether there is room beside so many lines.
    """

    def __init__(self, may_enter: Callable[[int], bool]) -> None:
        self._may_enter = may_enter
        self._queue = asyncio.Lock()
        self._left = asyncio.Event()
        self.num_inside = 0

    @contextlib.asynccontextmanager
    async def passed(self) -> AsyncGenerator[None]:
        """Inside from when there is room."""
        async with self._queue:
            while not self._may_enter(self.num_inside):
                self._left.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._left.wait()
            self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            self._left.set()
