"""Listening, losing the appliance, finding it again."""

from __future__ import annotations

import asyncio
import contextlib

from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ServerUnavailable
from runtime.api.schema import DeviceStatus
from tests.tui.appliance import ScriptedAppliance
from tui.client import RuntimeClient
from tui.feed import Backoff, follow


@given(num_failures=st.integers(1, 10_000), fraction=st.floats(0, 1))
def test_waits_grow_within_bounds(num_failures: int, fraction: float) -> None:
    backoff = Backoff(first_s=0.25, most_s=5.0)
    delay = backoff.delay_s(num_failures, fraction=fraction)
    assert 0.125 <= delay <= 5.0
    assert delay <= backoff.delay_s(num_failures + 1, fraction=fraction)


async def test_it_tells_why_there_is_nothing_and_comes_back(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    feed = follow(client, wake=asyncio.Event(), backoff=Backoff(first_s=0.01, most_s=0.02))
    async with asyncio.timeout(20), contextlib.aclosing(feed):
        assert isinstance(await anext(feed), DeviceStatus)
        scripted.stop()
        assert isinstance(await anext(feed), ServerUnavailable)
        assert isinstance(await anext(feed), ServerUnavailable)
        scripted.start()
        while not isinstance(await anext(feed), DeviceStatus):
            pass


async def test_a_wake_cuts_the_wait_short(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    wake = asyncio.Event()
    feed = follow(client, wake=wake, backoff=Backoff(first_s=600, most_s=600))
    scripted.stop()
    async with asyncio.timeout(20), contextlib.aclosing(feed):
        assert isinstance(await anext(feed), ServerUnavailable)
        scripted.start()
        again = asyncio.ensure_future(anext(feed))
        await asyncio.sleep(0)
        wake.set()
        assert isinstance(await again, DeviceStatus)
