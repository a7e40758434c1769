"""From an address to a gateway that runs."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from edge.errors import ConfigError

from .app import create_app
from .ledger import Ledger

BACKLOG = 1024
STOP_TIMEOUT_S = 10


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on a loopback address; port 0 takes a free one.

    Raises:
        ConfigError: The address is not loopback, or cannot be bound.
    """
    address = "127.0.0.1" if host == "localhost" else host
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            f"The gateway does not listen on {host}: it cannot tell one device from another yet.",
            hint="Devices will enrol in a later version. Until then bind 127.0.0.1 and let a reverse proxy or an SSH "
            "tunnel that knows its callers lead there.",
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as e:
        raise ConfigError(f"{host}:{port} cannot be bound: {e.strerror}.", hint="Choose another with --port.") from e


def run_gateway(host: str, port: int, database: Path, *, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it; `on_ready` gets the address that it answers on.

    Raises:
        ConfigError: The address cannot be used.
        StoreError: The database cannot be used.
    """
    with bind(host, port) as listener:
        ledger = Ledger(database)
        config = uvicorn.Config(
            create_app(ledger),
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        name = listener.getsockname()
        shown = f"[{name[0]}]" if ":" in name[0] else name[0]
        on_ready(f"http://{shown}:{name[1]}")
        uvicorn.Server(config).run(sockets=[listener])
