"""Several runs in one report: `python -m benchmarks.merge RUN/serve.json ... --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console

from .peers import OUR_NAME, PEER_NAME
from .report import Report, make_rows, render_tables, write

_ROUNDS_APART = 1000
_RUN = click.Path(exists=True, dir_okay=False, path_type=Path)


def merged(reports: Sequence[Report]) -> Report:
    """The first report with the samples of all; where two ran the same workload, their rounds add up.

    Raises:
        ValueError: The runs are of different models.
    """
    if len({r.model for r in reports}) != 1:
        raise ValueError("the runs are of different models")
    samples = [
        msgspec.structs.replace(s, round=s.round + _ROUNDS_APART * i)
        for i, report in enumerate(reports)
        for s in report.samples
    ]
    memory = [f for r in reports for f in r.memory]
    answers = [a for r in reports for a in r.answers]
    rows = make_rows(samples, answers, ours=OUR_NAME, peer=PEER_NAME)
    return msgspec.structs.replace(reports[0], samples=samples, answers=answers, memory=memory, rows=rows)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def merge(runs: tuple[Path, ...], out: Path) -> None:
    """Write one report of RUNS, files `serve.json` of the same model."""
    report = merged([msgspec.json.decode(run.read_bytes(), type=Report) for run in runs])
    for table in render_tables(report):
        Console().print(table)
    write(report, out, names=(OUR_NAME, PEER_NAME), plots=True)


if __name__ == "__main__":
    merge()
