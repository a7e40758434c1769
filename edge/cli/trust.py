"""`edge trust`: whose models this device takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.notes import note
from edge.cli.options import json_option, or_files
from edge.errors import EdgeError
from edge.trust.keys import TrustedKey, TrustFiles

F = TypeVar("F", bound=Callable[..., Any])


def _files() -> TrustFiles:
    return TrustFiles.of(settings_from())


def _complete_keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        names = [key.name for key in _files().load().keys if key.name.startswith(incomplete)]
    except EdgeError:
        names = []  # a shell that completes has no place for an error
    return or_files(names, incomplete)


@click.group()
def trust() -> None:
    """Say whose models this device takes.

    Models are signed where they are made (edge sign). What becomes of others is the setting trust: enforce refuses
    them, warn writes it to the log, off does not look. Keys come with the installation or are added here by hand, never
    over the network. Changes hold at once: a model is judged when it comes in and each time it is loaded.

    \b
    Examples:
      edge trust add plant.pem
      edge trust list
      edge trust revoke plant --reason "the laptop was stolen"
      EDGE_TRUST=enforce edge serve
    """


@trust.command("list")
@json_option
def list_trust(as_json: bool) -> None:
    """List the trusted keys, what is revoked, and the highest confirmed release of each model."""
    settings, found = settings_from(), _files().load()
    if as_json:
        print_json(
            {
                "policy": settings.trust,
                "keys": [_as_json(key, is_revoked=key.id in found.revoked) for key in found.keys],
                "revoked": [{"subject": subject, "reason": reason} for subject, reason in found.revoked.items()],
                "releases": found.releases,
            }
        )
        return
    click.echo(f"policy: {settings.trust}", err=True)
    if found.keys:
        _print_keys(found.keys, found.revoked)
    else:
        click.echo("no key is trusted; add one with: edge trust add KEY.pem", err=True)
    for subject, reason in found.revoked.items():
        click.echo(f"revoked    {subject}{f'  {reason}' if reason else ''}")
    for name, release in found.releases.items():
        click.echo(f"confirmed  {name}  release {release}")


def _print_keys(keys: tuple[TrustedKey, ...], revoked: Any) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "ID", "KIND", "FROM"):
        table.add_column(title, no_wrap=True)
    for key in keys:
        mark = " (revoked)" if key.id in revoked else ""
        table.add_row(key.name + mark, key.id[:16], _kind(key), _origin(key))
    Console(width=None if Console().is_terminal else 200).print(table)


def _kind(key: TrustedKey) -> str:
    return "authority" if key.authority is not None else "key"


def _origin(key: TrustedKey) -> str:
    return "installation" if key.is_installed else "device"


def _as_json(key: TrustedKey, *, is_revoked: bool) -> dict[str, object]:
    return {
        "id": key.id, "name": key.name, "kind": _kind(key), "from": _origin(key), "path": str(key.path),
        "is_revoked": is_revoked,
    }  # fmt: skip


@trust.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="What to call it.  [default: the file's name]")
@json_option
def add(file: Path, *, name: str | None, as_json: bool) -> None:
    """Trust what the key in FILE signed: a public key, or the certificate of an authority that vouches for signers.

    Get it from its owner and not from where the models are, and compare the id that is printed.

    \b
    Examples:
      edge trust add plant.pem
      edge trust add /media/usb/authority.pem --name plant-ca
    """
    added = _files().add(file, name=name or "")
    note("trust.add", f"{added.name} {added.id}", store_dir=None)
    if as_json:
        print_json(_as_json(added, is_revoked=False))
    else:
        click.echo(f"{added.name} is trusted: {_kind(added)} {added.id}")


@trust.command()
@click.argument("key", shell_complete=_complete_keys)
def remove(key: str) -> None:
    """Trust KEY (its name or id) no longer. One that was stolen is better revoked: then it cannot be added again by
    mistake."""
    removed = _files().remove(key)
    note("trust.remove", f"{removed.name} {removed.id}", store_dir=None)
    click.echo(f"{removed.name} is no longer trusted")


@trust.command()
@click.argument("what", shell_complete=_complete_keys)
@click.option("--reason", default="", help="Why; refusals repeat it.")
def revoke(what: str, reason: str) -> None:
    """Refuse from now on what a key signed, or one release.

    WHAT is the name of a trusted key, the id of any, a PEM file with a key or a certificate, or the digest of a
    package's manifest (edge show MODEL). It is written to EDGE_HOME/trust/revoked.txt, which you may copy to other
    devices. To take it back, remove the line.

    \b
    Examples:
      edge trust revoke plant --reason "the laptop was stolen"
      edge trust revoke sha256:9f86d0… --reason "answers wrongly about dosage"
    """
    subject = _files().revoke(what, reason=reason)
    note("trust.revoke", subject, store_dir=None)
    click.echo(f"revoked {subject}")
