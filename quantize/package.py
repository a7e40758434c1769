"""Quantized files and their reports into packages of the store, and the reports back out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from edge.errors import EdgeError, ModelNotFound, RecipeError
from edge.formats.gguf import read_gguf
from edge.store.details import QUANTIZED_FROM, details_of
from edge.store.digest import Digest
from edge.store.manifest import OURS, WEIGHT_TYPE, ModelRef
from edge.store.models import ModelStore, PackageFile, StoredModel

from .report import SCHEMA_VERSION, Report, Variant
from .source import Source


def matching_package(
    store: ModelStore, ref: ModelRef, key: str, *, draft: str | None, force: bool
) -> StoredModel | None:
    """The package of that name, if it was made from the same inputs.

    Raises:
        RecipeError: One of that name exists and was made from others.
    """
    if force:
        return None
    try:
        stored = store.get(ref)
    except ModelNotFound:
        return None
    found = variant_in(stored)
    if found is not None and found.key == key and stored.details.draft == draft:
        return stored
    raise RecipeError(
        f"The store has a '{ref}' already, made from something else or otherwise.",
        hint="Take another name with --name, or replace it with --force.",
    )


def report_in(stored: StoredModel) -> Report | None:
    """A package's report; None where it has none that this version reads."""
    try:
        report = msgspec.convert(stored.report, Report)
    except (msgspec.ValidationError, EdgeError):
        return None
    return report if report.schema_version == SCHEMA_VERSION else None


def variant_in(stored: StoredModel) -> Variant | None:
    """The row that a package's report has of itself."""
    report = report_in(stored)
    return next((v for v in report.variants if v.type == report.subject), None) if report else None


def write_documents(report: Report, kind: str, svg: bytes, png: bytes, directory: Path) -> list[PackageFile]:
    """Write a variant's report and the run's plot into a directory, to be packaged from there."""
    contents = {"report.json": report.about(kind).encode(), "quality.svg": svg, "quality.png": png}
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    return [PackageFile(directory / name, name) for name in contents]


def package_variant(
    store: ModelStore, ref: ModelRef, path: Path, *, source: Source, digest: Digest, documents: list[PackageFile],
    draft: str | None = None,
) -> StoredModel:  # fmt: skip
    """Put one variant into the store; its weights are moved there.

    Args:
        path: The quantized file.
        digest: Of the source.
        draft: The name of the model that shall guess for it.

    Raises:
        DiskFull: There is no room.
        StoreError: The store cannot be written.
    """
    details = details_of(
        read_gguf(path), source=source.origin, license=source.license, sampling=source.sampling, draft=draft
    )
    annotations = {
        **details.annotations,
        QUANTIZED_FROM: source.label,
        f"{OURS}quantized-from-digest": str(digest),
    }
    seeing = source.projector
    details = replace(details, annotations=annotations, projector=seeing.name if seeing else None)
    files = [PackageFile(path, f"{ref.name}-{ref.tag.upper()}.gguf", move=True), *documents]
    if seeing is not None:
        files.append(PackageFile(seeing.path, seeing.name, WEIGHT_TYPE, digest=seeing.digest))
    if source.license_file is not None:
        files.append(PackageFile(source.license_file, source.license_file.name))
    return store.add(ref, files, details)
