"""Memory and cores this process may use: the kernel's word, cut by its control groups. Reads only."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def _meminfo(root: Path) -> dict[str, int]:
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    fields = (line.replace(":", "").split() for line in lines)
    return {f[0]: int(f[1]) * 1024 for f in fields if len(f) >= 2 and f[1].isdigit()}


def _cgroup_dirs(root: Path) -> list[Path]:
    """Directories of this process's memory control group and its parents, v2 or v1, from leaf to root."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = base / "memory" if controllers else base
        leaf = top / path.strip("/")
        found += [d for d in (leaf, *leaf.parents) if d == top or top in d.parents]
    return found or [base, base / "memory"]


def _limit(directory: Path) -> int | None:
    """What a group may use: memory.max, or memory.high, past which its processes are slowed until they use less."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    found = [v for name in names if (v := _read_int(directory / name)) is not None]
    return min((v for v in found if v < _UNLIMITED), default=None)


def _cgroup_available(directory: Path) -> int | None:
    limit, used = _limit(directory), _used(directory)
    if limit is None or used is None:
        return None
    return max(0, limit - used + _reclaimable(directory))


def _used(directory: Path) -> int | None:
    names = ("memory.current", "memory.usage_in_bytes")
    return next((v for name in names if (v := _read_int(directory / name)) is not None), None)


def _reclaimable(directory: Path) -> int:
    """What the kernel gives back before it ends anything, though it counts as used: pages of files, and caches of
    names and inodes. Whether pages were used lately (active_file) does not keep them.

    Left out, to promise too little rather than too much: what has to be written first; what processes have mapped,
    which are the weights and the code in use; and what a group below is guaranteed (memory.min, memory.low), all of
    which may be files. Locked pages and tmpfs stand on lists of their own.

    Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
    """
    stat = _stat(directory)
    cache = sum(stat.get(name, 0) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    busy = sum(stat.get(name, 0) for name in ("file_mapped", "file_dirty", "file_writeback"))
    return max(0, cache - busy - sum(map(_guaranteed, directory.glob("*/memory.current"))))


def _stat(directory: Path) -> dict[str, int]:
    """memory.stat of a group and all below it, under the names of cgroup v2."""
    try:
        lines = (directory / "memory.stat").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    stat = {k: int(v) for k, _, v in (line.partition(" ") for line in lines) if v.isdigit()}
    v1 = {"total_mapped_file": "file_mapped", "total_dirty": "file_dirty", "total_writeback": "file_writeback"}
    return stat | {v1.get(k, k.removeprefix("total_")): v for k, v in stat.items() if k.startswith("total_")}


def _guaranteed(current: Path) -> int:
    """What is not taken from a group for others' sake, however little of it they use."""
    kept = max(_read_int(current.with_name(name)) or 0 for name in ("memory.min", "memory.low"))
    return min(kept, _read_int(current) or 0)


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes that the kernel ended for lack of memory since it booted; None where it does not say (before 4.13)."""
    try:
        lines = (root / "proc/vmstat").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or the tightest control group's limit where that is less."""
    limits = [v for d in _cgroup_dirs(root) if (v := _limit(d)) is not None]
    return min([_meminfo(root).get("MemTotal", _UNLIMITED), *limits])


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken now without swapping: MemAvailable, cut by each control group around this process."""
    groups = [v for d in _cgroup_dirs(root) if (v := _cgroup_available(d)) is not None]
    return min([_meminfo(root).get("MemAvailable", _UNLIMITED), *groups])


def data_bytes(root: Path = Path("/")) -> int:
    """Memory of its own that this process has taken, used or not (what RLIMIT_DATA counts); 0 where nothing says so."""
    try:
        lines = (root / "proc/self/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")), 0)


def takeable_bytes(root: Path = Path("/"), *, promised_bytes: int = 0) -> int:
    """Memory that this process may still take: what is free and not promised, cut by its own limit (RLIMIT_DATA)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    own = _UNLIMITED if limit == resource.RLIM_INFINITY else max(0, limit - data_bytes(root))
    return min(max(0, available_bytes(root) - promised_bytes), own)


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """Processor time that a control group allows.

    Attributes:
        cores: Seconds of it in a second.
        stat: The file that says how much the group has used (cpu.stat of cgroup v2).
    """

    cores: float
    stat: Path

    def used_s(self) -> float:
        """Processor time of the whole group since it was made; 0 where the file cannot be read."""
        try:
            lines = self.stat.read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            return 0.0
        return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("usage_usec ")), 0.0)


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The tightest quota around this process (cpu.max, cgroup v2); None without one."""
    found: list[CpuQuota] = []
    for directory in _cgroup_dirs(root):
        try:
            quota, period = (directory / "cpu.max").read_text("ascii").split()
        except (OSError, ValueError, UnicodeDecodeError):
            continue
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            found.append(CpuQuota(int(quota) / int(period), directory / "cpu.stat"))
    return min(found, key=lambda q: q.cores, default=None)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on: its affinity, cut by the control group's quota (rounded up), at least one."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota.cores)))
