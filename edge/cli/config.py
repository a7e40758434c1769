"""`edge config`."""

from __future__ import annotations

import dataclasses
import json

import click

from edge.cli.main import settings_from


@click.command("config")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(as_json: bool) -> None:
    """Show every setting, its value and where it came from: default, file, environment.

    Settings stand in EDGE_HOME/edge.toml (or the file that EDGE_CONFIG names), in the environment as EDGE_<NAME>, or
    are flags of a command; the later wins.
    """
    settings = settings_from()
    rows = [
        (f.name, getattr(settings, f.name), settings.origins.get(f.name, "default"))
        for f in dataclasses.fields(settings)
        if f.name != "origins"
    ]
    if as_json:
        table = {name: {"value": value, "origin": origin} for name, value, origin in rows}
        click.echo(json.dumps(table, indent=2, default=str))
        return
    width = max(len(name) for name, _, _ in rows)
    for name, value, origin in rows:
        click.echo(f"{name:{width}}  {'(none)' if value == '' else value}  [{origin}]")
