"""What clients without manners cost a normal one: its latency beside them and without, in turn.

`python -m benchmarks.manners`. One client never reads its answer, 200 never finish the head of their request, 50 have
closed their half; where the appliance ends one, it comes again before the next request.
"""

from __future__ import annotations

import json
import random
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx

from .comparison import median, percentile
from .machine import describe
from .measure import running
from .peers import HOST, Ours, Server
from .workloads import sentence

MODEL = "smollm2:135m-instruct"
CONTEXT_TOKENS = 8192
OUT_TOKENS = 32
BLOCK = 40
"""Requests of a block: some ten seconds, for a client that never reads is a normal one until buffers are full."""
MOST = 1.5
"""What is allowed: half as much again."""
_HALF_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: loc"


@dataclass(slots=True)
class Crowd:
    """Clients without manners."""

    server: Server
    num_slow: int
    num_half_closed: int
    num_deaf: int
    _open: dict[str, list[socket.socket]] = field(default_factory=dict[str, list[socket.socket]])
    num_ended: int = 0
    """How often the appliance ended one of them."""

    def gather(self) -> None:
        """Have all of them there."""
        kinds = {"slow": self.num_slow, "half closed": self.num_half_closed, "deaf": self.num_deaf}
        for kind, wanted in kinds.items():
            there = [s for s in self._open.get(kind, []) if not self._is_over(s, reads=kind != "deaf")]
            self._open[kind] = there + [self._connect(kind) for _ in range(wanted - len(there))]

    def _is_over(self, sock: socket.socket, *, reads: bool) -> bool:
        """Whether the appliance closed it. Of the deaf this is seen by sending, since they never read."""
        try:
            if reads:
                is_over = not sock.recv(1, socket.MSG_PEEK)
            else:
                sock.send(b"\r\n")
                is_over = False
        except BlockingIOError:
            is_over = False
        except OSError:
            is_over = True
        if is_over:
            self.num_ended += 1
            sock.close()
        return is_over

    def _connect(self, kind: str) -> socket.socket:
        sock = socket.socket()
        if kind == "deaf":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((HOST, self.server.port))
        sock.sendall(self._deaf_request() if kind == "deaf" else _HALF_HEAD)
        if kind == "half closed":
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        sock.setblocking(False)
        return sock

    def _deaf_request(self) -> bytes:
        body = json.dumps(_body(self.server, "Write.", max_tokens=CONTEXT_TOKENS // 2, stream=True)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def scatter(self) -> None:
        """Close them all."""
        for sock in (s for socks in self._open.values() for s in socks):
            sock.close()
        self._open.clear()


def _body(server: Server, prompt: str, *, max_tokens: int, stream: bool = False) -> dict[str, object]:
    return {
        "model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": stream,
    }  # fmt: skip


def latency_s(http: httpx.Client, server: Server, prompt: str) -> float:
    """Of one normal request."""
    started = time.perf_counter()
    http.post("/v1/completions", json=_body(server, prompt, max_tokens=OUT_TOKENS)).raise_for_status()
    return time.perf_counter() - started


def measure(server: Server, crowd: Crowd, rounds: int) -> tuple[list[float], list[float]]:
    """Latencies beside the crowd, and without: blocks in the order A B B A."""
    rng = random.Random(0)
    beside, alone = list[float](), list[float]()
    with httpx.Client(base_url=f"http://{HOST}:{server.port}", timeout=300, trust_env=False) as http:
        latency_s(http, server, sentence(rng))
        for _ in range(rounds):
            for times in (beside, alone, alone, beside):
                for _ in range(BLOCK):
                    if times is beside:
                        crowd.gather()
                    times.append(latency_s(http, server, sentence(rng)))
                crowd.scatter()
    return beside, alone


@click.command()
@click.option("--rounds", type=click.IntRange(1, 50), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True)
@click.option("--slow", type=click.IntRange(0, 900), default=200, show_default=True, help="That never finish a head.")
@click.option("--half-closed", type=click.IntRange(0, 900), default=50, show_default=True)
@click.option("--deaf", type=click.IntRange(0, 16), default=1, show_default=True, help="That never read.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/out/manners"), show_default=True)
def main(rounds: int, threads: int, slow: int, half_closed: int, deaf: int, out: Path) -> None:
    """Median latency of one client, beside clients without manners and without them."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slm-edge-manners-") as home:
        ours = Ours(Path(home), MODEL, out / "slm-edge.log")
        with running(ours, context_tokens=CONTEXT_TOKENS, threads=threads) as server:
            crowd = Crowd(server, slow, half_closed, deaf)
            try:
                beside, alone = measure(server, crowd, rounds)
            finally:
                crowd.scatter()
    ratio = median(beside) / median(alone)
    for name, times in (("beside them", beside), ("alone", alone)):
        click.echo(
            f"{name:12} median {median(times):.3f} s, 95 % {percentile(times, 0.95):.3f} s, {len(times)} requests"
        )
    click.echo(f"ratio of medians {ratio:.2f} (allowed {MOST}); the appliance ended {crowd.num_ended} of them")
    told = {"machine": str(describe()), "beside_s": beside, "alone_s": alone, "ratio": ratio}
    (out / "manners.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
