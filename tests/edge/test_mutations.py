"""Laws of all that reads foreign bytes, over mutated inputs: see `tests.edge.mutations`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.edge.mutations import Tally

SHORT = {"gguf": 500, "safetensors": 500, "onnx": 500, "manifest": 60, "template": 24, "tar": 60}
LONG = {"gguf": 32_000, "safetensors": 20_000, "onnx": 32_000, "manifest": 8_000, "template": 6_000, "tar": 8_000}
PART = 4_000  # inputs of one process
ROOT = Path(__file__).parent.parent.parent


def feed(kind: str, first: int, count: int, folder: Path) -> Tally:
    """Feed inputs in a process of their own: should one end it, it lies in the folder as ``input``."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.edge.mutations", kind, str(first), str(count)], cwd=folder, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{kind}: {folder / 'input'} ended it ({done.returncode}): {done.stderr[-2000:]!r}"
    return msgspec.json.decode(done.stdout, type=Tally)


@pytest.mark.parametrize("kind", SHORT)
def test_mutated_inputs_do_no_harm(kind: str, tmp_path: Path) -> None:
    tally = feed(kind, 0, SHORT[kind], tmp_path / "run")
    assert tally.failures == []
    assert 0 < tally.num_accepted < tally.num_inputs == SHORT[kind], "mutations of all sorts"


PARTS = [(kind, first) for kind, count in LONG.items() for first in range(0, count, PART)]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "first"), PARTS)
def test_mutated_inputs_do_no_harm_for_long(kind: str, first: int, tmp_path: Path) -> None:
    tally = feed(kind, first, min(PART, LONG[kind] - first), tmp_path / "run")
    print(msgspec.json.encode(tally).decode())
    assert tally.failures == []
