"""The HTTP front: the application on its sockets, and a drain on the first signal.

Apart from `runtime.server`, since importing what speaks HTTP takes longer than starting an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from typing_extensions import override

from edge.config import Settings
from edge.store.models import ModelStore
from edge.telemetry.service import Telemetry
from runtime.api.app import create_app
from runtime.api.appliance import Appliance
from runtime.api.batches.service import batches_of
from runtime.connection import HttpConnection
from runtime.door import Door, Manners
from runtime.listener import PEER_SHARE, Listener, raise_fd_limit, room_for
from runtime.logs import RecentLines
from runtime.pool import Pool
from runtime.tls import TlsFiles

log = logging.getLogger("edge.server")


class _Server(uvicorn.Server):
    """uvicorn, with a drain of our own on the first signal; the second ends at once.

    Attributes:
        woken: Set when there may be a reason to end.
    """

    def __init__(
        self, config: uvicorn.Config, door: Door, tls: TlsFiles | None, on_signal: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._door = door
        self._tls = tls.context if tls is not None else None
        self._listeners: list[Listener] = []
        self._on_signal = on_signal
        self._was_asked = False
        self.woken = asyncio.Event()

    @override
    async def main_loop(self) -> None:
        """Until there is a reason to end. Looks after connections and renews the date in answers each second; uvicorn's
        own loop looks ten times as often, which was most of what an idle appliance did."""
        while not await self.on_tick(0):
            self._door.sweep(asyncio.get_running_loop().time())
            self.woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.woken.wait()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, but for how connections come in."""
        await super().startup([])
        self._listeners = [Listener(sock, self._door, self._make, self._tls) for sock in sockets or []]

    def _make(self, sock: socket.socket, peer: str) -> HttpConnection:
        state = self.lifespan.state
        return HttpConnection(self.config, self.server_state, state, door=self._door, sock=sock, peer=peer)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, likewise."""
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._was_asked:
            self.should_exit = self.force_exit = True
        self._was_asked = True
        self._on_signal()


async def _each(*steps: Callable[[], Awaitable[None]]) -> None:
    """Take each step, also after one that fails."""
    for step in steps:
        try:
            await step()
        except Exception:
            log.exception("stopping: a step failed")


async def answer(
    settings: Settings,
    store: ModelStore,
    pool: Pool,
    logs: RecentLines,
    sockets: list[socket.socket],
    tls: TlsFiles | None,
    on_ready: Callable[[], None],
) -> None:
    """Answer requests on these sockets until a signal, then drain.

    Args:
        on_ready: Called once, when all sockets answer.
    """
    appliance = Appliance(settings, store, pool, Telemetry(settings), logs)
    most = room_for(settings.max_connections, max_fds=raise_fd_limit())
    of_peer = most if settings.tls_by_proxy else max(1, most // PEER_SHARE)  # all come from the proxy
    door = Door(Manners(most, of_peer, settings.head_timeout_s, settings.stall_timeout_s))
    appliance.telemetry.add_gauge("edge.connections.open", lambda: float(len(door)), text="Connections that are open.")
    loop = asyncio.get_running_loop()
    app = create_app(appliance)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, http="httptools", ws="none",
        timeout_keep_alive=75, timeout_graceful_shutdown=5, server_header=False,
        # Whose address a proxy names is believed only where the operator says that there is one.
        proxy_headers=bool(settings.tls_by_proxy),
    )  # fmt: skip
    draining = asyncio.Event()

    def on_signal() -> None:
        draining.set()
        server.woken.set()

    server = _Server(config, door, tls, lambda: loop.call_soon_threadsafe(on_signal))

    async def drain() -> None:
        await draining.wait()
        try:
            door.drain()
            # The last one tells who still waits why.
            await _each(batches_of(app.state).pause, appliance.activation.close, finish_requests, appliance.pool.close)
            appliance.end_events()
        finally:
            server.should_exit = True
            server.woken.set()

    async def finish_requests() -> None:
        if (num := sum(h.num_active for h in appliance.pool.hosts())) > 0:
            log.warning("stopping: waiting for %d requests, %.0f s at most", num, settings.drain_timeout_s)
        await appliance.pool.drain(settings.drain_timeout_s)

    async def announce() -> None:
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        gc.freeze()  # what start-up made stays: later collections need not look at it
        gc.enable()
        on_ready()

    helpers = [asyncio.create_task(drain()), asyncio.create_task(announce())]
    try:
        await server.serve(sockets=sockets)
    finally:
        for task in helpers:
            task.cancel()
