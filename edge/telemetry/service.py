"""The front's side of telemetry: record what happened, forget about it."""

from __future__ import annotations

from dataclasses import dataclass

from edge.config import Settings

from .host import watch_host
from .instruments import RequestInstruments, RequestTotals
from .metrics import Reading, Registry, labels_of, render_prometheus
from .span import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxState:
    """How the spool is at one moment; the fields of `runtime.api.schema.OutboxStatus`, one for one."""

    enabled: bool
    gateway_url: str = ""
    rows: int = 0
    size_bytes: int = 0
    limit_bytes: int = 0
    oldest_age_s: float | None = None
    sent_batches: int = 0
    dropped_rows: int = 0
    quarantined_rows: int = 0
    last_success_age_s: float | None = None
    last_error: str | None = None
    next_attempt_s: float | None = None


class Telemetry:
    """Numbers in memory, records to the outbox, the outbox to the gateway."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.registry = Registry()
        self._requests = RequestInstruments(self.registry)
        watch_host(self.registry)

    def start(self) -> None:
        """Open the outbox and begin to forward."""

    def record(self, record: RequestRecord) -> None:
        """Count a request and hand it to the outbox. Never blocks, never raises."""
        self._requests.observe(record)

    def add_gauge(
        self, name: str, reading: Reading, *, unit: str = "1", text: str = "", labels: dict[str, str] | None = None
    ) -> None:
        """Read a gauge with `reading` whenever metrics are asked for; from any thread, so it has to be quick."""
        self.registry.gauge(name, unit=unit, text=text or name).watch(reading, labels_of(labels or {}))

    def totals(self) -> RequestTotals:
        """What was counted since the start."""
        return self._requests.totals()

    def status(self) -> OutboxState:
        """How the spool is; reads memory only."""
        return OutboxState(enabled=bool(self._settings.gateway_url), gateway_url=self._settings.gateway_url)

    def prometheus(self) -> str:
        """Every metric in Prometheus text format 0.0.4."""
        return render_prometheus(self.registry.collect())

    def flush(self, timeout_s: float = 10.0) -> OutboxState:
        """Commit what is buffered and try to send everything now; blocks."""
        return self.status()

    def close(self) -> None:
        """Commit what is buffered and end the threads."""
