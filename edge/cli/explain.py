"""`edge explain`: why a model is served as it is."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.models import print_json
from edge.cli.options import complete_models, json_option


@click.command("explain")
@click.argument("model", shell_complete=complete_models)
@json_option
@connection_options
def explain(model: str, as_json: bool, url: str | None, socket: Path | None) -> None:
    """Tell why the running appliance serves MODEL as it does: engine, threads, context, draft model, memory.

    What is not decided before a load is told once the model is loaded: edge load MODEL.

    \b
    Examples:
      edge explain smollm2:135m-instruct
      edge explain smollm2:135m-instruct --json | jq -r '.decisions[] | select(.name == "cells").reason'
    """
    found = with_client(address_of(url, socket), lambda client: client.explain(model))
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("WHAT", "VALUE", "WHY", box=None, title=f"{found.model}, {found.state}", title_justify="left")
    for decision in found.decisions:
        value = decision.value
        table.add_row(decision.name, f"{value:,}" if isinstance(value, int) else value or "-", decision.reason)
    Console(width=None if Console().is_terminal else 200).print(table)
