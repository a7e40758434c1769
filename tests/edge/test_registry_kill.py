"""`edge push` and `edge pull` killed with SIGKILL at random moments: no byte is sent or fetched twice."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.models import ModelStore, PackageFile
from edge.store.registry.client import UPLOAD_BYTES
from tests.edge.edge_command import Edge, edge_at
from tests.edge.gguf_files import sized_gguf
from tests.edge.registries import PIECE_BYTES, Registry, Wire, docker_registry, wire_to
from tests.edge.store_support import assert_sound

MODEL = sized_gguf(200_000)
"""51 MB: several requests of an upload."""
REPO = "models/big"


class Tap:
    """Lets so many pieces pass, then says that it is dry and holds the rest."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self.is_dry = threading.Event()

    def take(self) -> None:
        if not self._allowed.acquire(blocking=False):
            self.is_dry.set()
            self._allowed.acquire(timeout=60)

    def wait(self, process: subprocess.Popen[str]) -> bool:
        """Whether it ran dry, rather than that the process came to its end."""
        deadline = time.monotonic() + 60
        while not self.is_dry.wait(0.01):
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline
        return True

    def open(self, pieces: int) -> None:
        self.is_dry.clear()
        self._allowed.release(pieces)


@pytest.fixture
def registry(tmp_path: Path) -> Generator[Registry]:
    with docker_registry(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def wire(registry: Registry) -> Generator[Wire]:
    with wire_to(registry.port) as found:
        yield found


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    """With the model ``big:latest``."""
    found, path = edge_at(tmp_path / "home"), tmp_path / "big.gguf"
    path.write_bytes(MODEL)
    ModelStore(found.store).add("big", [PackageFile(path, "big.gguf", move=True)], details_of(read_gguf(path)))
    return found


def killed(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()


def push_with_kills(edge: Edge, wire: Wire, *, kills: int, seed: int) -> None:
    """Each kill comes while the registry reads a request; the last push goes through."""
    rng, target = random.Random(seed), f"oci://{wire.host}/{REPO}:v1"
    model = ModelStore(edge.store).get("big")
    for _ in range(kills):
        tap = Tap()
        wire.before_up = tap.take
        process = edge.start("push", "big", target)
        tap.open(rng.randrange(8, 3 * UPLOAD_BYTES * 6 // kills // PIECE_BYTES // 2))
        if tap.wait(process):
            killed(process)
        tap.open(1 << 20)
    wire.before_up = lambda: None
    done = edge.run("push", "big", target)
    assert done.returncode == 0, done.stderr
    assert wire.up_bytes == model.size_bytes + model.manifest.config.size
    num_sessions = len(wire.requests("POST", "/blobs/uploads/"))
    assert num_sessions == 2, "one for each blob: none was begun anew"


def pull_with_kills(edge: Edge, wire: Wire, device: Edge, *, kills: int, seed: int) -> None:
    """Each kill comes while the registry sends; the last pull fetches what was not written, and nothing else."""
    rng, source = random.Random(seed), f"oci://{wire.host}/{REPO}:v1"
    assert edge.run("push", "big", source).returncode == 0
    sizes = [0]
    for _ in range(kills):
        tap = Tap()
        wire.before_down = tap.take
        process = device.start("pull", source)
        tap.open(rng.randrange(20, 600 // kills))
        assert tap.wait(process)
        wait_until_longer(device, sizes[-1])
        killed(process)
        tap.open(1 << 20)
        assert assert_sound(device.store) == []
        sizes.append(kept_bytes(device))
    assert sizes == sorted(sizes)
    wire.before_down = lambda: None
    before = wire.down_bytes
    done = device.run("pull", source)
    assert done.returncode == 0, done.stderr
    assert wire.down_bytes - before == len(MODEL) - sizes[-1]
    assert [str(model.ref) for model in assert_sound(device.store)] == ["big:v1"]


def test_kills_in_the_middle_of_a_push_cost_no_byte(edge: Edge, wire: Wire) -> None:
    push_with_kills(edge, wire, kills=3, seed=5)


def test_kills_in_the_middle_of_a_pull_cost_only_what_was_on_its_way(edge: Edge, wire: Wire, tmp_path: Path) -> None:
    pull_with_kills(edge, wire, edge_at(tmp_path / "device"), kills=3, seed=6)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_cost_no_byte(edge: Edge, wire: Wire, tmp_path: Path, seed: int) -> None:
    push_with_kills(edge, wire, kills=10, seed=seed)
    pull_with_kills(edge, wire, edge_at(tmp_path / "device"), kills=10, seed=seed)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_push_that_is_stopped_ends_its_request_first(edge: Edge, wire: Wire, how: signal.Signals) -> None:
    target, tap = f"oci://{wire.host}/{REPO}:v1", Tap()
    wire.before_up = tap.take
    with edge.start("push", "big", target) as process:
        tap.open(200)
        assert tap.wait(process)
        process.send_signal(how)
        tap.open(1 << 20)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The push was cancelled." in told
    assert wire.up_bytes % UPLOAD_BYTES < PIECE_BYTES, "whole requests, and the config"
    wire.before_up = lambda: None
    assert edge.run("push", "big", target).returncode == 0
    assert len(wire.requests("POST", "/blobs/uploads/")) == 2


def kept_bytes(edge: Edge) -> int:
    return sum(path.stat().st_size for path in edge.store.glob("ingest/*.partial"))


def wait_until_longer(edge: Edge, size_bytes: int) -> None:
    deadline = time.monotonic() + 30
    while kept_bytes(edge) <= size_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.005)
