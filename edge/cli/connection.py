"""How a command reaches the running appliance."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edge.cli.main import settings_from
from edge.config import CA_FILE, client_key
from tui.client import Address, RuntimeClient

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def connection_options(command: F) -> F:
    """Add `--url` and `--socket` to a command."""
    command = click.option("--socket", type=click.Path(path_type=Path), help="Unix socket of the appliance.")(command)
    return click.option("--url", help="Address of the appliance (its socket, else http://127.0.0.1:8080).")(command)


def address_of(url: str | None, socket: Path | None) -> Address:
    """The appliance that the options, or else the settings, name."""
    settings = settings_from()
    if socket is not None:
        return Address(settings.url, socket, socket_only=True)
    if url is not None:
        return Address(url)
    return Address(settings.url, settings.socket_path)


def client_of(address: Address, *, read_only: bool = False) -> RuntimeClient:
    """A client that presents EDGE_API_KEY and believes the certificates of EDGE_CA_FILE, where these are set."""
    ca_file = os.environ.get(CA_FILE)
    return RuntimeClient(
        address, key=client_key(os.environ), ca_file=Path(ca_file) if ca_file else None, read_only=read_only
    )


def with_client(address: Address, work: Callable[[RuntimeClient], Awaitable[T]]) -> T:
    """Run `work` with a client of the appliance."""

    async def run() -> T:
        async with client_of(address) as client:
            return await work(client)

    return asyncio.run(run())
