"""Which adapters stay in memory. Pure bookkeeping: the weights are the backend's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from edge.errors import DoesNotFit, InvalidRequest, QueueFull
from runtime.request import Adapter, AdapterSet

MAX_ADAPTERS = 4
"""Of one request. Each adds two products to every weight that it changes."""
BUSY_RETRY_S = 5.0


def adapter_set(adapters: Iterable[Adapter]) -> AdapterSet:
    """The one form of a set: sorted, without those that change nothing.

    Raises:
        InvalidRequest: Too many, or one twice.
    """
    found = tuple(sorted(a for a in adapters if a.scale))
    if len(found) > MAX_ADAPTERS or len({a.digest for a in found}) < len(found):
        raise InvalidRequest(f"A request has at most {MAX_ADAPTERS} adapters, each once.", field="lora")
    return found


class ResidentAdapters:
    """The adapters that are loaded, within a budget; the longest unused gives way to a new one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def use(self, adapter: Adapter) -> bool:
        """Whether it is there; if so, it stays longer."""
        if adapter.digest not in self._sizes:
            return False
        self._sizes.move_to_end(adapter.digest)
        return True

    def add(self, adapter: Adapter, *, in_use: Collection[str]) -> list[str]:
        """Count one as loaded; the digests that go for it.

        Raises:
            DoesNotFit: It is larger than the budget.
            QueueFull: Requests under way need the others; nothing was changed.
        """
        if adapter.size_bytes > self._max_bytes:
            raise DoesNotFit("The adapter", required_bytes=adapter.size_bytes, available_bytes=self._max_bytes)
        excess = sum(self._sizes.values()) + adapter.size_bytes - self._max_bytes
        leaving: list[str] = []
        for digest in [d for d in self._sizes if d not in in_use]:
            if excess <= 0:
                break
            excess -= self._sizes[digest]
            leaving.append(digest)
        if excess > 0:
            raise QueueFull(retry_after_s=BUSY_RETRY_S)
        for digest in leaving:
            del self._sizes[digest]
        self._sizes[adapter.digest] = adapter.size_bytes
        return leaving

    def drop(self, digest: str) -> None:
        """Count one as gone: it could not be loaded."""
        del self._sizes[digest]
