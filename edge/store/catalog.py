"""The models known by name: where each comes from, pinned by digest."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources

import msgspec

from .details import Sampling
from .digest import Digest
from .manifest import ModelRef


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the catalog."""

    description: str
    source: str
    """As `edge pull` accepts it."""
    sha256: str
    """Of the model file, 64 hexadecimal digits."""
    size_bytes: int
    license: str
    """SPDX expression of the weights' licence."""
    container_sha256: str | None = None
    """Of the package that the file lies in, where there is one."""
    container_size_bytes: int = 0
    title: str = ""
    """Of a checkpoint directory, which is converted on the way: what the model is called. `sha256` and `size_bytes`
    are those of the GGUF that this makes."""
    sampling: Sampling = Sampling()

    @property
    def digest(self) -> Digest:
        return Digest.parse(self.sha256)

    @property
    def container_digest(self) -> Digest | None:
        return Digest.parse(self.container_sha256) if self.container_sha256 else None


@cache
def catalog() -> Mapping[ModelRef, CatalogEntry]:
    """Every model of the catalog, by name."""
    table = tomllib.loads(resources.files(__package__ or "edge.store").joinpath("catalog.toml").read_text("utf-8"))
    entries = msgspec.convert(table["models"], dict[str, CatalogEntry])
    return {ModelRef.parse(name): entry for name, entry in entries.items()}
