"""Damage on the disk: found whatever memory has, quarantined, and mended by fetching no more than is wrong."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import pytest
from typing_extensions import override

from edge.config import Settings
from edge.errors import Cancelled, EdgeError, InvalidReference, NotRepaired, Quarantined
from edge.store import disk as disk_module
from edge.store import scrub
from edge.store.chunks import CHUNK_BYTES
from edge.store.digest import digest_bytes
from edge.store.disk import DiskReader
from edge.store.exporting import export, plan_export
from edge.store.manifest import Descriptor
from edge.store.models import ModelStore, StoredModel
from edge.store.network import Network
from edge.store.repair import LayoutSource, MemorySource, Source, repair
from edge.store.repair_sources import named_source, sources_for
from edge.store.scrub import Flaw, Piece, Scrubber, check, flaws_of, names_with, part_with, pieces_of
from edge.store.slots import Slot
from edge.store.transfer import Control
from tests.edge.file_server import ServedFile, serve
from tests.edge.power_cut import Disk, RecordingFileOps, cuts, restore
from tests.edge.store_support import Killed, KillingFileOps, NoSync, add_model, write_gguf

NUM_ROWS = 40_000
"""Makes 10 MB: two whole chunks and a part of one."""
QUIET = Control(lambda _: None, lambda: False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one model, to be copied."""
    directory = tmp_path_factory.mktemp("made")
    path = write_gguf(directory / "big.gguf", num_rows=NUM_ROWS)
    return add_model(ModelStore(directory / "store", files=NoSync()), "tiny", path).weights.parents[2]


@pytest.fixture
def store(made: Path, tmp_path: Path) -> ModelStore:
    return ModelStore(shutil.copytree(made, tmp_path / "store"), files=NoSync())


@pytest.fixture
def model(store: ModelStore) -> StoredModel:
    return store.get("tiny")


def weights_of(store: ModelStore, model: StoredModel) -> Descriptor:
    part = part_with(store, model.files[0].digest)
    assert part is not None
    return part


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file over, where it stands."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def all_flaws(store: ModelStore) -> list[Flaw]:
    """What a whole round of a fresh scrubber finds."""
    scrubber = Scrubber(store)
    first = scrubber.step()
    found = [first, *(scrubber.step() for _ in range(scrubber.num_pieces - 1))]
    return [flaw for flaw in found if flaw is not None]


# ---------------------------------------------------------------- reading the disk


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_file_is_read_as_it_is(tmp_path: Path, size: int, is_direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_direct:
        monkeypatch.setattr(disk_module.os, "O_DIRECT", 0)
    path = tmp_path / "file"
    path.write_bytes(data := random.Random(size).randbytes(size))
    with DiskReader(path) as reader:
        assert reader.size_bytes == size
        assert b"".join(bytes(part) for part in reader.read(0, size)) == data
        assert reader.digest(0, size) == digest_bytes(data)
        assert reader.digest(0, size + 10) == digest_bytes(data), "the file's end is the end"
        assert reader.digest(4096, size) == digest_bytes(data[4096:])
        assert b"".join(bytes(part) for part in reader.read(0, min(size, 5000))) == data[:5000]


def test_a_file_system_that_opens_so_and_does_not_read_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    read, asked = os.preadv, [0]

    def refuses_once(fd: int, buffers: list[mmap.mmap], offset: int) -> int:
        asked[0] += 1
        if asked[0] == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(fd, buffers, offset)

    monkeypatch.setattr(disk_module.os, "preadv", refuses_once)
    with DiskReader(path) as reader:
        is_direct_at_first = reader.is_direct
        assert reader.digest(0, 5000) == digest_bytes(b"x" * 5000)
        assert not (is_direct_at_first and reader.is_direct)


def resident_bytes(path: Path) -> int:
    """How much of a file the kernel has in memory (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_the_disk_is_read_and_not_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_bytes(path)
    with DiskReader(path) as reader:
        reader.digest(0, 8 << 20)
        if not reader.is_direct:
            pytest.skip("this file system reads no file past memory")
    assert resident_bytes(path) <= before, "what went through memory would be there now"


@pytest.fixture
def own_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system of its own, and the file that is its disk."""
    image, mounted = tmp_path / "disk.img", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    mounted.mkdir()
    made = subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=False, capture_output=True)
    ran = subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=False, capture_output=True)
    if made.returncode or ran.returncode:
        pytest.skip("nobody may mount a disk here")
    try:
        yield mounted, image
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.soak
def test_a_bit_that_flips_under_what_memory_has_is_found_and_mended_from_memory(
    own_disk: tuple[Path, Path], tmp_path: Path
) -> None:
    mounted, image = own_disk
    store = ModelStore(mounted / "store")
    model = add_model(store, "tiny", write_gguf(tmp_path / "big.gguf", num_rows=NUM_ROWS, fill=b"\x37"))
    os.sync()
    data, piece = model.weights.read_bytes(), pieces_of(store.blobs, weights_of(store, model))[1]
    at = image.read_bytes().index(b"\x37" * CHUNK_BYTES) + CHUNK_BYTES // 2
    flip(image, at)
    assert model.weights.read_bytes() == data, "memory still has it"
    (flaw,) = all_flaws(store)
    assert flaw.piece.blob == piece.blob
    assert repair(store, weights_of(store, model), [MemorySource(store.blobs)], QUIET).sources == ["memory"]
    os.sync()
    assert image.read_bytes()[at] == 0x37
    assert store.get("tiny").digest == model.digest


