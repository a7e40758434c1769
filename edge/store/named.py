"""A model's files under their own names, for formats that find files by name.

onnxruntime refuses external data behind a symbolic link that leads out of the model's directory, and llama.cpp finds
the parts of a split GGUF beside the first: so the names are hard links to the blobs, ``named/<hex>/`` of the store.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edge.errors import StoreError

from .digest import Digest
from .files import FileOps


def link_named(directory: Path, files: Sequence[tuple[str, Path, Digest]], ops: FileOps) -> Path:
    """Make the directory hold these files, by name. Hold the store's lock.

    Args:
        files: Relative path inside the package, blob, digest.

    Raises:
        StoreError: The file system has no hard links, or cannot be written.
    """
    for name, blob, digest in files:
        target = directory / name
        if _is_link_to(target, blob):
            continue
        ops.make_dir(target.parent)
        temporary = directory / f".{digest.hex[:32]}.link"
        ops.remove(temporary)
        if not ops.link(blob, temporary):
            raise StoreError(
                f"The file system of {directory} has no hard links, which a model of several files needs.",
                hint="Put EDGE_HOME on ext4, xfs, btrfs or f2fs.",
            )
        ops.rename(temporary, target)
    return directory


def _is_link_to(target: Path, blob: Path) -> bool:
    try:
        return os.path.samestat(target.stat(follow_symlinks=False), blob.stat())
    except FileNotFoundError:
        return False
