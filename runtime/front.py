"""The HTTP front: the application on its sockets, and a drain on the first signal.

Apart from `runtime.server`, since importing what speaks HTTP takes longer than starting an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from typing_extensions import override

from edge.config import Settings
from edge.store.models import ModelStore
from edge.telemetry.service import Telemetry
from runtime.api.app import create_app
from runtime.api.appliance import Appliance
from runtime.api.batches.service import batches_of
from runtime.logs import RecentLines
from runtime.pool import Pool
from runtime.tls import TlsFiles

log = logging.getLogger("edge.server")

DRAIN_S = 30.0


class _Server(uvicorn.Server):
    """uvicorn, with a drain of our own on the first signal; the second ends at once.

    Attributes:
        woken: Set when there may be a reason to end.
    """

    def __init__(self, config: uvicorn.Config, tls: TlsFiles | None, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._tls = tls
        self._on_signal = on_signal
        self._was_asked = False
        self.woken = asyncio.Event()

    @override
    async def main_loop(self) -> None:
        """Until there is a reason to end. Renews the date in answers each second; uvicorn's own loop looks ten times as
        often, which was most of what an idle appliance did."""
        while not await self.on_tick(0):
            self.woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.woken.wait()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, with TLS on TCP only: nobody listens in on a Unix socket."""
        if self._tls is None:
            await super().startup(sockets)
            return
        tcp = [s for s in sockets or [] if s.family != socket.AF_UNIX]
        await super().startup([s for s in sockets or [] if s not in tcp])
        self.started = False
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        protocol = partial(
            make, config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )
        for sock in tcp:
            self.servers.append(
                await asyncio.get_running_loop().create_server(
                    protocol, sock=sock, ssl=self._tls.context, backlog=self.config.backlog
                )
            )
        self.started = True

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._was_asked:
            self.should_exit = self.force_exit = True
        self._was_asked = True
        self._on_signal()


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

    server = _Server(config, tls, lambda: loop.call_soon_threadsafe(on_signal))

    async def drain() -> None:
        await draining.wait()
        await batches_of(app.state).pause()
        if (num := sum(h.num_active for h in appliance.pool.hosts())) > 0:
            log.warning("stopping: waiting for %d requests, %.0f s at most", num, DRAIN_S)
        await appliance.pool.drain(DRAIN_S)
        appliance.end_events()
        server.should_exit = True
        server.woken.set()

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
