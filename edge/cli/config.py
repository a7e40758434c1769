"""`edge config`."""

from __future__ import annotations

import json

import click

from edge.cli.main import settings_from
from edge.config import shown


@click.command("config")
@click.option("--running", is_flag=True, help="Of the appliance that runs, not of one started now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(running: bool, as_json: bool) -> None:
    """Show every setting, its value and where it came from: default, file, environment, flag.

    Settings stand in EDGE_HOME/edge.toml (or the file that EDGE_CONFIG names), in the environment as EDGE_<NAME>, or
    are flags of a command; the later wins. Passwords in addresses are masked.

    \b
    Examples:
      edge config
      edge config --running --json | jq .threads
    """
    if running:
        from edge.cli.connection import address_of, with_client  # an HTTP client, which the rest does without

        found = with_client(address_of(None, None), lambda client: client.config())
    else:
        found = shown(settings_from())
    if as_json:
        click.echo(json.dumps({s.name: {"value": s.value, "origin": s.origin} for s in found}, indent=2))
        return
    width = max(len(s.name) for s in found)
    for s in found:
        click.echo(f"{s.name:{width}}  {'(none)' if s.value == '' else s.value}  [{s.origin}]")
