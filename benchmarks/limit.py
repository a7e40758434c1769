"""One client through HTTP, beside llama.cpp without a server (`llama-bench`). `python -m benchmarks.limit`."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import httpx

from .comparison import geometric_mean, median
from .machine import describe
from .measure import running
from .peers import HOST, PEER_NAME, BenchError, Server
from .serve import contenders
from .workloads import sentence

OUT_TOKENS = 128
CONTEXT_TOKENS = 8192
LIMIT = "llama-bench"


def rate(server: Server, prompt: str) -> float:
    """Tokens a second of one answer, from the request to its end, after a prompt of a few tokens."""
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": OUT_TOKENS, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    started = time.perf_counter()
    answer = httpx.post(f"http://{HOST}:{server.port}/v1/completions", json=body, timeout=300, trust_env=False)
    answer.raise_for_status()
    seconds = time.perf_counter() - started
    if (told := answer.json()["usage"]["completion_tokens"]) != OUT_TOKENS:
        raise BenchError(f"{server.name} gave {told} tokens instead of {OUT_TOKENS}.")
    return OUT_TOKENS / seconds


def bench_rate(binary: Path, weights: Path, threads: int) -> float:
    """Tokens a second of llama-bench's ``tg128``."""
    command = [
        str(binary), "-m", str(weights), "-t", str(threads), "-p", "0", "-n", str(OUT_TOKENS), "-r", "3",
        "-fa", "1", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    (row,) = json.loads(done.stdout)
    return float(row["avg_ts"])


def measure(sources: dict[str, Callable[[str], float]], rounds: int) -> dict[str, list[float]]:
    """Each source of rates in turn, forwards and backwards, on the same prompts."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds):
        for names in ([*sources], [*sources][::-1]):
            prompt = sentence(rng)
            for name in names:
                rates[name].append(sources[name](prompt))
    return rates


@click.command()
@click.option("--rounds", type=click.IntRange(1, 50), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True)
@click.option("--gguf", type=click.Path(exists=True, path_type=Path), help="By default that of smollm2:135m-instruct.")
@click.option("--ours-flags", default="", help="More flags for `edge serve`.")
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="A llama-server; by default one is built.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/out/limit"), show_default=True)
def main(rounds: int, threads: int, gguf: Path | None, ours_flags: str, peer: Path | None, out: Path) -> None:
    """One client, 128 tokens out, beside `llama-bench -p 0 -n 128` and llama-server."""
    with tempfile.TemporaryDirectory(prefix="slm-edge-limit-") as home:
        ours, other = contenders(Path(home), out, gguf, peer, ours_flags, "")
        with (
            running(ours, context_tokens=CONTEXT_TOKENS, threads=threads) as a,
            running(other, context_tokens=CONTEXT_TOKENS, threads=threads) as b,
        ):
            bench = other.binary.with_name(LIMIT)
            rates = measure(
                {
                    a.name: lambda prompt: rate(a, prompt),
                    LIMIT: lambda _: bench_rate(bench, other.weights, threads),
                    b.name: lambda prompt: rate(b, prompt),
                },
                rounds,
            )
    limit = geometric_mean(rates[LIMIT])
    for name in (ours.name, PEER_NAME):
        click.echo(f"{name:12} {median(rates[name]):6.1f} tok/s, {geometric_mean(rates[name]) / limit:.2f} of {LIMIT}")
    click.echo(f"{LIMIT:12} {median(rates[LIMIT]):6.1f} tok/s")
    (out / "limit.json").write_text(json.dumps({"machine": str(describe()), "rates": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
