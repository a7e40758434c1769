"""`edge usage`: what each key used."""

from __future__ import annotations

import csv
import datetime
import sys
from collections.abc import Mapping
from dataclasses import asdict, astuple

import click
from rich.console import Console
from rich.table import Table

from edge.access.keys import read_keys
from edge.access.usage import COLUMNS, DIMENSIONS, Dimension, UsageRow, read_usage
from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import json_option, plain

_DAY = click.DateTime(["%Y-%m-%d"])


def _parse_by(ctx: click.Context, param: click.Parameter, value: str) -> tuple[Dimension, ...]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    by: tuple[Dimension, ...] = tuple(DIMENSIONS[DIMENSIONS.index(n)] for n in names if n in DIMENSIONS)
    if len(by) != len(names) or len(set(by)) != len(by):
        raise click.BadParameter(f"{value!r} is no list of {', '.join(DIMENSIONS)}, each once.")
    return by


@click.command()
@click.option(
    "--by", default="key,model", show_default=True, callback=_parse_by, metavar="LIST", help="Of key, model and day."
)
@click.option("--since", type=_DAY, help="First day (UTC), as 2026-11-20.")
@click.option("--until", type=_DAY, help="Last day.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
def usage(
    by: tuple[Dimension, ...], since: datetime.datetime | None, until: datetime.datetime | None, as_csv: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what each key used: requests and tokens, as their clients were told them.

    Tokens in, out and cached are of whole answers, as `usage` in the answer says. Undelivered are those computed for
    requests that failed or whose client went away. A request is in the table a second after its end. Who had no key is
    (none); requests that named no model of the store are under (none) too.

    \b
    Examples:
      edge usage
      edge usage --by key,model,day --since 2026-11-01 --csv > november.csv
      edge usage --by day --json
    """
    if as_csv and as_json:
        raise click.UsageError("Give --csv or --json, not both.")
    path = settings_from().state_db
    rows = read_usage(path, by, since=_text(since), until=_text(until))
    names = {key.id: key.name for key in read_keys(path)}
    if as_json:
        print_json({"usage": [_as_json(row, names) for row in rows]})
    elif as_csv:
        _write_csv(rows, by, names)
    elif rows:
        _print(rows, by, names)
    else:
        click.echo("nothing was used", err=True)


def _text(day: datetime.datetime | None) -> str:
    return day.date().isoformat() if day is not None else ""


def _as_json(row: UsageRow, names: Mapping[str, str]) -> dict[str, object]:
    of = {"key": row.key, "name": names.get(row.key or ""), "model": row.model, "day": row.day}
    return {**{what: value for what, value in of.items() if value is not None}, **asdict(row.usage)}


def _heads(by: tuple[Dimension, ...]) -> list[str]:
    return [head for dimension in by for head in (("key", "name") if dimension == "key" else (dimension,))]


def _cells(row: UsageRow, by: tuple[Dimension, ...], names: Mapping[str, str]) -> list[str]:
    of = {"key": row.key or "", "name": names.get(row.key or "", ""), "model": row.model or "", "day": row.day or ""}
    return [of[head] for head in _heads(by)]


def _write_csv(rows: list[UsageRow], by: tuple[Dimension, ...], names: Mapping[str, str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*_heads(by), *COLUMNS])
    writer.writerows([*_cells(row, by, names), *astuple(row.usage)] for row in rows)


def _print(rows: list[UsageRow], by: tuple[Dimension, ...], names: Mapping[str, str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in _heads(by):
        table.add_column(head.upper(), no_wrap=True)
    for name in COLUMNS:
        table.add_column(name.removesuffix("_tokens").upper(), justify="right")
    for row in rows:
        counts = [f"{n:,}" for n in astuple(row.usage)]
        table.add_row(*(plain(cell) or "(none)" for cell in _cells(row, by, names)), *counts)
    Console(width=None if Console().is_terminal else 200).print(table)
