"""Faults planted on purpose: a harness that does not find them proves nothing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from typing_extensions import override

from edge.store.blobs import Staged
from edge.store.manifest import Descriptor, ModelRef
from edge.store.models import ModelStore


class ReferenceFirst(ModelStore):
    """Writes the list of references before the blobs that it leads to."""

    _late: Sequence[Staged] = ()

    @override
    def _publish(self, staged: Sequence[Staged]) -> None:
        self._late = staged

    @override
    def _set_entry(self, ref: ModelRef, entry: Descriptor | None) -> None:
        super()._set_entry(ref, entry)
        late, self._late = self._late, ()
        super()._publish(late)


class Unlocked(ModelStore):
    """Does not wait for other writers."""

    @override
    @contextmanager
    def _lock(self) -> Generator[None]:
        yield


STORES: dict[str, type[ModelStore]] = {"": ModelStore, "reference first": ReferenceFirst, "no lock": Unlocked}
