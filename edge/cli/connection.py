"""How a command reaches the running appliance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edge.cli.main import settings_from
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
        return Address(f"http://{settings.host}:{settings.port}", socket, socket_only=True)
    if url is not None:
        return Address(url)
    return Address(f"http://{settings.host}:{settings.port}", settings.socket_path)


def with_client(address: Address, work: Callable[[RuntimeClient], Awaitable[T]]) -> T:
    """Run `work` with a client of the appliance."""

    async def run() -> T:
        async with RuntimeClient(address) as client:
            return await work(client)

    return asyncio.run(run())
