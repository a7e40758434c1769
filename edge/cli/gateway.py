"""`edge gateway`: the reference receiver of telemetry."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.main import settings_from


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; loopback only for now.")
@click.option("--port", default=4318, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option(
    "--db",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Database.  [default: gateway.db in EDGE_HOME]",
)
def gateway(host: str, port: int, db: Path | None) -> None:
    """Run the reference telemetry gateway.

    It receives OTLP over HTTP, has every batch on the disk before it answers, counts each one once, and tells what it
    knows under /fleet/v1.

    \b
    Examples:
      edge gateway
      EDGE_GATEWAY_URL=http://127.0.0.1:4318 edge serve
      curl http://127.0.0.1:4318/fleet/v1/devices
    """
    from edge.gateway.server import run_gateway

    database = db or settings_from().home / "gateway.db"

    def say_ready(address: str) -> None:
        click.echo(f"The gateway listens on {address} and keeps {database}.", err=True)
        click.echo(f"  devices send there with EDGE_GATEWAY_URL={address}", err=True)
        click.echo(f"  curl {address}/fleet/v1/devices", err=True)

    run_gateway(host, port, database, on_ready=say_ready)
