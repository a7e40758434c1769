"""`edge audit`: what operators did, and whether the log of it is whole."""

from __future__ import annotations

import datetime

import click

from edge.access.audit import Line, parse_head, read_lines
from edge.access.audit import verify as verify_log
from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import json_option, plain


@click.group()
def audit() -> None:
    """Read and verify the log of what operators did.

    Every change of keys, and every request that changes something (load, unload, pull, delete, pin), is a line with who
    did it and what came of it. Each line carries the SHA-256 of all before it.

    \b
    Examples:
      edge audit show -n 50
      edge audit verify
      edge audit verify --head 57:3f0c…
    """


@audit.command()
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(1, 100_000), help="The last ones.")
@json_option
def show(lines: int, as_json: bool) -> None:
    """Show the last lines, oldest first."""
    found = read_lines(settings_from().state_db, count=lines)
    if as_json:
        print_json({"lines": [_as_json(line) for line in found]})
        return
    for line in found:
        act = line.act
        when = datetime.datetime.fromtimestamp(line.time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        click.echo(
            f"{line.seq:>6}  {when}  {plain(act.actor)}  {plain(act.act)}  {plain(act.target)}  {plain(act.outcome)}"
        )
    if not found:
        click.echo("nothing was done yet", err=True)


@audit.command()
@click.option("--head", metavar="SEQ:DIGEST", help="A head that was noted before: the log must still lead through it.")
@json_option
def verify(head: str | None, as_json: bool) -> None:
    """Compute the chain of the whole log again. Ends with code 1 where a line was edited, removed or cut off.

    Prints the head. Who can write state.db can also write it anew from its beginning: note the head elsewhere and hold
    the log against it with --head. Metrics carry it too: edge_audit_lines, and edge_audit_head, the first 48 bits of
    its digest.
    """
    seen = parse_head(head) if head is not None else None
    if head is not None and seen is None:
        raise click.UsageError("--head is a number, a colon and 64 hexadecimal digits, as `edge audit verify` prints.")
    found = verify_log(settings_from().state_db, seen=seen)
    if as_json:
        print_json({"lines": found.seq, "head": str(found), "metric": int.from_bytes(found.digest[:6], "big")})
    else:
        click.echo(f"{found.seq} lines are as they were written", err=True)
        click.echo(str(found))


def _as_json(line: Line) -> dict[str, object]:
    act = line.act
    return {
        "seq": line.seq, "time": line.time_s, "actor": act.actor, "act": act.act, "target": act.target,
        "outcome": act.outcome, "digest": line.digest.hex(),
    }  # fmt: skip
