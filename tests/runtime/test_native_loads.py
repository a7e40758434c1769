"""What the scan lets pass costs llama.cpp at most its process: see `tests.runtime.native_loads`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.runtime.native_loads import Tally

ROOT = Path(__file__).parent.parent.parent


def load(first: int, count: int, folder: Path) -> Tally:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.native_loads", str(first), str(count)], cwd=folder, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{folder / 'input.gguf'}: {done.stderr[-2000:]!r}"
    tally = msgspec.json.decode(done.stdout, type=Tally)
    assert 0 < tally.let_pass == tally.answered + tally.refused + sum(map(len, tally.ended.values())) < tally.tried
    assert tally.peak_bytes < 1 << 30
    return tally


def test_changed_models_cost_at_most_their_process(tmp_path: Path) -> None:
    assert load(0, 12, tmp_path).answered, "some changes are harmless"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_many_changed_models_cost_at_most_their_process(tmp_path: Path) -> None:
    print(msgspec.json.encode(load(0, 2000, tmp_path)).decode())
