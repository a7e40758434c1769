"""A run killed at any moment is taken up by the next, which leaves the same bytes and no debris."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edge.store.models import ModelStore
from tests.quantize.checkpoints import make_smollm

MOST_KILLS = 40
"""Each third kill leaves one more step done; eight steps end long before this."""


def killed(source: Path, home: Path, place: str, number: int) -> bool:
    """Run in a process of its own; whether it was killed. Anything but that or success fails the test."""
    command = [sys.executable, "-m", "tests.quantize.killed_run", str(source), str(home), place, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def weights(home: Path) -> dict[str, str]:
    """Digest of each package's GGUF; every package is verified."""
    store = ModelStore(home / "store")
    for model in store.list():
        assert all(check.is_good for check in store.verify(model.ref))
    assert not store.damaged()
    return {str(m.ref): next(f.digest for f in m.files if f.path == m.weights) for m in store.list()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm(tmp_path_factory.mktemp("resume") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("undisturbed")
    assert not killed(source, home, "event", 0)
    return weights(home)


def test_killed_at_each_moment_of_each_step(source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Killed in the middle of a step, when its file is written but has no name, and when it has one."""
    kills = 0
    for number in itertools.cycle((2, 3, 4)):
        if not killed(source, tmp_path, "event", number):
            break
        kills += 1
        assert weights(tmp_path) == {}
        assert kills < MOST_KILLS
    assert kills >= 8  # Convert, time the source, and make, judge and time two variants.
    assert weights(tmp_path) == undisturbed
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [1, 3, 6, 9])
def test_killed_while_packaging(number: int, source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    assert killed(source, tmp_path, "store", number)
    assert set(weights(tmp_path).items()) <= set(undisturbed.items())
    assert not killed(source, tmp_path, "event", 0)
    assert weights(tmp_path) == undisturbed
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["lock"]


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    source = make_smollm(tmp_path / "tiny")
    command = [sys.executable, "-m", "tests.quantize.killed_run", str(source), str(tmp_path / "home"), "event", "0"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(parent.pid).children()):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait(timeout=10)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive
