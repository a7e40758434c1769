"""Results appear whole or not at all, and a full disk is called by its name."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from typing_extensions import override

from edge.errors import DiskFull, RecipeError, StoreError
from edge.store.files import FileOps
from quantize.cache import StepCache, step_key


class FullDisk(FileOps):
    """A file system without room."""

    @override
    def free_bytes(self, path: Path) -> int:
        return 0


def failing(cache: StepCache, error: Exception) -> None:
    with cache.making("key", "model.gguf", needed_bytes=1000) as path:
        path.write_bytes(b"half")
        raise error


def test_a_result_appears_when_it_is_whole(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "work")
    with cache.making("key", "a.json") as path:
        path.write_bytes(b"{}")
        assert cache.find("key", "a.json") is None
    found = cache.find("key", "a.json")
    assert found is not None
    assert found.read_bytes() == b"{}"
    assert not path.exists()


@pytest.mark.parametrize(("error", "expected"), [
    (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
    (OSError(errno.EFBIG, "File too large"), RecipeError),
    (OSError(errno.EIO, "Input/output error"), StoreError),
    (RecipeError("no"), RecipeError),
])  # fmt: skip
def test_a_failure_leaves_nothing(error: Exception, expected: type[Exception], tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "work")
    with pytest.raises(expected):
        failing(cache, error)
    assert cache.find("key", "model.gguf") is None
    assert list((tmp_path / "work" / "key").iterdir()) == []


def test_the_librarys_failure_on_a_full_disk_is_the_disks(tmp_path: Path) -> None:
    with pytest.raises(DiskFull):
        failing(StepCache(tmp_path / "work", FullDisk()), RecipeError("failed to quantize: basic_ios::clear"))


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "work")
    with cache.making("key", "done") as path:
        path.write_bytes(b"1")
    half = tmp_path / "work" / "key" / "half.partial"
    half.write_bytes(b"1")
    with cache.held():
        assert not half.exists()
        assert cache.find("key", "done") is not None
        cache.clear()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["lock"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "work")
    with cache.held(), pytest.raises(RecipeError, match="Another"), StepCache(tmp_path / "work").held():
        pass


def test_keys_tell_inputs_apart() -> None:
    assert step_key("a", 1, "x") == step_key("a", 1, "x")
    assert len({step_key("a", 1), step_key("b", 1), step_key("a", "1"), step_key("a", 1, 1)}) == 4
