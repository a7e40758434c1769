"""`edge pull` killed with SIGKILL at random moments: nothing half done is ever visible, nothing is fetched twice."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from tests.edge.edge_command import Edge, edge_at
from tests.edge.file_server import FileServer, ServedFile, serve
from tests.edge.gguf_files import sized_gguf
from tests.edge.store_support import assert_sound

MODEL = sized_gguf(40_000)
"""10 MB."""
KILLS = 20
CHUNK_BYTES = 1 << 16


class Tap:
    """Lets the server send so many bytes in all, then tells."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self.is_dry = threading.Event()

    def take(self) -> None:
        if not self._allowed.acquire(blocking=False):
            self.is_dry.set()
            self._allowed.acquire(timeout=60)

    def open(self, chunks: int) -> None:
        self.is_dry.clear()
        self._allowed.release(chunks)


def kept_bytes(edge: Edge) -> int:
    return sum(path.stat().st_size for path in edge.store.glob("ingest/*.partial"))


def kill_somewhere(edge: Edge, server: FileServer, tap: Tap, *, sent_chunks: int, kept_chunks: int) -> None:
    """Let some chunks through, and kill the pull when it has written so many of them, or a little more."""
    enough = kept_bytes(edge) + kept_chunks * CHUNK_BYTES
    with edge.start("pull", f"{server.url}/m.gguf", "--name", "kept") as process:
        tap.open(sent_chunks)
        assert tap.is_dry.wait(30)
        deadline = time.monotonic() + 30
        while kept_bytes(edge) < enough:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    tap.open(1000)  # what the dead one asked for goes nowhere
    server.total_sent()


def test_twenty_kills_and_nothing_is_fetched_twice(tmp_path: Path) -> None:
    rng, tap, edge = random.Random(3), Tap(), edge_at(tmp_path)
    file = ServedFile(MODEL, before_chunk=tap.take, chunk_bytes=CHUNK_BYTES)
    with serve({"/m.gguf": file}) as server:
        sizes: list[int] = []
        for _ in range(KILLS):
            sent_chunks = rng.randint(1, 7)
            kill_somewhere(edge, server, tap, sent_chunks=sent_chunks, kept_chunks=rng.randint(0, sent_chunks))
            tap = Tap()
            file.before_chunk = tap.take
            assert assert_sound(edge.store) == []
            sizes.append(kept_bytes(edge))
        assert sizes == sorted(sizes)
        assert 0 < sizes[-1] < len(MODEL)
        file.before_chunk = lambda: None
        before = server.total_sent()
        assert edge.run("pull", f"{server.url}/m.gguf", "--name", "kept").returncode == 0
        assert server.total_sent() - before == len(MODEL) - sizes[-1]
    assert edge.run("verify").returncode == 0
    assert [str(model.ref) for model in assert_sound(edge.store)] == ["kept:latest"]