# ---------------------------------------------------------------- finding damage


def test_a_sound_store_has_no_flaws(store: ModelStore, model: StoredModel) -> None:
    assert all_flaws(store) == []
    assert [flaws_of(store, part) for _, part in store.parts(model.ref)] == [(), (), ()]
    assert list(Scrubber(store).sample(100)) == []
    assert len(pieces_of(store.blobs, weights_of(store, model))) == 3


@pytest.mark.parametrize("at", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 12345])
def test_a_flipped_bit_is_found_where_it_is_and_the_model_is_not_opened(
    store: ModelStore, model: StoredModel, at: int
) -> None:
    flip(model.weights, at)
    (flaw,) = all_flaws(store)
    assert flaw.piece.start <= at < flaw.piece.stop
    assert flaw.piece.stop - flaw.piece.start <= CHUNK_BYTES
    assert list(store.quarantined()) == [model.files[0].digest]
    with pytest.raises(Quarantined, match="not those that came"):
        store.get("tiny")
    assert [bad.ref for bad in store.damaged()] == [model.ref]
    assert all_flaws(store) == [], "what is known is not read again"


def test_both_the_whole_and_the_sample_find_it(store: ModelStore, model: StoredModel) -> None:
    flip(model.weights, 5)
    assert [flaw.piece.start for flaw in flaws_of(store, weights_of(store, model))] == [0]
    store.release(model.files[0].digest)
    assert [flaw.piece.start for flaw in Scrubber(store).sample(3)] == [0]


@pytest.mark.parametrize("name", ["manifest", "config"])
def test_documents_are_looked_at_too(store: ModelStore, model: StoredModel, name: str) -> None:
    part = dict(store.parts(model.ref))[name]
    flip(store.blobs.path(part.digest), 20)
    assert [flaw.piece.blob for flaw in Scrubber(store).sample(0)] == [part.digest]
    assert part.digest in store.quarantined()


def test_cut_and_missing_files_are_found(store: ModelStore, model: StoredModel) -> None:
    os.truncate(model.weights, 5_000_000)
    assert "5,000,000 bytes instead of" in all_flaws(store)[0].problem
    store.release(model.files[0].digest)
    model.weights.unlink()
    assert all_flaws(store)[0].problem == "it is missing"


