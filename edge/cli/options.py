"""Options and completions that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edge.cli.main import settings_from
from edge.errors import EdgeError
from edge.store.models import ModelStore

_F = TypeVar("_F", bound=Callable[..., Any])


def store_option(command: _F) -> _F:
    """``--store DIR``: another layout directory than the appliance's."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("--store", "store_dir", type=kind, help="Another store: any OCI layout directory.")(command)


def json_option(command: _F) -> _F:
    """``--json``: data for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def open_store(store_dir: Path | None) -> ModelStore:
    """The store that a command works on: the appliance's, filled from the seed, or the one that was named as it is."""
    if store_dir:
        return ModelStore(store_dir.absolute())
    settings = settings_from()
    return ModelStore(settings.store_dir, seed=settings.seed)


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: the models of the store."""
    try:
        store = open_store(ctx.params.get("store_dir"))
        return [str(model.ref) for model in store.list() if str(model.ref).startswith(incomplete)]
    except EdgeError:
        return []  # a shell that completes has no place for an error


def human_size(size_bytes: float) -> str:
    """A size for people, in powers of 1000 as disks are sold: ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
