"""What the store gives and takes: files of a package, models, and what was found about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge.errors import InvalidModelFile, StoreError, UnsupportedFormat
from edge.kinds import CAPABILITIES, ModelKind

from .details import ModelDetails, details_from
from .digest import Digest
from .manifest import WEIGHT_TYPE, Manifest, ModelConfig, ModelRef, decode
from .side_files import read_document

REPORT_NAME = "report.json"


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file that goes into a package."""

    path: Path
    """Where the bytes are now."""
    name: str
    """The file's relative path inside the package."""
    media_type: str = ""
    """Chosen by the name where it is empty: weights for GGUF and safetensors, else a document."""
    move: bool = False
    """The file may be renamed away, which saves copying it where it lies on the store's file system."""
    digest: Digest | None = None
    """The digest of its synced bytes, where they were hashed already; then they are not read again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a stored model; `path` is the blob."""

    name: str
    path: Path
    digest: Digest
    size_bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What `verify` found about one blob."""

    name: str
    path: Path
    size_bytes: int
    expected: Digest
    actual: Digest | None
    """None where the file is missing."""

    @property
    def is_good(self) -> bool:
        return self.actual == self.expected


@dataclass(frozen=True, slots=True)
class DamagedModel:
    """A reference whose model cannot be used, and why."""

    ref: ModelRef
    reason: str
    error: InvalidModelFile | StoreError


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` did."""

    num_blobs: int
    freed_bytes: int
    blocked_by: tuple[str, ...] = ()
    """References whose manifest cannot be read: while there are any, no blob is removed, for one may be theirs."""


@dataclass(frozen=True)
class StoredModel:
    """One model of the store; its files are there with the right sizes."""

    ref: ModelRef
    digest: Digest
    """Of the manifest."""
    manifest: Manifest
    config: ModelConfig
    files: tuple[StoredFile, ...]
    created: float
    """Unix time at which it came into this store."""

    @cached_property
    def details(self) -> ModelDetails:
        return details_from(self.manifest, self.config)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def weights(self) -> Path:
        """The one weight file beside a projector, in ``blobs/``.

        Raises:
            UnsupportedFormat: The model has none, or several.
        """
        weights = [file for file in self.files if file.media_type == WEIGHT_TYPE]
        paths = [file.path for file in weights if file.name != self.details.projector]
        if len(paths) != 1:
            raise UnsupportedFormat(f"The model '{self.ref}' has {len(paths)} weight files; one is supported.")
        return paths[0]

    @property
    def projector(self) -> Path | None:
        """What makes images readable for the model, in ``blobs/``; None where it reads text only."""
        name = self.details.projector
        return next((file.path for file in self.files if file.name == name), None) if name else None

    @property
    def capabilities(self) -> Sequence[str]:
        """What it does, in the words that Ollama has for it."""
        return CAPABILITIES[self.kind] + (["vision"] if self.projector else [])

    @property
    def kind(self) -> ModelKind:
        """What it is for."""
        return self.details.kind

    @property
    def is_adapter(self) -> bool:
        """Whether it changes a model instead of being one."""
        return self.kind == "adapter"

    @property
    def architecture(self) -> str | None:
        return self.details.architecture

    @property
    def quantization(self) -> str | None:
        return self.details.quantization

    @property
    def num_parameters(self) -> int | None:
        return self.details.num_parameters

    @property
    def context_tokens(self) -> int | None:
        return self.details.context_tokens

    @property
    def license(self) -> str | None:
        return self.details.license

    @property
    def source(self) -> str | None:
        return self.details.source

    @cached_property
    def report(self) -> dict[str, object] | None:
        """The quality report that came with the model; None where there is none.

        Raises:
            InvalidModelFile: It is not a JSON object.
        """
        file = next((file for file in self.files if file.name == REPORT_NAME), None)
        if file is None:
            return None
        return decode(read_document(file.path), dict[str, object], what=f"{REPORT_NAME} of {self.ref}")
