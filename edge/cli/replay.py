"""`edge replay`: requests that ended the engine twice and are refused since."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import msgspec

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import open_store, plain
from edge.config import Settings
from edge.errors import DeadlineExceeded, EdgeError, WorkerDied
from edge.store.models import StoredModel
from runtime.host import ModelHost
from runtime.poison import Case, PoisonCabinet
from runtime.tuning import load_tuning, save_tuning

LOAD_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended in an engine of its own."""

    id: str
    outcome: Literal["answered", "engine died", "refused", "too slow"]
    detail: str
    num_output: int
    seconds: float


@click.command("replay")
@click.argument("request_id", metavar="[ID]", required=False)
@click.option("--show", is_flag=True, help="Print what was asked, and do not run it.")
@click.option("--remove", is_flag=True, help="Forget the request: the appliance takes it again.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 86400), default=300.0, show_default=True,
              help="Seconds after which a run counts as too slow.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def replay(
    ctx: click.Context, request_id: str | None, show: bool, remove: bool, timeout_s: float, as_json: bool
) -> None:
    """Look into requests that ended the engine.

    A request that ended the engine twice, the second time alone, is refused from then on (422) and kept, with what the
    client wrote, under EDGE_HOME/poison. Without an ID the kept requests are listed; with one it is run again in an
    engine of its own, beside a running appliance, and how that ended is reported (exit code 1 unless it answered).

    \b
    Examples:
      edge replay                            what is kept
      edge replay 0f4c2a9d6b1e8375           run one again
      edge replay 0f4c2a9d6b1e8375 --show    what was asked
      edge replay 0f4c2a9d6b1e8375 --remove  let it try again
    """
    settings = settings_from()
    cabinet = PoisonCabinet(settings.poison_dir)
    if request_id is None:
        if show or remove:
            raise click.UsageError("Name the request: edge replay ID.")
        _list(cabinet.cases(), as_json=as_json)
    elif remove:
        cabinet.remove(request_id)
        print_json({"id": request_id, "removed": True}) if as_json else click.echo(f"{request_id} is forgotten")
    elif show:
        _show(cabinet.get(request_id), as_json=as_json)
    else:
        outcome = _run(settings, cabinet.get(request_id), timeout_s=timeout_s)
        print_json(dataclasses.asdict(outcome)) if as_json else _print_outcome(outcome)
        ctx.exit(0 if outcome.outcome == "answered" else 1)


def _facts(case: Case) -> dict[str, object]:
    return {"id": case.id, "model": case.model, "digest": case.digest, "time": case.time, "reasons": case.reasons,
            "size_bytes": len(case.message)}  # fmt: skip


def _list(cases: list[Case], *, as_json: bool) -> None:
    if as_json:
        print_json([_facts(case) for case in cases])
    elif not cases:
        click.echo("no request is refused", err=True)
    for case in () if as_json else cases:
        when = datetime.datetime.fromtimestamp(case.time, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        click.echo(f"{case.id}  {case.model}  {when}  {len(case.message):,} bytes  {'; '.join(case.reasons)}")


def _show(case: Case, *, as_json: bool) -> None:
    request: object = msgspec.to_builtins(case.request(0))
    if as_json:
        print_json({**_facts(case), "request": request})
        return
    for name, value in _facts(case).items():
        click.echo(f"{name:10}  {value}")
    click.echo(plain(msgspec.json.format(msgspec.json.encode(request), indent=2).decode(), keep="\n"))


def _run(settings: Settings, case: Case, *, timeout_s: float) -> Outcome:
    model = open_store(None).get(case.model)
    if str(model.digest) != case.digest:
        click.echo(f"{case.model} was replaced since: it runs on the present one", err=True)
    click.echo(f"running {case.id} in an engine of its own …", err=True)
    with tempfile.TemporaryDirectory(prefix="edge-replay-") as home:
        alone = dataclasses.replace(settings, home=Path(home), state_disk_bytes=0)
        if (tuning := load_tuning(settings.tuning_dir, str(model.digest))) is not None:
            save_tuning(alone.tuning_dir, str(model.digest), tuning)  # else it is not what ended the engine
        return asyncio.run(_outcome(alone, model, case, timeout_s=timeout_s))


async def _outcome(settings: Settings, model: StoredModel, case: Case, *, timeout_s: float) -> Outcome:
    host = ModelHost(settings, model, PoisonCabinet(settings.poison_dir))
    num_output, began = 0, time.monotonic()
    outcome, detail = "answered", ""
    try:
        await host.wait_ready(LOAD_S)
        began = time.monotonic()
        generation = await host.start(case.request, timeout_s=timeout_s, allowed_s=timeout_s)
        async for pieces in generation.steps():
            num_output = max([num_output, *(p.num_output for p in pieces)])
    except WorkerDied as e:
        outcome, detail = "engine died", e.reason
    except DeadlineExceeded as e:
        outcome, detail = "too slow", e.message
    except EdgeError as e:
        outcome, detail = "refused", e.message
    finally:
        await host.unload()
    return Outcome(case.id, outcome, detail, num_output, time.monotonic() - began)


def _print_outcome(outcome: Outcome) -> None:
    after = f"after {outcome.num_output} tokens and {outcome.seconds:.1f} s"
    click.echo(f"{outcome.outcome} {after}{f': {outcome.detail}' if outcome.detail else ''}")
