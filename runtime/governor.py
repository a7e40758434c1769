"""How many threads the next step should use, from what the machine's other processes are doing.

Threads of one step wait for each other by spinning. Where another process holds a core, one of them is always the last,
and two threads on two cores become many times slower than one (docs/performance.md). Trying both to see which is
faster does not work, since a single step with too many threads can take seconds; the kernel's counters tell without
trying.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.2
_STALE_S = 1.0
"""After a pause this long the counters say nothing about now."""
_TAKEN_SHARE = 0.3
"""A core of which others use more than this counts as taken."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of processor time since the machine's start, and of this process and the front that started it."""

    at: float
    busy_s: float
    own_s: float


def read_cpu_times() -> CpuTimes:
    """The kernel's counters now (proc(5), /proc/stat): user, nice, system, irq, softirq and steal are busy."""
    fields = [int(f) for f in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]]
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    front = Path(f"/proc/{os.getppid()}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    front_s = (int(front[11]) + int(front[12])) / ticks  # utime and stime, proc(5)
    busy = (sum(fields) - fields[3] - fields[4]) / ticks
    return CpuTimes(time.monotonic(), busy, own.user + own.system + front_s)


class Governor:
    """Chooses the threads of each step. One thread owns it.

    Args:
        max_threads: Threads on a machine that does nothing else.
        cores: Cores that this process may run on.
        read: The counters; injected by tests.
    """

    def __init__(self, *, max_threads: int, cores: int, read: Callable[[], CpuTimes] = read_cpu_times) -> None:
        self._max_threads = max_threads
        self._cores = cores
        self._read = read
        self._last: CpuTimes | None = None
        self._next_look = 0.0
        self.threads = max_threads
        self.num_changes = 0

    def choose(self, now: float) -> int:
        """Threads for a step that begins at `now` (monotonic seconds). Looks at the counters at most each 0.2 s."""
        if self._max_threads > 1 and now >= self._next_look:
            self._look(now)
        return self.threads

    def _look(self, now: float) -> None:
        before, self._last = self._last, self._read()
        self._next_look = now + _INTERVAL_S
        if before is None or (span := self._last.at - before.at) > _STALE_S:
            self._next_look = now + _INTERVAL_S / 4  # was idle: look again soon
            return
        if span <= 0:
            return
        others = ((self._last.busy_s - before.busy_s) - (self._last.own_s - before.own_s)) / span
        taken = int(max(0.0, others) + 1 - _TAKEN_SHARE)
        threads = max(1, min(self._max_threads, self._cores - taken))
        if threads != self.threads:
            self.threads = threads
            self.num_changes += 1
