"""Embeddings beside llama.cpp's own server: the same GGUF, threads and texts. `python -m benchmarks.embed`."""

from __future__ import annotations

import json
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from .comparison import geometric_mean, median, same_server_spread
from .machine import describe
from .measure import running
from .peers import HOST, LlamaServer, Ours, Server, find_peer
from .workloads import passage

MODEL = "minilm:l6-v2"
BATCH = 64
CONTEXT_TOKENS = 8192
"""512 for each of the peer's slots."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of clients. Rates are texts per second, in the order of the measures: ours, peer, peer, ours, …"""

    clients: int
    ours: list[float]
    peer: list[float]
    cosine: float
    """The least, between the two servers' vectors of one text."""

    @property
    def ratio(self) -> float:
        """Ours to the peer's: the geometric mean over the rounds."""
        return geometric_mean(self.ours) / geometric_mean(self.peer)

    @property
    def spread(self) -> float:
        """What two measures of the same server in one round differ by."""
        pairs = [(rates[i], rates[i + 1]) for rates in (self.ours, self.peer) for i in range(0, len(rates) - 1, 2)]
        return same_server_spread(pairs, rounds=len(self.ours) // 2)


def batches(rng: random.Random, count: int) -> list[list[str]]:
    """Batches of short texts of 8 to 40 tokens, all different."""
    return [[passage(rng, rng.choice((8, 12, 16, 24, 40))) for _ in range(BATCH)] for _ in range(count)]


def embed(server: Server, texts: list[str]) -> list[list[float]]:
    """The vectors of one batch."""
    body = {"model": server.model, "input": texts, "encoding_format": "float"}
    answer = httpx.post(f"http://{HOST}:{server.port}/v1/embeddings", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    return [item["embedding"] for item in sorted(answer.json()["data"], key=lambda item: int(item["index"]))]


def rate(server: Server, clients: int, work: list[list[str]]) -> float:
    """Texts per second: clients send their share of the batches one after the other, all at once."""
    shares = [work[i::clients] for i in range(clients)]

    def send(share: list[list[str]]) -> None:
        for texts in share:
            embed(server, texts)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, shares))
    return len(work) * BATCH / (time.perf_counter() - started)


def least_cosine(ours: Server, peer: Server, texts: list[str]) -> float:
    """How far the two servers agree; both give vectors of length 1."""
    pairs = zip(embed(ours, texts), embed(peer, texts), strict=True)
    return min(sum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs)


def measure(ours: Server, peer: Server, clients: int, rounds: int, rng: random.Random) -> Row:
    """Rounds of ours, peer, peer, ours on the same texts, new ones for each measure."""
    rates: dict[str, list[float]] = {ours.name: [], peer.name: []}
    for _ in range(rounds):
        first, second = (batches(rng, max(4, 2 * clients)) for _ in range(2))
        for server, work in ((ours, first), (peer, first), (peer, second), (ours, second)):
            rates[server.name].append(rate(server, clients, work))
    cosine = least_cosine(ours, peer, batches(rng, 1)[0])
    return Row(clients, rates[ours.name], rates[peer.name], cosine)


@click.command()
@click.option("--clients", type=click.IntRange(1, 32), multiple=True, default=(1, 8), show_default=True)
@click.option("--rounds", type=click.IntRange(1, 50), default=3, show_default=True, help="A B B A rounds.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Of both servers.")
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="A llama-server; by default one is built.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/out/embed"), show_default=True)
def main(clients: tuple[int, ...], *, rounds: int, threads: int, peer: Path | None, out: Path) -> None:
    """Batches of 64 short texts, at several numbers of clients."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slm-edge-embed-") as home:
        ours = Ours(Path(home), MODEL, out / "slm-edge.log")
        ours.run("pull", MODEL)
        flags = ("--embeddings", "-b", "2048", "-ub", "512")
        other = LlamaServer(find_peer(peer), ours.weights(), out / "llama-server.log", flags)
        with (
            running(ours, context_tokens=CONTEXT_TOKENS, threads=threads) as a,
            running(other, context_tokens=CONTEXT_TOKENS, threads=threads) as b,
        ):
            rng = random.Random(0)
            for server in (a, b):
                embed(server, ["warm up"])
            rows = [measure(a, b, n, rounds, rng) for n in clients]
    for row in rows:
        click.echo(
            f"{row.clients:>2} clients: ours {median(row.ours):7.0f} texts/s, llama-server {median(row.peer):7.0f}, "
            f"ratio {row.ratio:.2f} (same server ±{row.spread:.2f}), least cosine {row.cosine:.5f}"
        )
    table = [{"clients": r.clients, "ours": r.ours, "peer": r.peer, "ratio": r.ratio, "cosine": r.cosine} for r in rows]
    (out / "embed.json").write_text(json.dumps({"machine": str(describe()), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
