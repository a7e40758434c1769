"""Settings to pool to application, on TCP and on a Unix socket; drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from edge.access.keys import read_keys
from edge.config import Settings, is_loopback
from edge.errors import ConfigError, EdgeError, StoreError
from edge.store.models import ModelStore
from runtime.logs import RecentLines
from runtime.pool import Pool
from runtime.process import WorkerProcess
from runtime.tls import TlsFiles

log = logging.getLogger("edge.server")

BACKLOG = 2048
"""Who connects while the appliance starts waits instead of being refused."""


def check_bind(settings: Settings) -> None:
    """Refuse an address that others can reach, unless they need a key, and nobody on the way can read it.

    Raises:
        ConfigError: There is no valid key, or nothing that ends TLS.
    """
    if is_loopback(settings.host):
        return
    fixes: list[str] = []
    if not any(key.revoked_s is None for key in read_keys(settings.state_db)):
        fixes.append("make an API key: edge key create")
    if not settings.tls_cert and not settings.tls_by_proxy:
        fixes.append(
            "give a certificate: --tls-cert FILE --tls-key FILE; or name what ends TLS in front of this appliance: "
            "--tls-by-proxy nginx"
        )
    if fixes:
        raise ConfigError(
            f"Serving on {settings.host} would let anyone on the network use this device, or read what is sent to it.",
            hint=f"Before that, {'; and '.join(fixes)}. Or bind 127.0.0.1.",
        )


def _tcp_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
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
        sock.listen(BACKLOG)
    finally:
        os.umask(before)
    return sock


async def _serve(
    settings: Settings,
    store: ModelStore,
    logs: RecentLines,
    sockets: list[socket.socket],
    tls: TlsFiles | None,
    on_ready: Callable[[], None],
    waiting: WorkerProcess | None,
) -> None:
    pool = Pool(settings, store)
    with contextlib.suppress(StoreError):  # told where the slots are taken up: runtime.activation
        await asyncio.to_thread(pool.read_slots)
    if waiting is not None:
        await pool.preload(settings.default_model, waiting)
    front = await asyncio.to_thread(importlib.import_module, "runtime.front")  # 0.2 s, while the engine starts
    await front.answer(settings, store, pool, logs, sockets, tls, on_ready)


def serve(
    settings: Settings, logs: RecentLines, *, on_ready: Callable[[int], None], waiting: WorkerProcess | None = None
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_ready: Called once, with the TCP port, when both addresses answer.
        waiting: A worker for the default model, which was started first.

    Raises:
        ConfigError: An address cannot be taken, or is open to others; or the certificate cannot be used.
        StoreError: The store cannot be opened.
    """
    check_bind(settings)
    tls = TlsFiles(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
    sockets = [_tcp_socket(settings.host, settings.port)]
    try:
        sockets.append(_unix_socket(settings.socket_path))
        store = ModelStore(settings.store_dir, seed=settings.seed)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            port: int = sockets[0].getsockname()[1]
            runner.run(_serve(settings, store, logs, sockets, tls, lambda: on_ready(port), waiting))
    except KeyboardInterrupt:
        log.warning("stopped at once by a second signal")
    except OSError as e:
        raise EdgeError(f"The appliance cannot start: {e}.") from e
    finally:
        if len(sockets) > 1:  # the path is ours to remove only where we bound it
            settings.socket_path.unlink(missing_ok=True)
        for sock in sockets:
            sock.close()
        if waiting is not None:
            waiting.kill()  # where nobody came to take it


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
