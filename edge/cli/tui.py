"""`edge tui`: the operator's terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edge.cli.main import settings_from
from edge.errors import ConfigError


@click.command(
    epilog="""\b
    Examples:
      edge tui                              this device
      edge tui --readonly                   look, change nothing
      EDGE_API_KEY=edge_… edge tui --url https://10.0.0.7:8080   another device
      edge tui --socket /run/edge.sock      over a Unix socket

    Keys: ? lists them. Without a terminal use `edge ps --json` and `edge telemetry status --json`.
    """
)
@click.option("--url", help="Where the appliance answers.  [default: its socket, else http://127.0.0.1:8080]")
@click.option("--socket", type=click.Path(path_type=Path), help="The appliance's Unix socket.")
@click.option("--readonly", is_flag=True, help="Show everything, change nothing.")
@click.option(
    "--colors",
    type=click.Choice(["auto", "full", "16"]),
    default="auto",
    show_default=True,
    help="16 uses the terminal's own colours.",
)
def tui(url: str | None, socket: Path | None, readonly: bool, colors: str) -> None:
    """Open the operator's terminal: how the device is, its models, a chat, its log."""
    from edge.cli.connection import client_of
    from tui.client import find_address

    settings = settings_from()
    address = find_address(
        url=url,
        socket=socket,
        default_url=settings.url,
        default_socket=settings.socket_path,
    )
    client = client_of(address, read_only=readonly)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("edge tui needs a terminal.", hint="In scripts use: edge ps --json")
    from tui.app import EdgeTerminal

    EdgeTerminal(client, read_only=readonly, theme="edge-16" if _wants_16(colors) else "edge-dark").run()


def _wants_16(colors: str) -> bool:
    from rich.console import Console

    return colors == "16" or (colors == "auto" and Console().color_system in (None, "standard"))
