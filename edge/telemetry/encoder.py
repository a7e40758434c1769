"""Requests, metrics and gaps to outbox rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .metrics import Metric
from .outbox import Gap, NewRow, Priority
from .span import Entropy, RequestRecord, span_of

if TYPE_CHECKING:
    from .otlp import Resource


class RowEncoder:
    """Encodes on the thread that calls it; the first call imports protobuf."""

    def __init__(
        self,
        collect: Callable[[], Sequence[Metric]],
        *,
        device_id: str,
        host_name: str,
        version: str,
        entropy: Entropy = os.urandom,
    ) -> None:
        self._collect = collect
        self._device_id = device_id
        self._host_name = host_name
        self._version = version
        self._entropy = entropy
        self._start_unix_ns = time.time_ns()

    def encode_records(self, records: Sequence[RequestRecord]) -> list[NewRow]:
        """One row for the requests that ended well and one, of the highest class, for those that did not."""
        from . import otlp

        rows: list[NewRow] = []
        for priority, failed in ((Priority.FAULT, True), (Priority.USAGE, False)):
            spans = [span_of(r, entropy=self._entropy) for r in records if r.is_failure == failed]
            if spans:
                rows.append(NewRow(priority, "traces", len(spans), otlp.encode_spans(self._resource(), spans)))
        return rows

    def encode_metrics(self) -> NewRow:
        """A row with every metric as it is now."""
        from . import otlp

        metrics = self._collect()
        body = otlp.encode_metrics(
            self._resource(), metrics, start_unix_ns=self._start_unix_ns, now_unix_ns=time.time_ns()
        )
        return NewRow(Priority.METRIC, "metrics", sum(len(metric.points) for metric in metrics), body)

    def encode_gaps(self, gaps: Sequence[Gap]) -> bytes:
        """The body that reports gaps."""
        from . import otlp

        return otlp.encode_gaps(self._resource(), gaps, now_unix_ns=time.time_ns())

    def _resource(self) -> Resource:
        from .otlp import Resource

        return Resource(self._device_id, self._host_name, self._version)
