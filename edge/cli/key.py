"""`edge key`: who may use the appliance over the network."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table

from edge.access.keys import ROLES, SCOPES, Key, Keys, Limits, Role, local_actor, parse_scopes, read_key, read_keys
from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import as_wrong_usage, complete_models, json_option, or_files
from edge.errors import EdgeError, InvalidRequest

F = TypeVar("F", bound=Callable[..., Any])


def _complete_keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        keys = read_keys(settings_from().state_db)
    except EdgeError:
        return []  # a shell that completes has no place for an error
    return [key.name for key in keys if key.revoked_s is None and key.name.startswith(incomplete)]


def _complete_list(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The next member of a list that is separated by commas."""
    before, comma, part = incomplete.rpartition(",")
    known = list(SCOPES) if param.name == "scope" else complete_models(ctx, param, part)
    return or_files([f"{before}{comma}{name}" for name in known if name.startswith(part)], incomplete)[1:]


def key_argument(command: F) -> F:
    """The key that a command is about."""
    return click.argument("key", shell_complete=_complete_keys)(command)


@click.group()
def key() -> None:
    """Make, list and revoke API keys.

    Programs of this machine need none: they reach the appliance on 127.0.0.1 and on its Unix socket. Any other address
    is served only with keys, and with TLS. They are kept hashed in EDGE_HOME/state.db, and a running appliance knows at
    once what these commands change.

    \b
    Examples:
      edge key create tablet --models 'smollm2:*' --rpm 60 --tokens-per-day 100000
      edge key create ops --role operator
      edge key list
      edge key revoke tablet
      EDGE_API_KEY=edge_… edge ps --url https://device.example:8080
    """


@key.command()
@click.argument("name", required=False)
@click.option("--role", type=click.Choice(list(ROLES)), help="What it may do, in one word.  [default: user]")
@click.option(
    "--scope", metavar="LIST", shell_complete=_complete_list, help=f"Instead of a role: of {', '.join(SCOPES)}."
)
@click.option(
    "--models", metavar="LIST", shell_complete=_complete_list,
    help="Models and adapters it may use, with * for any characters: smollm2:*,minilm:l6-v2.  [default: all]",
)  # fmt: skip
@click.option("--rpm", type=int, help="Most requests in any minute.")
@click.option("--tokens-per-day", type=int, help="Most tokens in 24 hours, of prompts and answers together.")
@click.option("--priority", type=click.IntRange(0, 3), default=0, show_default=True, help="0 is served first, 3 last.")
@json_option
def create(
    name: str | None, role: Role | None, scope: str | None, models: str | None, rpm: int | None,
    tokens_per_day: int | None, priority: int, as_json: bool,
) -> None:  # fmt: skip
    """Make a key. It is printed once, to stdout, and cannot be shown again.

    \b
    Roles and their scopes:
      user      chat, embed: ask models (what --scope chat,embed says too)
      viewer    view: status, models, logs, metrics, usage
      operator  chat, embed, view, operate: load, unload, pull and warm as well
      admin     all of these, and admin: remove models

    \b
    Examples:
      edge key create tablet --rpm 60
      edge key create batch --scope chat --priority 3 --tokens-per-day 1000000
      export EDGE_API_KEY=$(edge key create ops --role operator)
    """
    with as_wrong_usage(InvalidRequest):
        if role and scope:
            raise click.UsageError("Give --role or --scope, not both.")
        limits = Limits(
            scopes=parse_scopes(scope) if scope is not None else ROLES[role or "user"],
            models=tuple(part.strip() for part in models.split(",") if part.strip()) if models is not None else (),
            rpm=rpm,
            tokens_per_day=tokens_per_day,
            priority=priority,
        )
        if models is not None and not limits.models:
            raise click.UsageError("--models names no model: such a key could ask nothing.")
        made, secret = _keys().create(limits, name=name or "")
    _print_new(made, secret, as_json=as_json)


@key.command()
@key_argument
@json_option
def rotate(key: str, as_json: bool) -> None:
    """Give KEY (its name or id) another secret, printed once. The one before ends at once; limits and usage stay."""
    made, secret = _keys().rotate(key)
    _print_new(made, secret, as_json=as_json)


@key.command()
@key_argument
@json_option
def revoke(key: str, as_json: bool) -> None:
    """End KEY (its name or id): its next request is refused. What it used stays in `edge usage`."""
    ended = _keys().revoke(key)
    print_json(_as_json(ended)) if as_json else click.echo(f"{ended.name} ({ended.id}) is revoked")


@key.command("list")
@click.option("--all", "with_revoked", is_flag=True, help="Revoked ones too.")
@json_option
def list_keys(with_revoked: bool, as_json: bool) -> None:
    """List the keys. Their secrets are nowhere."""
    keys = [k for k in read_keys(settings_from().state_db) if with_revoked or k.revoked_s is None]
    if as_json:
        print_json({"keys": [_as_json(k) for k in keys]})
    elif keys:
        _print_table(keys)
    else:
        click.echo("no keys; make one with: edge key create NAME", err=True)


@key.command()
@key_argument
@json_option
def show(key: str, as_json: bool) -> None:
    """Show one KEY (its name or id)."""
    found = read_key(settings_from().state_db, key)
    print_json(_as_json(found)) if as_json else _print_table([found])


def _keys() -> Keys:
    return Keys(settings_from().state_db, actor=local_actor())


def _print_new(made: Key, secret: str, *, as_json: bool) -> None:
    if as_json:
        print_json({**_as_json(made), "key": secret})
        return
    click.echo(f"{made.name} ({made.id}): {_in_words(made.limits)}. Keep this key, it is not shown again:", err=True)
    click.echo(secret)


def _in_words(limits: Limits) -> str:
    parts = [", ".join(s for s in SCOPES if s in limits.scopes), ", ".join(limits.models) or "all models"]
    if limits.rpm is not None:
        parts.append(f"{limits.rpm:,} requests a minute")
    if limits.tokens_per_day is not None:
        parts.append(f"{limits.tokens_per_day:,} tokens a day")
    return "; ".join(parts)


def _as_json(key: Key) -> dict[str, object]:
    limits = key.limits
    return {
        "id": key.id,
        "name": key.name,
        "scopes": [s for s in SCOPES if s in limits.scopes],
        "models": list(limits.models),
        "rpm": limits.rpm,
        "tokens_per_day": limits.tokens_per_day,
        "priority": limits.priority,
        "created": key.created_s,
        "revoked": key.revoked_s,
    }


def _print_table(keys: list[Key]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "ID", "SCOPES", "MODELS", "RPM", "TOKENS/DAY", "PRIORITY", "MADE", "REVOKED"):
        table.add_column(title, justify="right" if title in ("RPM", "TOKENS/DAY", "PRIORITY") else "left")
    for k in keys:
        limits = k.limits
        table.add_row(
            k.name, k.id, ",".join(s for s in SCOPES if s in limits.scopes), ",".join(limits.models) or "all",
            _number(limits.rpm), _number(limits.tokens_per_day), str(limits.priority), _day(k.created_s),
            _day(k.revoked_s) if k.revoked_s is not None else "",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 200).print(table)


def _number(value: int | None) -> str:
    return "any" if value is None else f"{value:,}"


def _day(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
