"""Checkpoint directories that become one GGUF on their way into the store.

Converting needs the toolchain, which lies above the store: whoever pulls hands the converter in. Devices have none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge.errors import MissingExtra

from .blobs import BlobStore, Partial, Staged
from .transfer import Control

Converter = Callable[[Path, Path], None]
"""Writes the checkpoint in a directory as a GGUF; the directory's name is the model's title. The same input must give
the same bytes. Raises EdgeError."""

MAX_FILES = 1000


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory looks like a checkpoint."""
    return (directory / "config.json").is_file()


def convert_in(
    directory: Path, converter: Converter | None, blobs: BlobStore, partial: Partial, control: Control
) -> Staged:
    """Convert a checkpoint into the partial.

    Raises:
        MissingExtra: There is no converter here.
        EdgeError: The checkpoint cannot be converted.
    """
    if converter is None:
        raise MissingExtra("quantize", needed_for="Converting a checkpoint (edge pull, on the builder's machine)")
    control.report(0, None, f"converting {directory.name}")
    blobs.files.make_dir(partial.folder)
    target = partial.folder / "converted.gguf"
    converter(directory, target)
    return blobs.copy_in(target, partial, before_chunk=control.check)
