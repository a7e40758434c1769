"""The governor on replayed counters."""

from __future__ import annotations

from runtime.governor import CpuTimes, Governor, read_cpu_times


class Counters:
    """A machine whose other processes use `others` cores, and this one `own`."""

    def __init__(self) -> None:
        self.now = self.busy = self.used = 0.0

    def pass_time(self, seconds: float, *, others: float, own: float) -> None:
        self.now += seconds
        self.busy += seconds * (others + own)
        self.used += seconds * own

    def read(self) -> CpuTimes:
        return CpuTimes(self.now, self.busy, self.used)


def run(governor: Governor, counters: Counters, *, others: float, own: float, seconds: float = 1.0) -> int:
    for _ in range(int(seconds / 0.05)):
        counters.pass_time(0.05, others=others, own=own)
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
