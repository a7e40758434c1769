"""The governor on replayed counters."""

from __future__ import annotations

from pathlib import Path

from edge.hardware.memory import CpuQuota, cpu_quota, usable_cores
from runtime.governor import CpuTimes, Governor, read_cpu_times


class Counters:
    """A machine whose other processes use `others` cores, and this one `own`."""

    def __init__(self) -> None:
        self.now = self.busy = self.used = self.group = 0.0

    def pass_time(self, seconds: float, *, others: float, own: float, in_group: float = 0.0) -> None:
        self.now += seconds
        self.busy += seconds * (others + own)
        self.used += seconds * own
        self.group += seconds * (own + in_group)

    def read(self, quota: CpuQuota | None) -> CpuTimes:
        return CpuTimes(self.now, self.busy, self.used, self.group)


def run(
    governor: Governor, counters: Counters, *, others: float, own: float, in_group: float = 0.0, seconds: float = 1.0
) -> int:
    for _ in range(int(seconds / 0.05)):
        counters.pass_time(0.05, others=others, own=own, in_group=in_group)
        governor.choose(counters.now)
    return governor.threads


def test_a_quiet_machine_gives_every_core() -> None:
    counters = Counters()
    assert run(Governor(max_threads=2, cores=2, read=counters.read), counters, others=0.05, own=1.9) == 2


def test_a_taken_core_is_left_alone_and_taken_back() -> None:
    counters = Counters()
    governor = Governor(max_threads=4, cores=4, read=counters.read)
    assert run(governor, counters, others=1.0, own=3.0) == 3
    assert run(governor, counters, others=2.6, own=1.4) == 1
    assert run(governor, counters, others=9.0, own=1.0) == 1
    assert run(governor, counters, others=0.1, own=1.0) == 4


def test_a_pause_is_no_evidence() -> None:
    counters = Counters()
    governor = Governor(max_threads=2, cores=2, read=counters.read)
    run(governor, counters, others=0.0, own=2.0)
    counters.pass_time(60, others=2.0, own=0.0)
    assert governor.choose(counters.now) == 2


def test_the_kernels_counters_can_be_read_and_rise() -> None:
    first = read_cpu_times()
    sum(range(200_000))
    second = read_cpu_times()
    assert second.at > first.at
    assert second.busy_s >= first.busy_s > 0
    assert second.own_s >= first.own_s > 0


def test_a_quota_bounds_the_threads_and_neighbours_on_a_large_host_do_not() -> None:
    counters = Counters()
    quota = CpuQuota(2.0, Path("cpu.stat"))
    governor = Governor(max_threads=2, cores=64, quota=quota, read=counters.read)
    assert run(governor, counters, others=30.0, own=2.0) == 2
    assert run(governor, counters, others=30.0, own=1.0, in_group=1.0) == 1
    narrow = Governor(max_threads=2, cores=64, quota=CpuQuota(1.2, Path("cpu.stat")), read=counters.read)
    assert run(narrow, counters, others=0.0, own=1.0) == 1


def test_the_tightest_quota_around_the_process_is_found(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/system.slice/edge.service"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/edge.service\n")
    assert cpu_quota(tmp_path) is None
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    (group.parent / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    quota = cpu_quota(tmp_path)
    assert quota is not None
    assert (quota.cores, quota.used_s()) == (1.5, 2.5)
    assert usable_cores(tmp_path) <= 2
