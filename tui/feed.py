"""What the appliance tells, for as long as the terminal is open: connects, listens, and connects again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from edge.errors import EdgeError
from runtime.api.schema import DeviceStatus, Job, LogLines

from .client import RuntimeClient


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next try; the random part keeps many terminals from calling at once."""

    first_s: float = 0.25
    most_s: float = 5.0

    def delay_s(self, num_failures: int, *, fraction: float) -> float:
        """The wait after so many failures in a row; `fraction`, 0..1, is the draw."""
        longest = min(self.most_s, self.first_s * 2 ** min(num_failures - 1, 30))
        return longest * (0.5 + fraction / 2)


async def follow(
    client: RuntimeClient, *, wake: asyncio.Event, backoff: Backoff
) -> AsyncGenerator[DeviceStatus | Job | LogLines | EdgeError]:
    """Events as they come, and the reason each time there are none. Never ends by itself; setting `wake` cuts a
    wait short."""
    num_failures = 0
    while True:
        try:
            async with contextlib.aclosing(client.events()) as events:
                async for event in events:
                    num_failures = 0
                    yield event
        except EdgeError as e:
            yield e
        num_failures += 1
        wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), backoff.delay_s(num_failures, fraction=random.random()))  # noqa: S311  # spreads load, hides nothing
