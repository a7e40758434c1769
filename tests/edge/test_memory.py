"""What memory may be taken: the kernel's files as they are in control groups of both versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge.hardware.memory import available_bytes, total_bytes

MIB = 1 << 20
FULL: Mapping[str, int] = {
    "inactive_file": 100,
    "active_file": 300,
    "slab_reclaimable": 20,
    "unevictable": 50,
    "shmem": 70,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096000 kB\nMemAvailable: 2048000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/slice/app\n")
    return tmp_path


def group(root: Path, name: str, stat: Mapping[str, int] = FULL, **files: int | str) -> None:
    """A control group: its files in MiB, `memory.stat` too."""
    directory = root / "sys/fs/cgroup" / name
    directory.mkdir(parents=True, exist_ok=True)
    for file, value in files.items():
        text = str(value * MIB) if isinstance(value, int) else value
        (directory / file.replace("_", ".", 1)).write_text(text + "\n")
    (directory / "memory.stat").write_text("".join(f"{k} {v * MIB}\n" for k, v in stat.items()))


def available_mib(root: Path) -> int:
    return available_bytes(root) // MIB


def test_without_groups_the_kernels_word_counts(root: Path) -> None:
    assert available_mib(root) == 2000


def test_pages_of_files_make_room_whether_used_lately_or_not(root: Path) -> None:
    group(root, "slice/app", memory_max=1000, memory_current=900)
    assert available_mib(root) == 100 + 100 + 300 + 20


def test_what_is_mapped_or_has_to_be_written_does_not(root: Path) -> None:
    busy = {"file_mapped": 200, "file_dirty": 30, "file_writeback": 10}
    group(root, "slice/app", {**FULL, **busy}, memory_max=1000, memory_current=900)
    assert available_mib(root) == 100 + 420 - 240
    group(root, "slice/app", {**FULL, "file_mapped": 900}, memory_max=1000, memory_current=900)
    assert available_mib(root) == 100


def test_past_memory_high_a_group_is_slowed_so_it_is_a_limit(root: Path) -> None:
    group(root, "slice/app", {}, memory_max=1000, memory_high=600, memory_current=500)
    assert available_mib(root) == 100
    assert total_bytes(root) == 600 * MIB
    group(root, "slice/app", {}, memory_max="max", memory_high="max", memory_current=500)
    assert available_mib(root) == 2000
    assert total_bytes(root) == 4_096_000 << 10


def test_the_tightest_group_above_decides(root: Path) -> None:
    group(root, "slice/app", {}, memory_max=1000, memory_current=100)
    group(root, "slice", {"active_file": 50}, memory_max=800, memory_current=700)
    assert available_mib(root) == 150
    assert total_bytes(root) == 800 * MIB


def test_what_a_neighbour_is_guaranteed_is_not_for_us(root: Path) -> None:
    group(root, "slice", {"active_file": 500}, memory_max=1000, memory_current=900)
    group(root, "slice/app", {}, memory_current=300)
    group(root, "slice/neighbour", {"active_file": 500}, memory_current=400, memory_low=300, memory_min=0)
    assert available_mib(root) == 100 + 200
    group(root, "slice/neighbour", memory_current=100, memory_low=300)
    assert available_mib(root) == 100 + 400, "it cannot keep more than it has"


def test_version_1_counts_what_lies_below_a_group(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("3:cpu:/\n2:memory:/box\n1:name=systemd:/\n")
    stat = {"inactive_file": 1, "mapped_file": 500, "total_inactive_file": 100, "total_active_file": 300}
    stat |= {"total_mapped_file": 60, "total_dirty": 40, "total_writeback": 0}
    group(root, "memory/box", stat, memory_limit_in_bytes=1000, memory_usage_in_bytes=950)
    assert available_mib(root) == 50 + 300
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text("1000\n")
    assert available_mib(root) == 350


def test_nonsense_in_the_files_is_no_limit(root: Path) -> None:
    group(root, "slice/app", memory_max="lots", memory_current=900)
    assert available_mib(root) == 2000
    group(root, "slice/app", memory_max=1000, memory_current="")
    assert available_mib(root) == 2000
