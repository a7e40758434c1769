"""Memory of large blocks goes back to the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from edge.native.malloc import give_large_blocks_back

def resident():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096 >> 20

if sys.argv[1] == "on":
    give_large_blocks_back()
del [bytearray(20 << 20)][:]
kept, before = [], resident()
for i in range(20):
    large = bytearray(4 << 20)
    large[:] = b"x" * len(large)
    kept.append(b"y" * 100_000)  # lies behind it
    kept.append(large)
kept = [k for k in kept if len(k) < 1 << 20]
del large
print(resident() - before)
"""


@pytest.mark.parametrize("switch", ["on", "off"])
def test_blocks_that_were_freed_leave_no_holes(switch: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, switch], capture_output=True, text=True, timeout=60, check=True
    )
    grown_mib = int(done.stdout)
    assert grown_mib <= 10 if switch == "on" else grown_mib >= 40, "and without it the test would show nothing"
