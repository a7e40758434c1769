"""LoRA adapters that people have as PEFT saved them: into the store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from edge.formats.gguf import read_gguf
from edge.formats.lora import check_fits, read_lora
from edge.store.details import details_of
from edge.store.fetch import derived_ref
from edge.store.manifest import WEIGHT_TYPE
from edge.store.models import ModelStore, PackageFile, StoredModel


def is_adapter_directory(path: Path) -> bool:
    """Whether a directory holds an adapter as PEFT saves it."""
    return (path / "adapter_config.json").is_file()


def add_adapter(store: ModelStore, directory: Path, *, base: str | None, name: str | None) -> StoredModel:
    """Convert an adapter's directory and put it into the store.

    Args:
        base: The model it was trained for, which says how its heads are laid out.
        name: The adapter's name; by default the directory's.

    Raises:
        UsageError: `base` is missing.
        EdgeError: The base is not in the store, or the adapter cannot be converted for it.
    """
    from quantize.gguf.lora import convert_lora  # numpy and gguf, which a pull has no need of

    if not base:
        raise click.UsageError(f"{directory} is a LoRA adapter: name the model it was trained for with --base MODEL.")
    model = store.get(base)
    with tempfile.TemporaryDirectory(prefix="edge-adapter-") as work:
        target, label = Path(work) / "adapter.gguf", directory.absolute().name
        header = read_gguf(model.weights, what=str(model.ref))
        convert_lora(directory, header, target, base_name=f"{model.ref} ({model.digest})")
        check_fits(read_lora(read_gguf(target)), header, what=label, base_name=str(model.ref))
        ref = name or derived_ref(label, "latest")
        details = details_of(read_gguf(target), source=str(directory.absolute()))
        return store.add(ref, [PackageFile(target, "adapter.gguf", WEIGHT_TYPE)], details)
