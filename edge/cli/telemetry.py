"""`edge telemetry`: the outbox, looked at and emptied."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec

from edge.cli.connection import with_client
from edge.cli.main import settings_from
from edge.cli.options import human_size, json_option, plain
from edge.config import Settings
from edge.errors import GatewayUnavailable, ServerUnavailable
from edge.telemetry.outbox import Row, read_rows
from edge.telemetry.service import flush_without_server, read_state
from runtime.api.schema import OutboxStatus
from tui.client import Address

FOLLOW_INTERVAL_S = 0.5
FOLLOW_ROWS = 1000


@click.group()
def telemetry() -> None:
    """Show, flush or follow the telemetry outbox.

    Without a gateway (EDGE_GATEWAY_URL) nothing is kept and nothing leaves the device. What was asked or answered is
    never recorded.

    \b
    Examples:
      edge telemetry status
      edge telemetry tail -n 5
      edge telemetry flush
    """


@telemetry.command()
@json_option
def status(as_json: bool) -> None:
    """How much waits, where it goes, and what went wrong last.

    Asks the appliance of this EDGE_HOME; if none runs, looks at the file.
    """
    settings = settings_from()
    try:
        state = with_client(_socket(settings), lambda client: client.telemetry())
    except ServerUnavailable:
        state = _from_file(settings)
    _show(state, as_json=as_json)


@telemetry.command()
@json_option
def flush(as_json: bool) -> None:
    """Send now what waits, and say what is left.

    The appliance of this EDGE_HOME does it; if none runs, this command does. Exit code 4 if something could not be
    sent.
    """
    settings = settings_from()
    state = _flushed_by_server(settings) or OutboxStatus(**dataclasses.asdict(flush_without_server(settings)))
    _show(state, as_json=as_json)
    if state.rows and state.last_error:
        raise GatewayUnavailable(
            f"{state.rows} batches still wait: {state.last_error}.",
            hint="Nothing is lost: they are sent when the gateway answers. Is EDGE_GATEWAY_URL right?",
        )


@telemetry.command()
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(1, FOLLOW_ROWS), help="Batches.")
@click.option("--follow", is_flag=True, help="Go on with what comes until Ctrl-C.")
@json_option
def tail(lines: int, follow: bool, as_json: bool) -> None:
    """Show the newest batches that wait, decoded: what would be sent, and nothing else would.

    With --json each batch is one line, its body in OTLP's own JSON.
    """
    settings = settings_from()
    if not settings.telemetry_db.exists():
        click.echo("nothing was ever kept here; set EDGE_GATEWAY_URL to begin", err=True)
    elif not follow and not read_rows(settings.telemetry_db, after_id=0, max_rows=1):
        click.echo("nothing waits: what was kept is sent (see: edge telemetry status)", err=True)
    for row in _rows(settings, lines, follow=follow):
        click.echo(json.dumps(_as_json(row)) if as_json else "\n".join(_as_text(row)))


def _socket(settings: Settings) -> Address:
    # The socket only: at the TCP address the appliance of another EDGE_HOME might answer.
    return Address(settings.url, settings.socket_path, socket_only=True)


def _flushed_by_server(settings: Settings) -> OutboxStatus | None:
    try:
        return with_client(_socket(settings), lambda client: client.flush())
    except ServerUnavailable:
        return None


def _from_file(settings: Settings) -> OutboxStatus:
    return OutboxStatus(**dataclasses.asdict(read_state(settings)))


def _show(state: OutboxStatus, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
        return
    for name, value in _lines(state):
        click.echo(f"{name:<12} {plain(value)}")


def _lines(state: OutboxStatus) -> Iterator[tuple[str, str]]:
    yield "gateway", state.gateway_url if state.enabled else "none: nothing is kept, nothing is sent"
    oldest = f", the oldest {state.oldest_age_s:,.0f} s old" if state.oldest_age_s is not None else ""
    yield "waiting", f"{state.rows} batches{oldest}"
    yield "size", f"{human_size(state.size_bytes)} of {human_size(state.limit_bytes)}"
    yield "sent", f"{state.sent_batches} batches"
    yield "dropped", f"{state.dropped_rows} batches"
    yield "set aside", f"{state.quarantined_rows} batches that the gateway called invalid"
    if state.last_success_age_s is not None:
        yield "last sent", f"{state.last_success_age_s:,.0f} s ago"
    if state.last_error:
        yield "last error", state.last_error
    if state.next_attempt_s is not None:
        yield "next attempt", f"in {state.next_attempt_s:,.0f} s"


def _rows(settings: Settings, lines: int, *, follow: bool) -> Iterator[Row]:
    last_id, wanted = 0, lines
    while True:
        if settings.telemetry_db.exists():
            for row in read_rows(settings.telemetry_db, after_id=last_id, max_rows=wanted):
                last_id = row.id
                yield row
        if not follow:
            return
        wanted = FOLLOW_ROWS
        time.sleep(FOLLOW_INTERVAL_S)


def _as_json(row: Row) -> dict[str, Any]:
    from edge.telemetry import otlp

    return {
        "key": row.key,
        "class": row.priority.name.lower(),
        "path": f"/v1/{row.signal}",
        "records": row.records,
        "size_bytes": len(row.body),
        "age_s": round(row.age_s, 3),
        "quarantined": row.is_quarantined,
        "body": otlp.decode(row.signal, row.body),
    }


def _as_text(row: Row) -> Iterator[str]:
    from edge.telemetry import otlp

    aside = ", set aside" if row.is_quarantined else ""
    yield (
        f"{click.style(row.key, bold=True)}  {row.priority.name.lower()} for /v1/{row.signal}: {row.records} records, "
        f"{human_size(len(row.body))}, {row.age_s:,.0f} s old{aside}"
    )
    for resource in _children(otlp.decode(row.signal, row.body), "resource"):
        yield f"  from {_attributes(resource['resource'])}"
        for record in _children(resource, "scope"):
            yield from _records(record)


def _children(message: Mapping[str, Any], prefix: str) -> list[Mapping[str, Any]]:
    return [item for name, items in message.items() if name.startswith(prefix) and name != "resource" for item in items]


def _records(scope: Mapping[str, Any]) -> Iterator[str]:
    for span in scope.get("spans", ()):
        took_s = (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e9
        yield f"  span {plain(span['name'])}, {took_s:.3f} s: {_attributes(span)}"
    for metric in scope.get("metrics", ()):
        yield from _points(metric)
    for record in scope.get("logRecords", ()):
        yield f"  event {record['eventName']}: {_attributes(record)}"


def _points(metric: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("gauge", "sum", "histogram"):
        for point in metric.get(kind, {}).get("dataPoints", ()):
            value = point.get("asInt", point.get("asDouble"))
            shown = f"{point.get('count')} observations, sum {point.get('sum')}" if value is None else value
            yield f"  {metric['name']}{{{_attributes(point)}}} {shown} {metric.get('unit', '')}"


def _attributes(message: Mapping[str, Any]) -> str:
    return " ".join(f"{a['key']}={_value(a['value'])}" for a in message.get("attributes", ()))


def _value(value: Mapping[str, Any]) -> str:
    if "arrayValue" in value:
        items: Sequence[Mapping[str, Any]] = value["arrayValue"].get("values", ())
        return ",".join(_value(item) for item in items)
    return plain(str(next(iter(value.values()), "")))
