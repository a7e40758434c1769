"""How many threads the next step should use, from what the machine's other processes are doing.

Threads of one step wait for each other by spinning. Where another process holds a core, one of them is always the last,
and two threads on two cores become many times slower than one (docs/performance.md). Trying both to see which is
faster does not work, since a single step with too many threads can take seconds; the kernel's counters tell without
trying.

In a container with a quota of processor time, what counts is the control group's own: threads beyond it are stopped all
together for the rest of each period. Others on cores that this process may not use do not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.hardware.memory import CpuQuota

_INTERVAL_S = 0.2
_STALE_S = 1.0
"""After a pause this long the counters say nothing about now."""
_TAKEN_SHARE = 0.3
"""A core of which others use more than this counts as taken."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of processor time since the machine's start on the cores that this process may use, of this process and
    the front that started it, and of the control group with the quota, if there is one."""

    at: float
    busy_s: float
    own_s: float
    group_s: float = 0.0


def _busy_ticks(stat: str, cores: set[int]) -> int:
    """User, nice, system, irq, softirq and steal of these cores (proc(5), /proc/stat)."""
    ticks = 0
    for line in stat.splitlines()[1:]:
        name, *fields = line.split(None, 9)[:9]
        if not name.startswith("cpu"):
            break
        if int(name[3:]) in cores:
            times = [int(f) for f in fields]
            ticks += sum(times) - times[3] - times[4]  # idle and iowait
    return ticks


def read_cpu_times(quota: CpuQuota | None = None) -> CpuTimes:
    """The kernel's counters now."""
    busy = _busy_ticks(Path("/proc/stat").read_text("ascii"), os.sched_getaffinity(0))
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    front = Path(f"/proc/{os.getppid()}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    front_s = (int(front[11]) + int(front[12])) / ticks  # utime and stime, proc(5)
    group_s = quota.used_s() if quota is not None else 0.0
    return CpuTimes(time.monotonic(), busy / ticks, own.user + own.system + front_s, group_s)


class Governor:
    """Chooses the threads of each step. One thread owns it.

    Args:
        max_threads: Threads on a machine that does nothing else.
        cores: Cores that this process may run on.
        quota: What its control group allows.
        read: The counters; injected by tests.
    """

    def __init__(
        self, *, max_threads: int, cores: int, quota: CpuQuota | None = None,
        read: Callable[[CpuQuota | None], CpuTimes] = read_cpu_times,
    ) -> None:  # fmt: skip
        self._max_threads = max_threads
        self._cores = cores
        self._quota = quota
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
        before, self._last = self._last, self._read(self._quota)
        self._next_look = now + _INTERVAL_S
        if before is None or (span := self._last.at - before.at) > _STALE_S:
            self._next_look = now + _INTERVAL_S / 4  # was idle: look again soon
            return
        if span <= 0:
            return
        own_s = self._last.own_s - before.own_s
        threads = self._cores - _taken((self._last.busy_s - before.busy_s - own_s) / span)
        if self._quota is not None:
            in_group = _taken((self._last.group_s - before.group_s - own_s) / span)
            threads = min(threads, int(self._quota.cores + 0.5) - in_group)
        threads = max(1, min(self._max_threads, threads))
        if threads != self.threads:
            self.threads = threads
            self.num_changes += 1


def _taken(others: float) -> int:
    """Cores that others' use of so many leaves no room on."""
    return int(max(0.0, others) + 1 - _TAKEN_SHARE)
