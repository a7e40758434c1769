"""Import: models of a bundle, and what is attached to them, into the store.

A model's documents come first, and with them its signatures, so that who is not trusted is refused before the weights
are copied; its name comes last. What was copied of a file is not copied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge.errors import (
    DigestMismatch,
    EdgeError,
    InvalidModelFile,
    InvalidReference,
    ModelNotFound,
    SourceUnavailable,
    StoreError,
)

from .blobs import Partial, Staged, key_of
from .bundle import Attached, Bundle, BundledModel
from .digest import Digest
from .manifest import Descriptor, ModelRef
from .models import ModelStore, StoredModel
from .transfer import Progress, free_bytes, require_room

Admit = Callable[[ModelStore, Digest, ModelRef], object]
"""Judges a model by its manifest and what is attached to that, which the store has; raises to refuse it."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """What an import would do with one model."""

    ref: ModelRef
    """The name that it gets."""
    model: BundledModel
    missing: Sequence[Descriptor]
    """What the store lacks of it, each blob once."""
    before: Digest | None
    """The manifest that has the name now; the model's own where it is here already."""

    @property
    def is_present(self) -> bool:
        """Nothing would change."""
        return self.before == self.model.digest and not self.missing


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import would do."""

    models: Sequence[PlannedModel]
    copied_bytes: int
    free_bytes: int


def plan_import(
    store: ModelStore, bundle: Bundle, names: Sequence[str] = (), *, rename: str | None = None
) -> ImportPlan:
    """What `import_models` would do. Neither the files of the store nor those of the bundle are read through.

    Args:
        names: The models that are wanted; all where there are none.
        rename: The name that the only model gets.

    Raises:
        ModelNotFound: The bundle has none of such a name.
        InvalidReference: A model has no name in the bundle, or several would get the same.
        InvalidModelFile: There is no model in it, or a blob is in neither bundle nor store.
    """
    chosen = _chosen(bundle, names)
    if not chosen:
        raise InvalidModelFile(bundle.path.name, "there is no model in it")
    if rename and len(chosen) != 1:
        raise InvalidReference(f"{len(chosen)} models cannot all be named '{rename}'.", hint="Name one of them.")
    models = [_planned(store, bundle, model, _name_of(bundle, model, rename)) for model in chosen]
    missing = {blob.digest: blob for planned in models for blob in planned.missing}
    copied_bytes = sum(store.blobs.left_bytes(blob.digest, blob.size) for blob in missing.values())
    return ImportPlan(models, copied_bytes, free_bytes(store.blobs))


def _chosen(bundle: Bundle, names: Sequence[str]) -> Sequence[BundledModel]:
    if not names:
        return bundle.models
    known = {model.ref: model for model in bundle.models if model.ref}
    refs = [ModelRef.parse(name) for name in names]
    for ref in refs:
        if ref not in known:
            listed = ", ".join(map(str, known)) or "none with a name"
            message = f"'{ref}' is not in {bundle.path.name}."
            raise ModelNotFound(str(ref), message=message, hint=f"Models in it: {listed}.")
    return [known[ref] for ref in dict.fromkeys(refs)]


def _name_of(bundle: Bundle, model: BundledModel, rename: str | None) -> ModelRef:
    if rename:
        return ModelRef.parse(rename)
    if model.ref is None:
        message = f"{bundle.path.name} has no name for the model {model.digest}."
        raise InvalidReference(message, hint=f"Give it one: edge import {bundle.path} --name NAME")
    return model.ref


def _planned(store: ModelStore, bundle: Bundle, model: BundledModel, ref: ModelRef) -> PlannedModel:
    needs = [blob for owner in model.documents for blob in store.blob_needs(owner)]
    missing = list({blob.digest: blob for blob in needs}.values())
    bundle.check_has(missing)
    return PlannedModel(ref, model, missing, _digest_of(store, ref))


def _digest_of(store: ModelStore, ref: ModelRef) -> Digest | None:
    try:
        return store.get(ref).digest
    except (ModelNotFound, InvalidModelFile, StoreError):  # of a damaged one nothing is lost
        return None


def import_models(
    store: ModelStore,
    bundle: Bundle,
    plan: ImportPlan,
    *,
    admit: Admit = lambda store, digest, ref: None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Iterator[StoredModel]:
    """Take in the models of a plan, one after the other. What one had the name before loses it.

    Blobs of the store are hashed again, not believed: importing is also how people mend a damaged model.

    Args:
        admit: Asked before a model's files are copied.

    Raises:
        EdgeError: Of `admit`.
        DigestMismatch: What is in the bundle is not what it should be. Models before this one are in the store.
        InvalidModelFile: A file is refused, or the bundle is damaged.
        SourceUnavailable: The medium cannot be read; what was copied is kept.
        DiskFull: It does not fit on the disk.
        StoreError: The store cannot be written.
    """
    require_room(store.blobs, plan.copied_bytes)
    for planned in plan.models:
        yield _import(store, bundle, planned, admit, progress)


def _import(
    store: ModelStore, bundle: Bundle, planned: PlannedModel, admit: Admit, progress: Callable[[Progress], None]
) -> StoredModel:
    try:
        return _brought_in(store, bundle, planned, admit, progress)
    except EdgeError as e:
        if not isinstance(e, (SourceUnavailable, StoreError)):
            store.collect()  # what is refused does not stay on the disk; what may go on later does
        raise


def _brought_in(
    store: ModelStore, bundle: Bundle, planned: PlannedModel, admit: Admit, progress: Callable[[Progress], None]
) -> StoredModel:
    model, copy = planned.model, _Copy(store, bundle, progress)
    # All that they lead to is left alone by a collection, also what is still to come.
    with store.lease(model.digest, *(found.descriptor.digest for found in model.attached)):
        put_documents(store, bundle, model)
        admit(store, model.digest, planned.ref)
        copy.all_of(model.manifest.layers, what=f"copying {planned.ref}")
        for found in model.attached_by_size()[1]:
            _attach(store, copy, found)
        return store.add_manifest(planned.ref, model.data)


def put_documents(store: ModelStore, bundle: Bundle, model: BundledModel) -> None:
    """Put a model's manifest and config, and what is attached to it and small, into a store: all that tells whether it
    is let in.

    Raises:
        InvalidModelFile, DigestMismatch, SourceUnavailable, DiskFull, StoreError: As `import_models`.
    """
    copy = _Copy(store, bundle)
    store.keep_manifest(model.data)
    copy.all_of([model.manifest.config])
    for found in model.attached_by_size()[0]:
        _attach(store, copy, found)


def _attach(store: ModelStore, copy: _Copy, found: Attached) -> None:
    copy.all_of([found.referrer.config, *found.referrer.layers], what="copying what is attached")
    store.add_referrer(found.data)


class _Copy:
    """Copies blobs from a bundle into a store."""

    def __init__(
        self, store: ModelStore, bundle: Bundle, progress: Callable[[Progress], None] = lambda _: None
    ) -> None:
        self._store = store
        self._bundle = bundle
        self._progress = progress

    def all_of(self, blobs: Sequence[Descriptor], *, what: str = "copying") -> None:
        """Copy those that are not sound in the store."""
        needed = {blob.digest: blob for blob in blobs if not self._store.has_sound(blob.digest)}
        self._bundle.check_has(list(needed.values()))
        done_bytes, total_bytes = 0, sum(blob.size for blob in needed.values())

        def report(blob_bytes: int) -> None:
            self._progress(Progress(done_bytes + blob_bytes, total_bytes, what))

        for blob in needed.values():
            with self._store.blobs.ingest(key_of(blob.digest)) as partial:
                self._one(blob, partial, report)
            done_bytes += blob.size

    def _one(self, blob: Descriptor, partial: Partial, report: Callable[[int], None]) -> None:
        """Copy a blob, going on where an earlier attempt stopped."""
        was_begun = partial.size_bytes > 0
        staged = self._rest(blob, partial, report)
        if staged.digest != blob.digest and was_begun:  # it may be what was there that is wrong
            partial.restart()
            staged = self._rest(blob, partial, report)
        if staged.digest != blob.digest:
            partial.discard()
            raise DigestMismatch(f"A blob of {self._bundle.path}", expected=blob.digest, actual=staged.digest)
        self._store.keep(staged)
        partial.discard()

    def _rest(self, blob: Descriptor, partial: Partial, report: Callable[[int], None]) -> Staged:
        require_room(self._store.blobs, blob.size - partial.size_bytes, partial)
        if not partial.note.boot:  # without a note nothing of it would outlive this process
            partial.remember(source=str(self._bundle.path), validator="", total_bytes=blob.size)
        for data in self._bundle.open_blob_range(blob.digest, partial.size_bytes):
            partial.write(data)
            report(partial.size_bytes)
        return partial.complete()
