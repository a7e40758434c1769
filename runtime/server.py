"""Settings to pool to application, on TCP and on a Unix socket; drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from typing_extensions import override

from edge.config import Settings
from edge.errors import ConfigError, EdgeError
from edge.store.models import ModelStore
from edge.telemetry.service import Telemetry
from runtime.api.app import create_app
from runtime.api.appliance import Appliance
from runtime.logs import RecentLines

log = logging.getLogger("edge.server")

DRAIN_S = 30.0


def check_bind(host: str) -> None:
    """Refuse an address that others can reach: this version has no keys.

    Raises:
        ConfigError: The address is not a loopback one.
    """
    if host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError as e:
        raise ConfigError(f"host must be an IP address or 'localhost', got {host!r}.") from e
    raise ConfigError(
        f"Serving on {host} would let anyone on the network use this device: this version has no API keys.",
        hint="Bind 127.0.0.1, or share the Unix socket, and put a proxy that authenticates in front.",
    )


def _tcp_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise ConfigError(
            f"Port {port} of {host} cannot be taken: {e.strerror}.",
            hint="Is an appliance running already? Choose another with --port.",
        ) from e
    return sock


def _unix_socket(path: Path) -> socket.socket:
    """A socket that only this user can reach. One left over by a killed appliance is replaced, a live one is not."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(
            f"The socket {path} cannot be used: {e.strerror or e}.", hint="Choose another EDGE_HOME."
        ) from e
    else:
        raise ConfigError(
            f"An appliance is already serving on {path}.", hint="Stop it first, or use another EDGE_HOME."
        )
    finally:
        probe.close()
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    return sock


class _Server(uvicorn.Server):
    """uvicorn, with a drain of our own on the first signal; the second ends at once."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._was_asked = False

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._was_asked:
            self.should_exit = self.force_exit = True
        self._was_asked = True
        self._on_signal()


async def _serve(appliance: Appliance, sockets: list[socket.socket], on_ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        create_app(appliance), log_config=None, access_log=False, http="httptools", ws="none",
        timeout_keep_alive=75, timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip
    draining = asyncio.Event()
    server = _Server(config, lambda: loop.call_soon_threadsafe(draining.set))

    async def drain() -> None:
        await draining.wait()
        if (num := sum(h.num_active for h in appliance.pool.hosts())) > 0:
            log.warning("stopping: waiting for %d requests, %.0f s at most", num, DRAIN_S)
        await appliance.pool.drain(DRAIN_S)
        appliance.end_events()
        server.should_exit = True

    async def announce() -> None:
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        gc.collect()
        gc.freeze()  # what start-up made stays: later collections need not look at it
        on_ready()

    helpers = [asyncio.create_task(drain()), asyncio.create_task(announce())]
    try:
        await server.serve(sockets=sockets)
    finally:
        for task in helpers:
            task.cancel()


def serve(settings: Settings, logs: RecentLines, *, on_ready: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_ready: Called once, with the TCP port, when both addresses answer.

    Raises:
        ConfigError: An address cannot be taken.
        StoreError: The store cannot be opened.
    """
    check_bind(settings.host)
    sockets = [_tcp_socket(settings.host, settings.port)]
    try:
        sockets.append(_unix_socket(settings.socket_path))
        store = ModelStore(settings.store_dir, seed=settings.seed)
        appliance = Appliance(settings, store, Telemetry(settings), logs)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            port: int = sockets[0].getsockname()[1]
            runner.run(_serve(appliance, sockets, lambda: on_ready(port)))
    except KeyboardInterrupt:
        log.warning("stopped at once by a second signal")
    except OSError as e:
        raise EdgeError(f"The appliance cannot start: {e}.") from e
    finally:
        if len(sockets) > 1:  # the path is ours to remove only where we bound it
            settings.socket_path.unlink(missing_ok=True)
        for sock in sockets:
            sock.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
