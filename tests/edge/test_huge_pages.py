"""Pages of a mapped file are replaced under its readers."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from pathlib import Path

from edge.native.huge_pages import MAX_WINDOWS, Mapping, huge_page_bytes, mappings_of, replace, windows


def test_readers_see_the_same_bytes_throughout(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = os.urandom(9 << 20)
    path.write_bytes(content)
    wanted = hashlib.blake2b(content).digest()
    wrong: list[bytes] = []
    done = threading.Event()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def read() -> None:
            while not done.is_set():
                if (got := hashlib.blake2b(mapped).digest()) != wanted:
                    wrong.append(got)

        reader = threading.Thread(target=read)
        reader.start()
        steps = list(replace(path))
        done.set()
        reader.join(timeout=60)
        assert hashlib.blake2b(mapped).digest() == wanted
    assert not wrong
    assert steps == sorted(set(steps))
    if page := huge_page_bytes():
        assert not steps or page <= steps[-1] <= len(content)
    else:
        assert not steps


def test_windows_are_whole_huge_pages_inside_the_mapping_and_not_too_many() -> None:
    page = 2 << 20
    assert windows(Mapping(4096, page + 4096), page) == []
    assert windows(Mapping(4096, 3 * page), page) == [Mapping(page, 2 * page), Mapping(2 * page, 3 * page)]
    many = windows(Mapping(0, 100_000 * page + 5), page)
    assert len(many) <= MAX_WINDOWS
    assert all(w.start % page == 0 == w.end % page for w in many)
    assert many[-1].end == 100_000 * page


def test_a_kernel_that_gives_none_is_asked_for_none(tmp_path: Path) -> None:
    assert huge_page_bytes(tmp_path) == 0
    directory = tmp_path / "sys/kernel/mm/transparent_hugepage"
    directory.mkdir(parents=True)
    (directory / "hpage_pmd_size").write_text("2097152\n")
    (directory / "enabled").write_text("always madvise [never]\n")
    assert huge_page_bytes(tmp_path) == 0
    (directory / "enabled").write_text("always [madvise] never\n")
    assert huge_page_bytes(tmp_path) == 2097152


def test_only_read_only_mappings_of_the_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    inode = path.stat().st_ino
    maps = (
        f"1000-3000 r--s 00000000 fe:00 {inode}    {path}\n"
        f"5000-6000 rw-p 00000000 fe:00 {inode}    {path}\n"
        f"7000-8000 r--p 00000000 fe:00 {inode + 1} /other\n"
        "9000-a000 rw-p 00000000 00:00 0\n"
        f"b000-c000 r-xp 00000000 fe:01 {inode}    /usr/lib/of-another-filesystem.so\n"
    )
    assert mappings_of(path, maps) == [Mapping(0x1000, 0x3000)]
