"""A model as a seed: the same bytes, and a store that fills itself from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import DigestMismatch, ModelNotFound
from edge.store.models import ModelStore, PackageFile
from images.seed import write_seed
from tests.edge.store_support import add_model, write_gguf


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    made = ModelStore(tmp_path / "store")
    for name in ("one", "two"):
        add_model(made, f"{name}:1", write_gguf(tmp_path / f"{name}.gguf", fill=name[:1].encode()))
    return made


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_store_fills_itself_from_a_seed_of_one_model(store: ModelStore, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    assert write_seed(store, "one", seed) == "one:1"
    filled = ModelStore(tmp_path / "device", seed=seed)
    assert [str(model.ref) for model in filled.list()] == ["one:1"]
    assert all(found.is_good for found in filled.verify("one:1"))
    assert filled.get("one:1").weights.read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_what_is_attached_is_baked_in(store: ModelStore, tmp_path: Path) -> None:
    signature = tmp_path / "model.sig"
    signature.write_bytes(b"signed")
    attached = store.attach(store.get("one:1").digest, "application/x-sig", [PackageFile(signature, "model.sig")])
    write_seed(store, "one:1", tmp_path / "seed")
    filled = ModelStore(tmp_path / "device", seed=tmp_path / "seed")
    assert filled.referrers(filled.get("one:1").digest) == [attached]
    [layer] = filled.read_referrer(attached).layers
    assert filled.blobs.path(layer.digest).read_bytes() == b"signed"


def test_the_same_model_gives_the_same_bytes(store: ModelStore, tmp_path: Path) -> None:
    write_seed(store, "one:1", tmp_path / "a")
    write_seed(store, "one:1", tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_anybody_may_read_it_and_nobody_else_write(store: ModelStore, tmp_path: Path) -> None:
    write_seed(store, "one:1", tmp_path / "seed")
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "seed").rglob("*")}
    assert modes == {0o755, 0o644}


def test_a_damaged_blob_is_not_baked(store: ModelStore, tmp_path: Path) -> None:
    weights = store.get("one:1").weights
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(DigestMismatch, match=r"model\.gguf"):
        write_seed(store, "one:1", tmp_path / "seed")


def test_a_model_that_is_not_there_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        write_seed(store, "three:1", tmp_path / "seed")
    assert not (tmp_path / "seed").exists()
