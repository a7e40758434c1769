"""`edge warm`: system prompts whose conversations begin without computing them."""

from __future__ import annotations

import re
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.models import print_json
from edge.cli.options import complete_models, human_size, json_option
from runtime.api.schema import PinnedPrefix

MAX_FILE_BYTES = 1 << 20


@click.command("warm")
@click.argument("model", required=False, shell_complete=complete_models)
@click.option("-s", "--system", metavar="FILE|TEXT", help="The system prompt: a file that holds it, or the text.")
@click.option("--name", help="Name of the pin; one of that name is replaced (the file's name, or made from the text).")
@click.option("--list", "as_list", is_flag=True, help="List what is pinned; without MODEL, for the loaded models.")
@click.option("--remove", metavar="NAME", help="Unpin a prefix, and forget it.")
@json_option
@connection_options
def warm(
    model: str | None, system: str | None, name: str | None, as_list: bool, remove: str | None, as_json: bool,
    url: str | None, socket: Path | None,
) -> None:  # fmt: skip
    """Compute a system prompt once and keep it, so that every conversation that begins with it starts at once.

    The running appliance computes what all such conversations share and pins it, for all who ask: in memory, and on the
    disk (EDGE_HOME/states), so that it is there after a restart too. With EDGE_STATE_DISK_BYTES=0 it lasts until the
    model is unloaded. Pins take at most half of what saved states may take (state_bytes, state_disk_bytes); one that
    finds no room is refused. The prompt must be sent as it was pinned, to the letter. MODEL is loaded if it is not.

    \b
    Examples:
      edge warm smollm2:135m-instruct --system prompts/boat.txt
      edge warm smollm2:135m-instruct --system "You answer in one short sentence. …" --name short
      edge warm --list
      edge warm smollm2:135m-instruct --remove boat
    """
    if sum([system is not None, as_list, remove is not None]) != 1:
        raise click.UsageError("Give one of --system, --list and --remove.")
    if model is None and not as_list:
        raise click.UsageError("Name the model: edge warm MODEL.")
    if name is not None and system is None:
        raise click.UsageError("--name goes with --system.")
    address = address_of(url, socket)
    if system is not None:
        text, stem = _read(system)
        pinned = with_client(address, lambda client: client.warm(model or "", text, name=name or stem))
        print_json(pinned) if as_json else click.echo(_sentence(pinned))
    elif remove is not None:
        with_client(address, lambda client: client.remove_prefix(model or "", remove))
        print_json({"model": model, "name": remove, "removed": True}) if as_json else click.echo(
            f"{remove} is unpinned"
        )
    else:
        prefixes = with_client(address, lambda client: client.prefixes(model))
        print_json({"prefixes": prefixes}) if as_json else _print(prefixes)


def _read(system: str) -> tuple[str, str | None]:
    """The prompt, and a name for it where it came from a file."""
    try:
        path = Path(system)
        if not path.is_file():
            return system, None
    except (OSError, ValueError):
        return system, None  # too long, or not such a name: a text
    if path.stat().st_size > MAX_FILE_BYTES:
        raise click.UsageError(f"{path} is larger than {human_size(MAX_FILE_BYTES)}: no system prompt is.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise click.UsageError(f"{path} cannot be read as text: {e}") from e
    return text, re.sub("[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")[:64] or None


def _sentence(p: PinnedPrefix) -> str:
    kept = "also after a restart" if p.on_disk else "until the model is unloaded, for no states are kept on the disk"
    return f"{p.name}: {p.num_tokens:,} tokens ({human_size(p.size_bytes)}) are pinned, {kept}"


def _print(prefixes: list[PinnedPrefix]) -> None:
    if not prefixes:
        click.echo("nothing is pinned for the loaded models", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("MODEL", "NAME", "TOKENS", "SIZE", "MEMORY", "DISK", "USES"):
        table.add_column(title, justify="right" if title in ("TOKENS", "SIZE", "USES") else "left", no_wrap=True)
    for p in prefixes:
        table.add_row(
            p.model, p.name, f"{p.num_tokens:,}", human_size(p.size_bytes), "yes" if p.in_memory else "no",
            "yes" if p.on_disk else "no", str(p.num_uses),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 200).print(table)
