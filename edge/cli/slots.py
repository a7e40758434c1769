"""`edge activate`, `edge rollback`, `edge slots`: which version of a model serves under a name."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import complete_models, json_option, plain
from edge.errors import EdgeError
from edge.store.models import ModelStore
from runtime.api.schema import SlotInfo, SlotVersion
from tui.client import RuntimeClient

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SLOT_OF = {"text": "chat", "embeddings": "embed", "reranking": "rerank"}


class Duration(click.ParamType[float]):
    """``90``, ``90s``, ``10m``, ``2h`` or ``1d``, in seconds."""

    name = "TIME"

    @override
    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)", str(value))
        if found is None:
            self.fail(f"{str(value)[:40]!r} is no time, such as 90s, 10m or 2h.", param, ctx)
        return float(found[1]) * _UNITS_S[found[2]]


def complete_slots(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion: the slots of the store."""
    names = {*_SLOT_OF.values()}
    with contextlib.suppress(EdgeError):  # a shell that completes has no place for an error
        names |= set(ModelStore(settings_from().store_dir).slots())
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


@click.command("activate")
@click.argument("model", shell_complete=complete_models)
@click.option("--slot", metavar="NAME", shell_complete=complete_slots, help="By what the model does, if not given.")
@click.option(
    "--trial", type=Duration(), default=600.0, show_default="10m", help="Without a crash for so long, it stays."
)
@click.option("--within", type=Duration(), help="Time for its golden prompts (as its package says, or 30s).")
@click.option("--force", is_flag=True, help="Take a release that is older than one that was confirmed here.")
@json_option
@connection_options
def activate(
    model: str, slot: str | None, trial: float, within: float | None, force: bool, as_json: bool, url: str | None,
    socket: Path | None,
) -> None:  # fmt: skip
    """Put MODEL into a slot: requests that name the slot (`"model": "chat"`) are answered by it.

    It is loaded beside the version that serves, or in its place where memory is short (requests wait meanwhile), and
    has to answer the golden prompts of its package as it should, in time. Then it serves on trial. If its engine dies
    or hangs before the trial is over, or the device does, the version before serves again; `edge slots` says why.

    \b
    Examples:
      edge activate smollm2:135m-instruct
      edge activate assistant:v2 --slot chat --trial 1h
      edge activate minilm:l6-v2 --slot embed --trial 0
    """
    click.echo(f"loading and checking {model} …", err=True)

    async def work(client: RuntimeClient) -> SlotInfo:
        name = slot or await _slot_for(client, model)
        return await client.activate(name, model, trial_s=trial, within_s=within, force=force)

    info = with_client(address_of(url, socket), work)
    print_json(info) if as_json else click.echo(_sentence(info))


async def _slot_for(client: RuntimeClient, model: str) -> str:
    kinds = {m.ref: m.kind for m in await client.models()}
    return _SLOT_OF.get(kinds.get(model, "text"), "chat")


@click.command("rollback")
@click.argument("slot", default="chat", shell_complete=complete_slots)
@click.option("--force", is_flag=True, help="Also to a release that is older than one that was confirmed here.")
@json_option
@connection_options
def rollback(slot: str, force: bool, as_json: bool, url: str | None, socket: Path | None) -> None:
    """Have the version of SLOT that was before serve again (chat, if no slot is named).

    A version on trial goes. A confirmed one and the one before it change places, so a second rollback undoes the first.

    \b
    Examples:
      edge rollback
      edge rollback embed
    """
    info = with_client(address_of(url, socket), lambda client: client.roll_back(slot, force=force))
    print_json(info) if as_json else click.echo(_sentence(info))


@click.command("slots")
@click.option("--remove", metavar="NAME", shell_complete=complete_slots, help="Forget a slot; its models stay.")
@json_option
@connection_options
def slots(remove: str | None, as_json: bool, url: str | None, socket: Path | None) -> None:
    """List the slots: which version serves, which was before, which is on trial, and why the last one went.

    \b
    Examples:
      edge slots
      edge slots --json | jq -r '.slots[] | [.name, .serves] | @tsv'
      edge slots --remove embed
    """
    address = address_of(url, socket)
    if remove is not None:
        with_client(address, lambda client: client.remove_slot(remove))
        print_json({"name": remove, "removed": True}) if as_json else click.echo(f"the slot {remove} is gone")
        return
    found = with_client(address, lambda client: client.slots())
    if as_json:
        print_json({"slots": found})
    elif found:
        _print(found)
    else:
        click.echo("No slots yet. Fill one with: edge activate MODEL", err=True)


def _print(found: list[SlotInfo]) -> None:
    table = Table("SLOT", "STATE", "SERVES", "CURRENT", "BEFORE", "ON ITS WAY", box=None, pad_edge=False)
    for info in found:
        serves = plain(info.serves or "-")
        table.add_row(
            info.name, info.state, serves, _version(info.current), _version(info.previous), _version(info.candidate)
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for info in found:
        if info.last is not None and info.last.reason is not None:
            click.echo(f"{info.name}: {plain(info.last.ref)} was taken out: {plain(info.last.reason)}")


def _version(version: SlotVersion | None) -> str:
    """Name and the first digits of the digest: two versions may have the same name."""
    return "-" if version is None else f"{plain(version.ref)} ({version.digest[7:15]})"


def _sentence(info: SlotInfo) -> str:
    serves = f"{plain(info.serves or 'nothing')} serves as '{info.name}'"
    if info.state != "trial" or info.trial_s is None:
        return serves
    return f"{serves}, on trial for {max(0.0, info.trial_s - (info.served_s or 0.0)):.0f} s"
