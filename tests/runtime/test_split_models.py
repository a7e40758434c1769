"""A model of several files: the engine finds the parts by name, in the store's directory of hard links."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import EdgeError
from edge.store.details import ModelDetails
from edge.store.models import ModelStore, PackageFile
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from tests.runtime.tiny_models import make_tiny


def opened(path: Path) -> LlamaBackend:
    return LlamaBackend(
        path, LlamaOptions(threads=1, num_slots=1, step_tokens=16, context_tokens=64, available_bytes=1 << 30)
    )


def test_the_parts_of_a_split_gguf_are_found_beside_the_first(tmp_path: Path) -> None:
    (directory := tmp_path / "split").mkdir()
    make_tiny(directory / "tiny.gguf", "qwen2", split_tensors=10)
    parts = sorted(directory.iterdir())
    assert len(parts) > 2
    store = ModelStore(tmp_path / "store")
    model = store.add("tiny", [PackageFile(path, path.name) for path in parts], ModelDetails())
    named = store.named_directory(model)
    with pytest.raises(EdgeError):
        opened(model.files[0].path)  # its name tells of no other part
    backend = opened(named / parts[0].name)
    backend.close()
