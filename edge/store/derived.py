"""Models made of what the store has: the same weights, asked in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from .details import QUANTIZED_FROM, TENSOR_TYPES, ModelDetails, Sampling
from .manifest import ModelRef
from .models import ModelStore, PackageFile, StoredModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What the new model has otherwise; what is empty stays as it was.

    Attributes:
        sampling: Its fields, where they are set.
    """

    system: str = ""
    template: str = ""
    license: str = ""
    sampling: Sampling = field(default_factory=Sampling)


def derive(
    store: ModelStore, ref: str | ModelRef, files: Sequence[PackageFile], details: ModelDetails, changes: Changes
) -> StoredModel:
    """Add files as a model with these details, changed. What had the name before loses it.

    Raises:
        InvalidReference, StoreError: As :meth:`ModelStore.add`.
    """
    told = {name: value for name, value in msgspec.structs.asdict(changes.sampling).items() if value is not None}
    changed = replace(
        details,
        system=changes.system or details.system,
        template=changes.template or details.template,
        license=changes.license or details.license,
        sampling=msgspec.structs.replace(details.sampling, **told),
    )
    return store.add(ref, files, changed)


def parts_of(model: StoredModel) -> tuple[list[PackageFile], ModelDetails]:
    """Files and details of a stored model, ready to be added again under another name; nothing is copied."""
    files = [PackageFile(f.path, f.name, f.media_type, digest=f.digest) for f in model.files]
    notes = {k: v for k, v in model.manifest.annotations.items() if k in (TENSOR_TYPES, QUANTIZED_FROM)}
    return files, replace(model.details, annotations=notes)
