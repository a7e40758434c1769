"""Ours beside llama.cpp's own server: the same weights, threads, prompts and lengths. `python -m benchmarks.serve`."""

from __future__ import annotations

import compileall
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from . import machine
from .measure import Bench, Conditions
from .peers import BenchError, LlamaServer, Ours, find_peer
from .report import Report, batching_gain, make_rows, render_tables, require_plotting, write
from .workloads import WORKLOADS, Workload

DEFAULT_MODEL = "smollm2:135m-instruct"
BENCH_MODEL = "bench:gguf"
DEFAULT_OUT = Path("benchmarks/out")
_GGUF = click.Path(exists=True, dir_okay=False, path_type=Path)


def _commit() -> str:
    root = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip() or "unknown"


def contenders(home: Path, out: Path, gguf: Path | None, peer: Path | None, ours_flags: str, peer_flags: str) -> tuple[
    Ours, LlamaServer
]:  # fmt: skip
    """Both servers on the same file."""
    out.mkdir(parents=True, exist_ok=True)
    for log in ("slm-edge.log", "llama-server.log"):
        (out / log).unlink(missing_ok=True)
    ours = Ours(home, BENCH_MODEL if gguf else DEFAULT_MODEL, out / "slm-edge.log", tuple(shlex.split(ours_flags)))
    if gguf:
        ours.run("pull", str(gguf.absolute()), "--name", BENCH_MODEL)
    binary = find_peer(peer)
    return ours, LlamaServer(binary, ours.weights(), out / "llama-server.log", tuple(shlex.split(peer_flags)))


def _chosen(only: tuple[str, ...], *, quick: bool) -> list[Workload]:
    return [WORKLOADS["short"]] if quick else [WORKLOADS[n] for n in (only or WORKLOADS)]


def _report(bench: Bench, ours: Ours, peer: LlamaServer, threads: int, started: str) -> Report:
    return Report(
        machine=machine.describe(),
        commands={
            c.name: shlex.join([Path(c.command(0, context_tokens=1, threads=1)[0]).name, *_flags(c, threads)])
            for c in (ours, peer)
        },
        versions={"slm-edge": _commit(), "llama-server": peer.version()},
        model=ours.model,
        started=started,
        rows=make_rows(bench.samples, bench.answers, ours=ours.name, peer=peer.name),
        memory=bench.footprints,
        samples=bench.samples,
        answers=bench.answers,
    )


def _flags(contender: Ours | LlamaServer, threads: int) -> list[str]:
    """The command line without what is this machine's."""
    command = contender.command(0, context_tokens=0, threads=threads)[1:]
    hidden = {"--port", "-m", "--host", "-c", "--context-tokens"}
    return [w for i, w in enumerate(command) if w not in hidden and command[i - 1] not in hidden]


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(143)  # by way of the blocks that stop the servers


@click.command()
@click.argument("workloads", nargs=-1, type=click.Choice(list(WORKLOADS)))
@click.option("--quick", is_flag=True, help="Only `short`, 1 and 8 clients, 2 rounds.")
@click.option("--clients", type=click.IntRange(1, 32), multiple=True, help="Instead of each workload's own numbers.")
@click.option("--rounds", type=click.IntRange(1, 50), help="A B B A rounds; each workload has its own number.")
@click.option("--gguf", type=_GGUF, help=f"The model; by default that of {DEFAULT_MODEL}.")
@click.option("--peer", type=_GGUF, help="A llama-server; by default one is built once.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Of both servers.")
@click.option("--ours-flags", default="", help="More flags for `edge serve`.")
@click.option("--peer-flags", default="", help="More flags for llama-server.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--wait", "wait_s", type=float, default=120.0, show_default=True,
              help="Seconds a round waits for a quiet machine before it goes on, marked as disturbed.")  # fmt: skip
@click.option("--extra-rounds", type=click.IntRange(0, 50), default=5, show_default=True,
              help="Rounds to make up for disturbed ones, which are given up.")  # fmt: skip
@click.option("--minutes", type=float, default=60.0, show_default=True, help="No round begins later than this.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_OUT, show_default=True)
@click.option("--plots/--no-plots", default=True, help="Draw SVG plots.")
def serve(workloads: tuple[str, ...], *, quick: bool, clients: tuple[int, ...], rounds: int | None,
          gguf: Path | None, peer: Path | None, threads: int, ours_flags: str, peer_flags: str, seed: int,
          wait_s: float, extra_rounds: int, minutes: float, out: Path, plots: bool) -> None:  # fmt: skip
    """Measure WORKLOADS (all, unless named) side by side, in rounds A B B A, and say what may be claimed.

    \b
    Examples:
      python -m benchmarks.serve --quick
      python -m benchmarks.serve short prefix --rounds 8
      python -m benchmarks.serve --gguf tinyllama.gguf --peer ~/llama.cpp/llama-server
      python -m benchmarks.serve short --peer-flags '--spec-type ngram-simple'
    """
    console, progress = Console(), Console(stderr=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    until = time.monotonic() + minutes * 60
    conditions = Conditions(
        threads, seed, wait_s, extra_rounds, until, lambda line: progress.print(line, markup=False, soft_wrap=True)
    )
    signal.signal(signal.SIGTERM, _leave)
    report: Report | None = None
    written: list[Path] = []
    for package in ("edge", "runtime"):  # as an installed appliance has them
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=1)
    try:
        if plots:
            require_plotting()
        with tempfile.TemporaryDirectory(prefix="slm-edge-bench-") as home:
            ours, peer_server = contenders(Path(home), out, gguf, peer, ours_flags, peer_flags)
            bench = Bench(ours, peer_server, conditions)
            for workload in _chosen(workloads, quick=quick):
                numbers = clients or ((1, 8) if quick else workload.clients)
                bench.run(workload, clients=numbers, rounds=rounds or (2 if quick else workload.rounds))
                report = _report(bench, ours, peer_server, threads, started)
                written = write(report, out, names=(ours.name, peer_server.name), plots=plots)
    except BenchError as e:
        progress.print(f"error: {e}", markup=False)
        sys.exit(1)
    if report is None:
        return
    for table in render_tables(report):
        console.print(table)
    console.print(f"8 clients together against 1 alone, ours: {batching_gain(report.rows):.2f} times the tokens")
    for path in written:
        progress.print(f"wrote {path}", markup=False)


if __name__ == "__main__":
    serve()
