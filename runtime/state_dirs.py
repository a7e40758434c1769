"""Where saved states of models lie, for who only removes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker has no use for the store
    from edge.store.models import ModelStore, StoredModel


def states_root(home: Path) -> Path:
    """The directory of all models' states."""
    return home / "states"


def directories_of(root: Path, weights_digest: str) -> Iterator[Path]:
    """Those of one model's weights: of this build, and of others."""
    return root.glob(f"{weights_digest[:16]}-*")


def remove_states(home: Path, removed: Iterable[StoredModel], store: ModelStore) -> None:
    """Remove the states of models that left the store, but for weights that another model there has too."""
    kept = {file.path.name for model in store.list() for file in model.files}
    _remove(home, {file.path.name for model in removed for file in model.files} - kept)


def forget_states(home: Path, models: Iterable[StoredModel]) -> None:
    """Remove the states of models, which stay: they may have been computed with wrong weights."""
    _remove(home, {file.path.name for model in models for file in model.files})


def _remove(home: Path, digests: Iterable[str]) -> None:
    for digest in digests:
        for directory in directories_of(states_root(home), digest):
            shutil.rmtree(directory, ignore_errors=True)
