"""What /proc says of a tree of processes and of the machine around it (proc(5))."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a tree of processes, in bytes. `resident` counts shared pages once for each process, `proportional` (PSS)
    divides them among those that map them."""

    resident: int
    proportional: int
    anonymous: int


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Seconds of CPU: of all cores since the machine started, and of this process with all it ever started."""

    at: float
    machine_s: float
    own_s: float


def parse_stat_cpu_s(text: str) -> float:
    """Busy seconds of all cores, steal included, from the first line of `/proc/stat`."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, text.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICKS_S


def parse_process(text: str) -> tuple[int, float]:
    """Parent and CPU seconds of a process, its threads included, from `/proc/PID/stat`."""
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and parentheses
    return int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICKS_S


def parse_smaps(text: str) -> Memory:
    """Sums of `/proc/PID/smaps_rollup`."""
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith(" kB")}
    return Memory(kilobytes["Rss"] << 10, kilobytes["Pss"] << 10, kilobytes["Anonymous"] << 10)


def _processes() -> dict[int, tuple[int, float]]:
    found: dict[int, tuple[int, float]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            try:
                found[int(entry.name)] = parse_process((entry / "stat").read_text("utf-8", "replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def tree_of(root: int, parents: Iterable[tuple[int, int]]) -> set[int]:
    """`root` and everything below it.

    Args:
        parents: Of each process its id and its parent's.
    """
    pairs, tree = list(parents), {root}
    while more := {pid for pid, parent in pairs if parent in tree} - tree:
        tree |= more
    return tree


def tree_cpu_s(root: int) -> float:
    """CPU seconds of the living processes of a tree."""
    processes = _processes()
    tree = tree_of(root, ((pid, parent) for pid, (parent, _) in processes.items()))
    return sum(cpu for pid, (_, cpu) in processes.items() if pid in tree)


def tree_memory(root: int) -> Memory:
    """Memory of a tree of processes."""
    tree = tree_of(root, ((pid, parent) for pid, (parent, _) in _processes().items()))
    parts = [parse_smaps((_PROC / str(pid) / "smaps_rollup").read_text("ascii")) for pid in tree]
    return Memory(sum(p.resident for p in parts), sum(p.proportional for p in parts), sum(p.anonymous for p in parts))


def machine_cpu_s() -> float:
    """Busy seconds of all cores since the machine started."""
    return parse_stat_cpu_s((_PROC / "stat").read_text("ascii"))


def read_cpu() -> CpuReading:
    """Both counters now."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = tree_cpu_s(os.getpid()) + ended.ru_utime + ended.ru_stime
    return CpuReading(time.perf_counter(), machine_cpu_s(), own_s)


def others_cores(before: CpuReading, after: CpuReading) -> float:
    """Cores that anything but this process and what it started used between two readings."""
    used = (after.machine_s - before.machine_s) - (after.own_s - before.own_s)
    return max(0.0, used / max(1e-3, after.at - before.at))


def describe() -> dict[str, str]:
    """The machine in words, for a report."""
    info = (_PROC / "cpuinfo").read_text("utf-8", "replace").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), os.uname().machine)
    memory = next(line for line in (_PROC / "meminfo").read_text("ascii").splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory.split()[1]) / 1e6:.1f} GB",
        "kernel": os.uname().release,
    }
