"""Models made of others, second names, and blobs that are sent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typing_extensions import override

from edge.errors import DigestMismatch, DiskFull, InvalidReference, ModelNotFound, QueueFull
from edge.store.derived import Changes, derive, parts_of
from edge.store.details import TENSOR_TYPES, Sampling
from edge.store.digest import Digest, digest_bytes
from edge.store.fetch import package_of
from edge.store.files import FileOps
from edge.store.models import ModelStore
from edge.store.uploads import receiving
from tests.edge.store_support import add_model, assert_sound, write_gguf


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    add_model(store, "base:1", write_gguf(tmp_path / "base.gguf"))
    return store


def test_a_derived_model_has_the_same_weights_and_its_own_words(store: ModelStore) -> None:
    base = store.get("base:1")
    text = "You answer\nbriefly, \x1b[1m and in \U0001f99c."
    sampling = Sampling(temperature=0.5, stop=("\n\n", "END"), max_tokens=7, seed=3)
    made = derive(store, "made", *parts_of(base), Changes(system=text, template="{{ messages }}", sampling=sampling))
    details = ModelStore(store.root).get("made").details
    assert made.weights == base.weights
    assert (details.system, details.template, details.sampling) == (text, "{{ messages }}", sampling)
    assert made.manifest.annotations[TENSOR_TYPES] == base.manifest.annotations[TENSOR_TYPES]
    again = derive(store, "again", *parts_of(made), Changes(sampling=Sampling(temperature=0.9)))
    assert again.details.system == text, "what is not changed stays"
    assert (again.details.sampling.temperature, again.details.sampling.stop) == (0.9, ("\n\n", "END"))
    store.remove("base:1")
    store.remove("made")
    store.collect()
    assert [str(m.ref) for m in assert_sound(store.root)] == ["again:latest"]


def test_a_second_name(store: ModelStore) -> None:
    copy = store.copy("base", "other/name:2")
    assert copy.digest == store.get("base:1").digest
    store.remove("base:1")
    store.collect()
    assert [str(m.ref) for m in assert_sound(store.root)] == ["other/name:2"]
    with pytest.raises(ModelNotFound):
        store.copy("base", "x")
    with pytest.raises(InvalidReference):
        store.copy("other/name:2", "../x")


def send(store: ModelStore, data: bytes, digest: Digest, *, piece_bytes: int = 100) -> None:
    with receiving(store, digest) as upload:
        for at in range(0, len(data), piece_bytes):
            upload.write(data[at : at + piece_bytes])
        upload.finish()


def test_a_blob_that_is_sent_becomes_a_model(store: ModelStore, tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "new.gguf", fill=b"\x02").read_bytes()
    digest = digest_bytes(data)
    with pytest.raises(InvalidReference, match="no blob"):
        package_of(store, digest, "new.gguf")
    send(store, data, digest)
    file, details = package_of(store, digest, "../../new model")
    made = derive(store, "new", [file], details, Changes())
    assert made.files[0].name == "_.._new_model.gguf"
    assert_sound(store.root)


@pytest.mark.parametrize("sent", [b"", b"other", b"x" * 1001])
def test_other_bytes_are_refused_and_gone(store: ModelStore, sent: bytes) -> None:
    digest = Digest(f"sha256:{hashlib.sha256(b'x' * 1000).hexdigest()}")
    with pytest.raises(DigestMismatch):
        send(store, sent, digest)
    assert not store.blobs.has(digest)
    assert not list(store.blobs.ingest_dir.iterdir())


def test_one_that_breaks_off_leaves_nothing(store: ModelStore) -> None:
    data = b"x" * 1000

    def break_off() -> None:
        with receiving(store, digest_bytes(data)) as upload:
            upload.write(data[:500])
            raise ConnectionError

    with pytest.raises(ConnectionError):
        break_off()
    assert not list(store.blobs.ingest_dir.iterdir())
    send(store, data, digest_bytes(data))
    assert store.blobs.has_sound(digest_bytes(data))


def test_the_same_blob_twice_at_a_time(store: ModelStore) -> None:
    digest = digest_bytes(b"x")
    with receiving(store, digest), pytest.raises(QueueFull), receiving(store, digest):
        pass


class _Full(FileOps):
    @override
    def free_bytes(self, path: Path) -> int:
        return 1 << 20


def test_a_full_disk_takes_nothing(store: ModelStore) -> None:
    full = ModelStore(store.root, files=_Full())
    with pytest.raises(DiskFull):
        send(full, b"x" * 1000, digest_bytes(b"x" * 1000))
    assert not list(store.blobs.ingest_dir.iterdir())
