"""Room on the disk: what is promised to one download is not promised to another, and removing always works."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import pytest
from typing_extensions import override

from edge.errors import DiskFull
from edge.store.blobs import Partial
from edge.store.files import FileOps
from edge.store.models import ModelStore
from edge.store.room import RESERVE_FILE_BYTES, used_bytes
from edge.store.transfer import RESERVE_BYTES, require_room
from tests.edge.store_support import add_model, assert_sound, write_gguf

MIB = 1 << 20


@dataclass
class SmallDisk(FileOps):
    """Room without the reserve, less what is being fetched. When it is full, only the reserve can be given up."""

    root: Path
    capacity_bytes: int = 100 * MIB
    is_full: bool = False

    @override
    def free_bytes(self, path: Path) -> int:
        used = sum(used_bytes(partial) for partial in self.root.glob("ingest/*.partial"))
        return self.capacity_bytes + RESERVE_BYTES - used

    @override
    def allocate(self, file: FileIO, size_bytes: int) -> None:
        self.refuse()
        super().allocate(file, size_bytes)

    @override
    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        self.refuse()
        super().write(file, data)

    def refuse(self) -> None:
        if self.is_full and (self.root / "reserve").exists():
            raise DiskFull(required_bytes=1, available_bytes=0)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store", files=SmallDisk(tmp_path / "store"))


def grow(partial: Partial, to_bytes: int) -> None:
    """Without writing it: what counts is the size."""
    with partial.path.open("r+b") as file:
        file.truncate(to_bytes)


def test_two_downloads_are_not_promised_the_same_room(store: ModelStore) -> None:
    with store.blobs.ingest("one") as one, store.blobs.ingest("two") as two:
        require_room(store.blobs, 60 * MIB, one)
        with pytest.raises(DiskFull, match="beside the 62,914,560 that downloads under way still need") as caught:
            require_room(store.blobs, 60 * MIB, two)
        assert (caught.value.available_bytes, caught.value.promised_bytes) == (40 * MIB + RESERVE_BYTES, 60 * MIB)
        require_room(store.blobs, 40 * MIB, two)
        with pytest.raises(DiskFull):
            require_room(store.blobs, 1)


def test_what_has_come_is_no_promise_any_more(store: ModelStore) -> None:
    with store.blobs.ingest("one") as one, store.blobs.ingest("two") as two:
        require_room(store.blobs, 60 * MIB, one)
        grow(one, 30 * MIB)
        assert store.blobs.room.promised_bytes() == 30 * MIB
        one.folder.mkdir()
        (one.folder / "x.whl").write_bytes(bytes(MIB))
        assert store.blobs.room.promised_bytes() == 29 * MIB
        require_room(store.blobs, 40 * MIB, two)
        grow(one, 200 * MIB)
        assert store.blobs.room.promised_bytes(but=two.path) == 0, "more than was promised is only what it takes"


def test_a_download_may_claim_again(store: ModelStore) -> None:
    with store.blobs.ingest("one") as one:
        require_room(store.blobs, 90 * MIB, one)
        grow(one, 50 * MIB)
        require_room(store.blobs, 40 * MIB, one)
        assert store.blobs.room.promised_bytes() == 40 * MIB
        require_room(store.blobs, 10 * MIB, one)
        assert store.blobs.room.promised_bytes() == 10 * MIB


def test_a_promise_ends_with_the_download(store: ModelStore) -> None:
    with store.blobs.ingest("one") as one:
        require_room(store.blobs, 60 * MIB, one)
    assert store.blobs.room.promised_bytes() == 0
    with store.blobs.ingest("one") as one:
        require_room(store.blobs, 60 * MIB, one)
        one.discard()
        assert store.blobs.room.promised_bytes() == 0
    assert list(store.blobs.ingest_dir.iterdir()) == []


def test_a_killed_download_was_promised_nothing(store: ModelStore) -> None:
    code = "import sys; from pathlib import Path; from edge.store.models import ModelStore\n"
    code += "from edge.store.transfer import require_room\n"
    code += "blobs = ModelStore(Path(sys.argv[1])).blobs; partial = blobs.ingest('one')\n"
    code += "require_room(blobs, 10 << 20, partial); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert store.blobs.room.promised_bytes() == 10 * MIB
        holder.kill()
        holder.wait(30)
    assert store.blobs.room.promised_bytes() == 0
    with store.blobs.ingest("one") as one:
        require_room(store.blobs, 20 * MIB, one)
        assert store.blobs.room.promised_bytes() == 20 * MIB


def test_a_claim_that_cannot_be_written_is_none(store: ModelStore) -> None:
    store.collect()
    disk = store.blobs.files
    assert isinstance(disk, SmallDisk)
    with store.blobs.ingest("one") as one:
        disk.is_full = True
        with pytest.raises(DiskFull):
            require_room(store.blobs, MIB, one)
        disk.is_full = False
        assert store.blobs.room.promised_bytes() == 0


def test_models_are_removed_from_a_full_disk(store: ModelStore, tmp_path: Path) -> None:
    add_model(store, "tiny", write_gguf(tmp_path / "tiny.gguf"))
    add_model(store, "kept", write_gguf(tmp_path / "kept.gguf", fill=b"\x02"))
    reserve = store.root / "reserve"
    assert reserve.stat().st_size == RESERVE_FILE_BYTES <= reserve.stat().st_blocks * 512
    disk = store.blobs.files
    assert isinstance(disk, SmallDisk)
    disk.is_full = True
    with pytest.raises(DiskFull):
        store.pin("kept")
    store.remove("tiny")
    assert store.collect().num_blobs == 3
    assert [str(model.ref) for model in assert_sound(store.root)] == ["kept:latest"]
    assert not reserve.exists()
    disk.is_full = False
    store.collect()
    assert reserve.exists(), "there is room again, and it is kept for the next time"


def test_a_disk_that_cannot_reserve_is_used_all_the_same(tmp_path: Path) -> None:
    class NoRoom(FileOps):
        @override
        def allocate(self, file: FileIO, size_bytes: int) -> None:
            raise DiskFull(required_bytes=size_bytes, available_bytes=0)

    store = ModelStore(tmp_path / "store", files=NoRoom())
    add_model(store, "tiny", write_gguf(tmp_path / "tiny.gguf"))
    store.remove("tiny")
    assert store.collect().num_blobs == 3
    assert not (store.root / "reserve").exists()
