"""`edge ps`, `edge load`, `edge unload`: what the running appliance has in memory."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.models import print_json
from edge.cli.options import complete_models
from runtime.api.schema import ModelInfo


def _print_models(models: list[ModelInfo]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("MODEL", "KIND", "STATE", "MEMORY", "KV", "ACTIVE", "WAITING", "TOK/S", "RESTARTS", box=None)
    for m in models:
        kv = f"{100 * m.kv_cells_used // m.kv_cells} %" if m.kv_cells else ""
        memory = f"{m.memory_bytes / 2**20:,.0f} MiB" if m.memory_bytes else ""
        table.add_row(
            m.ref, m.kind, m.state, memory, kv, str(m.requests_active), str(m.requests_waiting), f"{m.rate_tok_s:.1f}",
            str(m.num_restarts),
        )  # fmt: skip
    Console().print(table)
    for m in models:
        if m.draft is not None:
            click.echo(f"{m.ref} has the draft model {_draft(m)}")
        if m.draft_problem is not None:
            click.echo(f"{m.ref} has no draft model: {m.draft_problem}", err=True)


def _draft(model: ModelInfo) -> str:
    """The draft model and how often it was right."""
    if not model.drafted_tokens:
        return model.draft or ""
    return f"{model.draft}, {100 * model.draft_accepted_tokens // model.drafted_tokens} % of its guesses right"


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def ps(as_json: bool, url: str | None, socket: Path | None) -> None:
    """List the models that the running appliance has loaded, is loading, or failed to load."""
    models = with_client(address_of(url, socket), lambda client: client.models())
    models = [m for m in models if m.state != "unloaded"]
    if as_json:
        print_json(models)
    elif models:
        _print_models(models)
    else:
        click.echo("no model is loaded", err=True)


@click.command("load")
@click.argument("model", shell_complete=complete_models)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def load(model: str, as_json: bool, url: str | None, socket: Path | None) -> None:
    """Load MODEL into the running appliance; returns when it is ready.

    \b
    Example:
      edge load smollm2:135m-instruct
    """
    click.echo(f"loading {model} …", err=True)
    info = with_client(address_of(url, socket), lambda client: client.load(model))
    print_json(info) if as_json else _print_models([info])


@click.command("unload")
@click.argument("model", shell_complete=complete_models)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def unload(model: str, as_json: bool, url: str | None, socket: Path | None) -> None:
    """Unload MODEL from the running appliance; its memory is free when this returns."""
    info = with_client(address_of(url, socket), lambda client: client.unload(model))
    print_json(info) if as_json else click.echo(f"{info.ref} is {info.state}")
