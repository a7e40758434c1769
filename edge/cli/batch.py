"""`edge batch`: files of requests, answered when nobody else wants the room."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.models import print_json
from edge.cli.options import json_option, plain
from edge.errors import EdgeError
from runtime.api.batches.schema import Batch, Endpoint
from tui.client import RuntimeClient

POLL_S = 1.0


@click.group()
def batch() -> None:
    """Have a file of requests answered when nobody else wants the room.

    Each line of the file is a JSON object with a custom_id of its own, as OpenAI's batches have it:

    \b
      {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": …}}

    A running appliance does the work (at most 24 hours), goes on with it after a restart, and keeps the answers for 30
    days.

    \b
    Examples:
      edge batch submit questions.jsonl --wait
      edge batch submit texts.jsonl --endpoint /v1/embeddings
      edge batch list
      edge batch results batch_… > answers.jsonl
    """


@batch.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--endpoint", type=click.Choice(get_args(Endpoint)), default="/v1/chat/completions", show_default=True,
    help="What every line asks.",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="Return when the batch is over; it goes on without this command too.")
@json_option
@connection_options
def submit(
    file: BinaryIO, endpoint: str, wait: bool, as_json: bool, url: str | None, socket: Path | None
) -> None:  # fmt: skip
    """Send FILE and begin a batch of it. Its id is printed, with which the other commands find it."""

    async def work(client: RuntimeClient) -> Batch:
        sent = await client.send_file(file)
        made = await client.create_batch(sent.id, endpoint)
        if not wait:
            return made
        click.echo(made.id, err=True)
        return await _followed(client, made)

    _show(with_client(address_of(url, socket), work), as_json=as_json)


@batch.command("list")
@json_option
@connection_options
def list_batches(as_json: bool, url: str | None, socket: Path | None) -> None:
    """List the last hundred batches, the newest first."""
    found = with_client(address_of(url, socket), lambda client: client.batches())
    if as_json:
        print_json({"batches": found})
    elif found:
        _print(found)
    else:
        click.echo("there are no batches", err=True)


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@click.option("--wait", is_flag=True, help="Return when the batch is over.")
@json_option
@connection_options
def show(batch_id: str, wait: bool, as_json: bool, url: str | None, socket: Path | None) -> None:
    """Show how far BATCH is, and what is wrong with its file if it failed."""

    async def work(client: RuntimeClient) -> Batch:
        found = await client.batch(batch_id)
        return await _followed(client, found) if wait else found

    _show(with_client(address_of(url, socket), work), as_json=as_json)


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@json_option
@connection_options
def cancel(batch_id: str, as_json: bool, url: str | None, socket: Path | None) -> None:
    """End BATCH with the answers that it has."""
    _show(with_client(address_of(url, socket), lambda client: client.cancel_batch(batch_id)), as_json=as_json)


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@click.option("--errors", is_flag=True, help="The lines that were not answered, instead of those that were.")
@click.option("-o", "--output", type=click.File("wb", lazy=True), default="-", help="Where to; by default stdout.")
@connection_options
def results(batch_id: str, errors: bool, output: BinaryIO, url: str | None, socket: Path | None) -> None:
    """Print the answers of BATCH, one JSON object a line; their order is that of the file, its custom_id in each.

    Lines that failed are printed with --errors. There is something when the batch is over.
    """

    async def work(client: RuntimeClient) -> None:
        found = await client.batch(batch_id)
        file_id = found.error_file_id if errors else found.output_file_id
        if file_id is None:
            what = "no line failed" if errors and found.is_over else f"the batch is {found.status}, without answers"
            click.echo(what, err=True)
            return
        async for chunk in client.file_content(file_id):
            output.write(chunk)

    with_client(address_of(url, socket), work)


async def _followed(client: RuntimeClient, found: Batch) -> Batch:
    with _progress() as report:
        while not found.is_over:
            report(found)
            await asyncio.sleep(POLL_S)
            found = await client.batch(found.id)
        report(found)
    return found


@contextmanager
def _progress() -> Generator[Callable[[Batch], None]]:
    """A bar on a terminal, else a line at each change of status."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("waiting", total=None)

        def report(found: Batch) -> None:
            counts = found.request_counts
            bar.update(
                task, description=found.status, completed=counts.completed + counts.failed, total=counts.total or None
            )

        yield report


class _Lines:
    def __init__(self) -> None:
        self._last = ""

    def __call__(self, found: Batch) -> None:
        if found.status != self._last:
            self._last = found.status
            click.echo(_sentence(found), err=True)


def _show(found: Batch, *, as_json: bool) -> None:
    print_json(found) if as_json else click.echo(_sentence(found))
    for error in (found.errors.data if found.errors else []) if not as_json else ():
        line = f"line {error.line}: " if error.line is not None else ""
        click.echo(f"  {line}{plain(error.message)} ({error.code})", err=True)
    if found.status == "failed":
        raise EdgeError(f"The batch {found.id} failed.", hint="Mend its file, and submit it again.")


def _sentence(found: Batch) -> str:
    counts = found.request_counts
    failed = f", {counts.failed:,} failed" if counts.failed else ""
    return f"{found.id} {found.status}: {counts.completed:,} of {counts.total:,} lines answered{failed}"


def _print(found: list[Batch]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("BATCH", "STATUS", "ENDPOINT", "LINES", "ANSWERED", "FAILED", "TOKENS", "MADE"):
        table.add_column(title, justify="right" if title in ("LINES", "ANSWERED", "FAILED", "TOKENS") else "left")
    for b in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(b.created_at))
        counts = (b.request_counts.total, b.request_counts.completed, b.request_counts.failed, b.usage.total_tokens)
        table.add_row(b.id, b.status, b.endpoint, *(f"{n:,}" for n in counts), made)
    Console(width=None if Console().is_terminal else 200).print(table)