def test_what_reads_right_the_second_time_is_not_damaged(
    store: ModelStore, model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = os.preadv, [0]

    def errs_once(fd: int, buffers: list[mmap.mmap], offset: int) -> int:
        done = read(fd, buffers, offset)
        asked[0] += 1
        if asked[0] == 1:
            buffers[0][7] ^= 1
        return done

    monkeypatch.setattr(disk_module.os, "preadv", errs_once)
    piece = pieces_of(store.blobs, weights_of(store, model))[0]
    assert check(store.blobs, piece) is None
    assert not store.quarantined()


def test_a_disk_that_refuses_to_read_is_a_flaw(
    store: ModelStore, model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, buffers: list[mmap.mmap], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk_module.os, "preadv", refuses)
    flaw = check(store.blobs, pieces_of(store.blobs, weights_of(store, model))[1])
    assert flaw is not None
    assert "cannot be read (Input/output error)" in flaw.problem


def test_a_round_reads_each_piece_once_and_goes_on_after_a_restart(
    store: ModelStore, model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Piece] = []
    real = check

    def noted(blobs: object, piece: Piece, **more: object) -> Flaw | None:
        seen.append(piece)
        return real(store.blobs, piece)

    monkeypatch.setattr(scrub, "check", noted)
    monkeypatch.setattr(scrub, "_SAVE_EVERY", 1)
    first = Scrubber(store)
    first.step()
    first.step()
    assert first.num_pieces == 5
    second = Scrubber(store)
    for _ in range(3):
        second.step()
    assert len(seen) == len(set(seen)) == 5
    second.step()
    assert seen[5] == seen[0], "the next round begins"
    (store.root / scrub.STATE_NAME).write_bytes(b"{")
    Scrubber(store).step()
    assert seen[6] == seen[0], "a damaged note costs a round begun anew"


def test_a_model_that_was_removed_meanwhile_is_no_damage(store: ModelStore, model: StoredModel) -> None:
    scrubber = Scrubber(store)
    scrubber.step()
    store.remove("tiny")
    store.collect()
    assert [scrubber.step() for _ in range(scrubber.num_pieces - 1)] == [None] * (scrubber.num_pieces - 1)
    assert not store.quarantined()
    assert scrubber.step() is None


def test_a_version_that_only_a_slot_has_is_read_too(store: ModelStore, model: StoredModel) -> None:
    store.write_slots(lambda _: {"chat": Slot(current=model.digest, names={model.digest: str(model.ref)})})
    store.remove(model.ref)
    assert weights_of(store, model).digest == model.files[0].digest
    assert names_with(store, model.files[0].digest) == [str(model.ref)]
    flip(store.blobs.path(model.files[0].digest), 100)
    assert [flaw.piece.blob for flaw in Scrubber(store).sample(10_000)] == [model.files[0].digest]


def test_a_lost_list_of_chunks_is_made_again(store: ModelStore, model: StoredModel) -> None:
    shutil.rmtree(store.root / "chunks")
    part = weights_of(store, model)
    assert [piece.is_whole for piece in pieces_of(store.blobs, part)] == [True]
    assert all_flaws(store) == []
    assert len(pieces_of(store.blobs, part)) == 3


def test_reading_stops_when_it_is_told_to(store: ModelStore, model: StoredModel) -> None:
    def stop() -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        Scrubber(store, before_read=stop).step()


# ---------------------------------------------------------------- mending


@pytest.fixture
def twin(made: Path, tmp_path: Path) -> Path:
    """Another layout with the same model, of other files."""
    return shutil.copytree(made, tmp_path / "twin")


@pytest.mark.parametrize(
    "spots", [[3], [CHUNK_BYTES], [2 * CHUNK_BYTES + 1], [0, 2 * CHUNK_BYTES + 9], [7, CHUNK_BYTES - 1]]
)
def test_only_what_is_wrong_is_mended_in_its_place(
    store: ModelStore, model: StoredModel, twin: Path, spots: list[int]
) -> None:
    data, inode = model.weights.read_bytes(), model.weights.stat().st_ino
    for at in spots:
        flip(model.weights, at)
    flaws = flaws_of(store, weights_of(store, model))
    done = repair(store, weights_of(store, model), [LayoutSource(twin)], QUIET)
    assert done.num_pieces == len(flaws) == len({at // CHUNK_BYTES for at in spots})
    assert done.mended_bytes <= len(flaws) * CHUNK_BYTES
    assert model.weights.read_bytes() == data
    assert model.weights.stat().st_ino == inode, "an engine that has it mapped reads the right bytes"
    assert not store.quarantined()
    assert store.get("tiny").digest == model.digest
    assert all(found.is_good for found in store.verify("tiny"))


@pytest.mark.parametrize("size", [0, 100, CHUNK_BYTES, CHUNK_BYTES + 1, 9_000_000, 20_000_000])
def test_files_of_another_length_are_mended(store: ModelStore, model: StoredModel, twin: Path, size: int) -> None:
    data = model.weights.read_bytes()
    os.truncate(model.weights, size)
    repair(store, weights_of(store, model), [LayoutSource(twin)], QUIET)
    assert model.weights.read_bytes() == data


@pytest.mark.parametrize("name", ["manifest", "config"])
def test_documents_are_mended(store: ModelStore, model: StoredModel, twin: Path, name: str) -> None:
    part = dict(store.parts(model.ref))[name]
    flip(store.blobs.path(part.digest), 20)
    flaws_of(store, part)
    repair(store, part, [LayoutSource(twin)], QUIET)
    assert store.get("tiny").digest == model.digest


def test_what_reads_right_again_is_let_out(store: ModelStore, model: StoredModel) -> None:
    store.quarantine(model.files[0].digest, "somebody said so")
    assert repair(store, weights_of(store, model), [], QUIET).num_pieces == 0
    assert store.get("tiny").digest == model.digest


@dataclass(frozen=True)
class Backup:
    """All bytes of a file, in the test's own memory."""

    data: bytes
    name: str = "backup"

    def fetch(self, piece: Piece, control: Control) -> bytes:
        return self.data[piece.start : piece.stop]


def test_sources_are_asked_in_turn_until_one_is_right(
    store: ModelStore, model: StoredModel, twin: Path, tmp_path: Path
) -> None:
    data = model.weights.read_bytes()
    flip(ModelStore(twin).get("tiny").weights, 9)
    flip(model.weights, 9)
    sources: list[Source] = [
        MemorySource(store.blobs), LayoutSource(tmp_path / "nowhere"), LayoutSource(twin), Backup(data),
    ]  # fmt: skip
    done = repair(store, weights_of(store, model), sources, QUIET)
    assert done.sources == ["backup"]
    assert model.weights.read_bytes() == data


def test_without_a_source_it_stays_quarantined_and_says_why(store: ModelStore, model: StoredModel, twin: Path) -> None:
    flip(model.weights, 9)
    flip(ModelStore(twin).get("tiny").weights, 9)
    flaws_of(store, weights_of(store, model))
    with pytest.raises(NotRepaired) as refused:
        repair(store, weights_of(store, model), [MemorySource(store.blobs), LayoutSource(twin)], QUIET)
    assert "bytes 0 to 4,194,304 are not to be had: memory has other bytes" in str(refused.value)
    with pytest.raises(NotRepaired, match="there is nobody to ask"):
        repair(store, weights_of(store, model), [], QUIET)
    assert store.quarantined()
    shutil.rmtree(store.root / "chunks")
    with pytest.raises(NotRepaired, match="no digests of its parts"):
        repair(store, weights_of(store, model), [LayoutSource(twin)], QUIET)
    model.weights.unlink()
    with pytest.raises(NotRepaired, match="it is missing"):
        repair(store, weights_of(store, model), [LayoutSource(twin)], QUIET)
    assert list(store.blobs.ingest_dir.iterdir()) == []


class FailingDisk(NoSync):
    """Takes what is written and keeps something else."""

    @override
    def write_at(self, file: FileIO, start: int, data: bytes) -> None:
        super().write_at(file, start, data[:-1] + bytes([data[-1] ^ 1]))


def test_a_disk_that_does_not_keep_what_is_written_is_told(tmp_path: Path, model: StoredModel, twin: Path) -> None:
    store = ModelStore(tmp_path / "store", files=FailingDisk())  # the same directory
    flip(model.weights, 9)
    flaws_of(store, weights_of(store, model))
    with pytest.raises(NotRepaired, match="the disk fails"):
        repair(store, weights_of(store, model), [LayoutSource(twin)], QUIET)
    assert store.quarantined()


def test_death_at_any_step_of_a_repair_leaves_it_quarantined_or_mended(
    store: ModelStore, model: StoredModel, twin: Path
) -> None:
    part, died = weights_of(store, model), 0
    for die_before in range(100):
        flip(model.weights, 2 * CHUNK_BYTES + 9)
        flaws_of(store, part)
        dying = ModelStore(store.root, files=KillingFileOps(die_before))
        try:
            repair(dying, part, [LayoutSource(twin)], QUIET)
        except Killed:
            died += 1
        else:
            break
        if store.quarantined():
            with pytest.raises(Quarantined):
                store.get("tiny")
            repair(store, part, [LayoutSource(twin)], QUIET)
        assert store.get("tiny").digest == model.digest
        assert store.blobs.has_sound(part.digest)
    assert died >= 8
    assert store.blobs.has_sound(part.digest)


def test_a_power_cut_in_a_repair_leaves_it_quarantined_or_mended(
    store: ModelStore, model: StoredModel, twin: Path, tmp_path: Path
) -> None:
    part, rng = weights_of(store, model), random.Random(5)
    flip(model.weights, 9)
    flaws_of(store, part)
    disk, recording = Disk.holding(store.root), RecordingFileOps(store.root)
    repair(ModelStore(store.root, files=recording), part, [LayoutSource(twin)], QUIET)
    num_mended = 0
    for number, files in enumerate(cuts(disk, recording.changes, rng, per_step=2)):
        root = tmp_path / f"cut{number}"
        restore(files, old_root=store.root, new_root=root)
        after = ModelStore(root)
        if not after.quarantined():
            num_mended += 1
        else:
            repair(after, part, [LayoutSource(twin)], QUIET)
        assert after.get("tiny").digest == model.digest
        assert after.blobs.has_sound(part.digest)
        shutil.rmtree(root)
    assert num_mended


# ---------------------------------------------------------------- from elsewhere


def served(data: bytes) -> dict[str, ServedFile]:
    return {"/m.gguf": ServedFile(data)}


def test_a_part_of_a_web_servers_file_is_enough(store: ModelStore, model: StoredModel) -> None:
    data = model.weights.read_bytes()
    flip(model.weights, CHUNK_BYTES + 9)
    flaws_of(store, weights_of(store, model))
    with serve(served(data)) as server:
        source = named_source(f"{server.url}/m.gguf", store, "tiny", Network())
        done = repair(store, weights_of(store, model), [source], QUIET)
        assert server.total_sent() == done.mended_bytes == CHUNK_BYTES
        assert [asked.headers["Range"] for asked in server.asked] == [f"bytes={CHUNK_BYTES}-{2 * CHUNK_BYTES - 1}"]
    assert model.weights.read_bytes() == data


def test_a_broken_connection_is_gone_on_from(store: ModelStore, model: StoredModel) -> None:
    data = model.weights.read_bytes()
    flip(model.weights, 9)
    with serve(served(data)) as server:
        server.files["/m.gguf"].drop_after = [1_000_000, 1_000_000]
        repair(store, weights_of(store, model), [named_source(f"{server.url}/m.gguf", store, "tiny", Network())], QUIET)
        assert server.total_sent() <= CHUNK_BYTES + (1 << 20)
    assert model.weights.read_bytes() == data


OTHER_SERVERS: list[tuple[Callable[[bytes], ServedFile], str]] = [
    (lambda data: ServedFile(data, has_ranges=False), "gives no parts"),
    (lambda data: ServedFile(data + b"x"), "is another file now"),
    (lambda data: ServedFile(bytes(len(data))), "has other bytes"),
    (lambda data: ServedFile(data, lie_about_range=True), "is another file now"),
    (lambda data: ServedFile(data, status=404), "404"),
]


@pytest.mark.parametrize(("other", "reason"), OTHER_SERVERS)
def test_servers_that_have_it_not(
    store: ModelStore, model: StoredModel, other: Callable[[bytes], ServedFile], reason: str
) -> None:
    file = other(model.weights.read_bytes())
    flip(model.weights, CHUNK_BYTES)
    with serve({"/m.gguf": file}) as server:
        source = named_source(f"{server.url}/m.gguf", store, "tiny", Network())
        with pytest.raises(NotRepaired, match=reason):
            repair(store, weights_of(store, model), [source], QUIET)
        assert server.total_sent() <= 2 * CHUNK_BYTES


def test_a_bundle_and_a_copy_of_the_file_are_enough(store: ModelStore, model: StoredModel, tmp_path: Path) -> None:
    data, bundle, copied = model.weights.read_bytes(), tmp_path / "stick.tar", tmp_path / "copy.gguf"
    export(store, plan_export(store, ["tiny"], bundle))
    copied.write_bytes(data)
    for path in (bundle, copied):
        flip(model.weights, CHUNK_BYTES + 9)
        flaws_of(store, weights_of(store, model))
        source = named_source(str(path), store, "tiny", Network())
        assert repair(store, weights_of(store, model), [source], QUIET).sources == [str(path)]
        assert model.weights.read_bytes() == data


def test_where_to_ask_follows_from_the_settings_and_the_model(
    store: ModelStore, model: StoredModel, twin: Path
) -> None:
    settings = Settings(home=store.root.parent, seed=twin, peers="10.0.0.7:8080, boat.lan")
    names = [source.name for source in sources_for(settings, store, ["tiny"])]
    assert names == ["memory", str(twin), "oci://10.0.0.7:8080/tiny", "oci://boat.lan/tiny"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("oci://10.0.0.7:8080", "oci://10.0.0.7:8080/tiny"),
        ("http://10.0.0.7:8080/", "oci://10.0.0.7:8080/tiny"),
        ("oci://r.example/a/b", "oci://r.example/a/b"),
        ("hf://a/b/c.gguf", "hf://a/b/c.gguf"),
    ],
)
def test_sources_have_names(store: ModelStore, model: StoredModel, text: str, name: str) -> None:
    assert named_source(text, store, "tiny", Network()).name == name


def test_places_that_give_no_parts_are_refused(store: ModelStore, model: StoredModel, tmp_path: Path) -> None:
    for text in ("pypi://a==1/b.gguf", "ftp://a/b", str(tmp_path / "none")):
        with pytest.raises(EdgeError):
            named_source(text, store, "tiny", Network())
    with pytest.raises(InvalidReference, match="packed"):
        named_source("pypi://a==1/b.gguf", store, "tiny", Network())
