"""Reading /proc."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import machine
from benchmarks.machine import CpuReading, others_cores, parse_process, parse_smaps, parse_stat_cpu_s, tree_of
from tests.benchmarks.near import approx

TICKS = os.sysconf("SC_CLK_TCK")


def test_busy_time_leaves_out_idle_and_waiting_for_disks() -> None:
    text = "cpu  100 20 30 9999 888 1 2 3 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert parse_stat_cpu_s(text) == approx(156 / TICKS)


def test_a_process_may_be_called_anything() -> None:
    text = "77 (a) b (c)) S 5 77 77 0 -1 4194304 1 2 3 4 250 50 7 8 20 0 1 0 12 1 1"
    assert parse_process(text) == (5, approx(300 / TICKS))


def test_memory_of_smaps_rollup() -> None:
    text = "55e0-7ffd ---p 0 00:00 0   [rollup]\nRss:  2048 kB\nPss:  1024 kB\nAnonymous:  512 kB\nLocked: 0 kB\n"
    memory = parse_smaps(text)
    assert (memory.resident, memory.proportional, memory.anonymous) == (2 << 20, 1 << 20, 1 << 19)


def test_tree_holds_children_of_children_in_any_order() -> None:
    assert tree_of(1, [(4, 3), (3, 1), (9, 8), (5, 4)]) == {1, 3, 4, 5}


def test_others_are_what_is_left() -> None:
    assert others_cores(CpuReading(0.0, 10.0, 1.0), CpuReading(2.0, 14.0, 4.0)) == approx(0.5)
    assert others_cores(CpuReading(0.0, 10.0, 1.0), CpuReading(2.0, 11.0, 4.0)) == 0.0, "ticks are coarse"


def test_a_child_counts_as_our_own_while_it_lives_and_after() -> None:
    before = machine.read_cpu()
    child = subprocess.Popen([sys.executable, "-c", "import sys, time\nwhile time.process_time() < 0.15: pass\n"
                              "print(flush=True); sys.stdin.read()"], stdin=-1, stdout=-1)  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    living = machine.read_cpu()
    assert machine.tree_cpu_s(child.pid) >= 0.1
    assert machine.tree_memory(child.pid).resident > 1 << 20
    child.communicate(timeout=20)
    ended = machine.read_cpu()
    assert living.own_s - before.own_s >= 0.1
    assert ended.own_s - before.own_s >= 0.1
