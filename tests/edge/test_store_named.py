"""Directories in which a model's files have their names, for formats that find files by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import StoreError
from edge.store.details import ModelDetails
from edge.store.models import ModelStore, PackageFile, StoredModel
from tests.edge.store_support import NoLinks


def add_files(store: ModelStore, **texts: str) -> StoredModel:
    files: list[PackageFile] = []
    for name, text in texts.items():
        path = store.root.parent / name
        path.write_text(text)
        files.append(PackageFile(path, f"onnx/{name}" if name == "weights" else name))
    return store.add("model", files, ModelDetails())


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_the_names_are_links_to_the_blobs(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    model = add_files(store, graph="graph", weights="weights", copy_of_weights="weights")
    directory = store.named_directory(model)
    assert contents(directory) == {"graph": "graph", "onnx/weights": "weights", "copy_of_weights": "weights"}
    assert all((directory / file.name).samefile(file.path) for file in model.files)
    assert not any(path.is_symlink() for path in directory.rglob("*"))


def test_what_was_changed_is_put_right(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    model = add_files(store, graph="graph", weights="weights")
    directory = store.named_directory(model)
    (directory / "graph").unlink()
    (directory / "onnx" / "weights").unlink()
    (directory / "onnx" / "weights").symlink_to("/etc/passwd")
    before = store.named_directory(model)
    assert contents(before) == {"graph": "graph", "onnx/weights": "weights"}
    assert not (directory / "onnx" / "weights").is_symlink()


def test_a_mended_blob_is_linked_anew(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    model = add_files(store, graph="graph", weights="weights")
    directory = store.named_directory(model)
    with store.blobs.ingest("again") as partial:
        partial.write(b"weights")
        store.keep(partial.complete())
        partial.discard()
    assert not (directory / "onnx" / "weights").samefile(model.files[1].path)
    assert (store.named_directory(model) / "onnx" / "weights").samefile(model.files[1].path)


def test_the_directory_goes_with_the_model(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    model = add_files(store, graph="graph", weights="weights")
    directory = store.named_directory(model)
    store.remove("model")
    with store.lease(model.digest):
        store.collect()
        assert contents(directory) == {"graph": "graph", "onnx/weights": "weights"}
    store.collect()
    assert not directory.exists()
    assert list(store.blobs.digests()) == []
    with pytest.raises(StoreError):
        store.named_directory(model)


def test_without_hard_links_it_says_what_to_do(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store", files=NoLinks())
    with pytest.raises(StoreError, match=r"has no hard links.*Put EDGE_HOME on ext4"):
        store.named_directory(add_files(store, graph="graph"))
