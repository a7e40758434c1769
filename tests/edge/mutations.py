"""Mutated inputs by the thousand, for all that reads foreign bytes.

``python -m tests.edge.mutations KIND FIRST COUNT`` feeds the inputs of these numbers, in an empty working directory,
and prints a `Tally` as JSON. Each has to be taken or refused with an error of ours, within a second of processor time
and in bounded memory, and nothing may be written outside ``store``. The last one lies in ``input``, should the process
die. The same number is the same input everywhere.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from edge.errors import EdgeError
from tests.edge import mutated_files, mutated_stores
from tests.edge.mutators import MAX_CPU_S, OUTSIDE, Kind

MAX_GROWTH_BYTES = 128 << 20
"""Of the address space, beyond what the process has after reading sound inputs."""
_HANG_S = 60
"""On the wall: past it the process is ended."""
_CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.remove": 1, "os.truncate": 1}
"""Audited events that change the disk, and how many paths they name first."""


KINDS: Mapping[str, Callable[[Path], Kind]] = {
    "gguf": lambda _: mutated_files.gguf(),
    "safetensors": lambda _: mutated_files.safetensors(),
    "onnx": lambda _: mutated_files.onnx(),
    "template": lambda _: mutated_files.template(),
    "manifest": mutated_stores.manifest,
    "tar": mutated_stores.tar,
}
"""Each gets a directory of its own."""


class Tally(msgspec.Struct):
    """What became of the inputs of one kind."""

    kind: str
    num_inputs: int = 0
    num_accepted: int = 0
    slowest_s: float = 0.0
    """Of processor time, in this process."""
    grown_bytes: int = 0
    """How much more memory this process had at its peak than after reading sound inputs."""
    failures: list[str] = []


def run(name: str, first: int, count: int, folder: Path) -> Tally:
    """Feed the inputs from `first` on. Limits this process: call it in one of its own."""
    (folder / "store").mkdir()
    kind, tally, path = KINDS[name](folder / "store"), Tally(name), folder / "input"
    for data in kind.sound[:8]:
        path.write_bytes(data)
        assert kind.feed(data, path), "a sound input is refused"
    before = _peak_bytes()
    _guard(folder, kind)
    for number in range(first, first + count):
        data = kind.mutate(random.Random(f"{name} {number}"))
        path.write_bytes(data)
        _feed(kind, data, path, tally, number)
    tally.grown_bytes = _peak_bytes() - before
    return tally


def _feed(kind: Kind, data: bytes, path: Path, tally: Tally, number: int) -> None:
    signal.alarm(_HANG_S)
    started = time.process_time()
    try:
        tally.num_accepted += kind.feed(data, path)
    except EdgeError:
        pass
    except BaseException as e:  # whatever it is, it is a finding
        tally.failures.append(f"{tally.kind} {number}: {type(e).__name__}: {e}"[:300])
    used_s = time.process_time() - started
    if used_s > MAX_CPU_S:
        tally.failures.append(f"{tally.kind} {number}: took {used_s:.2f} s")
    tally.num_inputs += 1
    tally.slowest_s = max(tally.slowest_s, used_s)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _guard(folder: Path, kind: Kind) -> None:
    """Have writes outside the store fail, and more memory than there should be need for."""
    allowed = (str(folder / "store"), str(folder / "input"), os.devnull)

    def watch(event: str, args: tuple[object, ...]) -> None:
        num_paths = _CHANGES.get(event, 0)
        if event == "open" and isinstance(args[2], int):
            num_paths = int(bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        beside = args[-1] if event in ("os.remove", "os.mkdir", "os.rename") else -1  # a directory's descriptor
        base = Path(f"/proc/self/fd/{beside}").readlink() if isinstance(beside, int) and beside >= 0 else folder
        for path in args[:num_paths]:
            where = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
            if not isinstance(path, int) and not os.path.normpath(base / where).startswith(allowed):
                if kind.forks:
                    os._exit(OUTSIDE)
                raise AssertionError(f"{event} {path!r} outside the store")

    sys.addaudithook(watch)
    if not kind.forks:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_GROWTH_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    print(msgspec.json.encode(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path.cwd())).decode())
