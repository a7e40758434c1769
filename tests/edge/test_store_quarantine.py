"""A blob that proved damaged: no model is opened with it until its bytes came anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import Quarantined
from edge.store.digest import digest_bytes
from edge.store.fetch import pull
from edge.store.models import ModelStore, PackageFile, StoredModel
from tests.edge.store_support import add_model, assert_sound, write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def model(store: ModelStore, gguf: Path) -> StoredModel:
    return add_model(store, "tiny", gguf)


@pytest.mark.parametrize("part", ["weights", "config", "manifest"])
def test_a_model_with_a_quarantined_blob_is_damaged(store: ModelStore, model: StoredModel, part: str) -> None:
    blobs = {"weights": model.files[0].digest, "config": model.manifest.config.digest, "manifest": model.digest}
    before = store.generation()
    store.quarantine(blobs[part], "piece 3 is not what it was.")
    assert store.generation() != before
    with pytest.raises(Quarantined, match=r"is quarantined: piece 3 is not what it was\. Mend it with: edge verify"):
        store.get("tiny")
    assert store.list() == []
    assert ["piece 3 is not what it was" in found.reason for found in ModelStore(store.root).damaged()] == [True]
    with pytest.raises(Quarantined):
        store.get_version(model.digest, model.ref)
    assert store.quarantined() == {blobs[part]: "piece 3 is not what it was."}
    store.release(blobs[part])
    store.release(digest_bytes(b"never marked"))
    assert store.list() == [model]
    assert store.quarantined() == {}


def test_pulling_again_brings_the_bytes_anew(store: ModelStore, gguf: Path) -> None:
    """Also where they read well now: the page cache may hold what the disk does not."""
    model = pull(store, str(gguf), name="tiny")
    inode = model.weights.stat().st_ino
    store.quarantine(model.files[0].digest, "bit rot")
    assert not store.has_sound(model.files[0].digest)
    assert store.blob_needs(model.manifest) == [model.manifest.layers[0]]
    pull(store, str(gguf), name="tiny")
    assert store.quarantined() == {}
    assert store.get("tiny").weights.stat().st_ino != inode
    assert_sound(store.root)


def test_documents_are_written_anew_too(store: ModelStore, model: StoredModel, gguf: Path) -> None:
    for digest in (model.digest, model.manifest.config.digest):
        store.quarantine(digest, "bit rot")
    inode = store.blobs.path(model.digest).stat().st_ino
    assert add_model(store, "tiny", gguf) == store.get("tiny")
    assert store.blobs.path(model.digest).stat().st_ino != inode
    assert store.quarantined() == {}


def test_marks_go_with_their_blobs(store: ModelStore, model: StoredModel) -> None:
    kept = add_model(store, "kept", write_gguf(store.root.parent / "kept.gguf", fill=b"\x02"))
    store.quarantine(model.files[0].digest, "bit rot")
    store.quarantine(kept.files[0].digest, "bit rot")
    store.remove("tiny")
    store.collect()
    assert store.quarantined() == {kept.files[0].digest: "bit rot"}


def test_what_is_attached_can_be_quarantined(store: ModelStore, model: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "model.sig").write_text("signed")
    signed = store.attach(model.digest, "application/x-signature", [PackageFile(tmp_path / "model.sig", "model.sig")])
    layer = store.read_referrer(signed).layers[0]
    store.quarantine(layer.digest, "bit rot")
    with pytest.raises(Quarantined):
        store.read_referrer(signed)
    assert store.list() == [model], "the model itself is sound"


@pytest.mark.parametrize("text", ["", "[]", '{"sha256:1": "x"}', "\0"])
def test_a_damaged_list_of_marks_counts_as_empty_and_says_so(
    store: ModelStore, model: StoredModel, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (store.root / "quarantine.json").write_text(text)
    assert store.list() == [model]
    assert "no blob counts as quarantined" in caplog.text
    store.quarantine(model.files[0].digest, "bit rot")
    assert store.list() == []
