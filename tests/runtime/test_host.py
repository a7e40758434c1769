"""A model's host, without a worker behind it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from pathlib import Path

import pytest
from typing_extensions import override

from edge.config import Settings
from edge.errors import InvalidRequest
from edge.store.models import ModelStore
from runtime import wire
from runtime.host import ModelHost
from runtime.poison import PoisonCabinet
from runtime.request import SamplingParams
from tests.support import DEFAULT_MODEL, SEED


class WorkerlessHost(ModelHost):
    """One whose worker is ready at once, and does nothing."""

    @override
    async def _keep_running(self, stop: asyncio.Event) -> None:
        self._set_state("ready")
        await stop.wait()


async def test_an_unload_of_what_is_unloaded_does_not_end_the_load_that_comes_after_it(tmp_path: Path) -> None:
    host = WorkerlessHost(Settings(home=tmp_path), ModelStore(SEED).get(DEFAULT_MODEL), PoisonCabinet(tmp_path))
    await host.wait_ready(5)
    await host.unload()
    assert host.state == "unloaded"
    await asyncio.gather(host.unload(), host.wait_ready(5))
    assert host.state == "ready"
    await asyncio.gather(host.unload(), host.unload())
    assert host.state == "unloaded"


class ConnectedHost(WorkerlessHost):
    """One that sends to a socket what a worker would be sent."""

    async def connect(self, to: socket.socket) -> asyncio.Transport:
        self._transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=to)
        return self._transport


def generate(number: int, prompt: str) -> wire.Generate:
    return wire.Generate(number, None, prompt, SamplingParams(), 1, [])


async def test_what_no_worker_would_read_is_refused_and_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 10_000)
    host = ConnectedHost(Settings(home=tmp_path), ModelStore(SEED).get(DEFAULT_MODEL), PoisonCabinet(tmp_path))
    near, far = socket.socketpair()
    with far, closing(await host.connect(near)):
        await host.wait_ready(5)
        with pytest.raises(InvalidRequest, match="larger than 10,000 bytes"):
            await host.start(lambda i: generate(i, "x" * 10_000), timeout_s=5, allowed_s=5)
        assert host.num_active == 0
        await host.start(lambda i: generate(i, "x" * 9_000), timeout_s=5, allowed_s=5)
        assert wire.frame_length(far.recv(wire.HEADER_BYTES)) < 10_000
        await host.unload()
