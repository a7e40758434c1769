"""`edge delta`: what a device that has one version of a model needs for the next."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.models import print_json
from edge.cli.notes import note
from edge.cli.options import complete_models, human_size, json_option, open_store, store_option
from edge.cli.pull import progress_on_stderr
from edge.store.delta import attach_delta
from edge.store.transfer import Control


@click.command()
@click.argument("base", shell_complete=complete_models)
@click.argument("new", shell_complete=complete_models)
@store_option
@json_option
def delta(base: str, new: str, *, store_dir: Path | None, as_json: bool) -> None:
    """Make the difference between two models and attach it to the new one, so that devices that have BASE need little
    to get NEW: a few MB of a hundred where all weights changed a little.

    The delta travels with NEW when it is pushed or exported. A device that has BASE takes it by itself when it pulls
    NEW, and checks what comes out against NEW's digest; where it does not fit or is damaged, the device takes the whole
    file. It changes nothing of NEW, so a signature still holds. Both models must be of one architecture and type.

    \b
    Examples:
      edge delta assistant:v1 assistant:v2
      edge push assistant:v2 oci://registry.example.org/assistant:v2
    """
    store = open_store(store_dir)
    first, second = store.get(base), store.get(new)
    with progress_on_stderr() as report:
        made = attach_delta(store, first, second, Control(report, lambda: False))
    note("model.delta", f"{first.ref} {second.ref}", store_dir=store_dir)
    if as_json:
        print_json({"base": made.base, "target": made.target, "bytes": made.size_bytes, "whole": made.target_bytes})
        return
    share = 100 * made.size_bytes / made.target_bytes
    click.echo(f"{first.ref} -> {second.ref}  {human_size(made.size_bytes)}  ({share:.1f} % of the whole)")
