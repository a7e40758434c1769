"""The front's side of telemetry: record what happened, and forget about it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urlsplit

from edge import __version__
from edge.config import Settings, without_password
from edge.errors import ConfigError, StoreError

from . import semconv
from .encoder import RowEncoder
from .exporter import OtlpHttpExporter
from .forwarder import Forwarder, ForwarderState, ForwarderThread
from .host import watch_host
from .identity import OutboxLock, load_device_id
from .instruments import RequestInstruments, RequestTotals
from .metrics import Reading, Registry, labels_of, render_prometheus
from .outbox import Outbox, OutboxStats, read_stats
from .span import RequestRecord
from .writer import OutboxWriter

LOCK_NAME = "telemetry.lock"


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
    """Numbers in memory, records to the outbox, the outbox to the gateway.

    With no gateway configured there are the numbers only: no thread, no file but the device's id, no connection.
    Otherwise two threads: one owns the outbox, the other the connections. Every method may be called from any thread;
    `start`, `flush` and `close` block and do not belong on an event loop.
    """

    def __init__(self, settings: Settings) -> None:
        """Make the instruments. Nothing runs before `start`.

        Raises:
            ConfigError: The gateway's address is none.
            StoreError: EDGE_HOME cannot be written, or holds a device id that is none.
        """
        self.device_id = load_device_id(settings.home)
        self.registry = Registry()
        self._settings = settings
        self._requests = RequestInstruments(self.registry)
        watch_host(self.registry)
        self._pipeline: _Pipeline | None = None
        if settings.gateway_url:
            check_gateway_url(settings.gateway_url)
            self._pipeline = _Pipeline(settings, self.registry, device_id=self.device_id)
            self._watch_outbox(self._pipeline.writer)

    def start(self) -> None:
        """Open the outbox and begin to forward. A disk that is full or read-only is tried again later, and serving
        goes on.

        Raises:
            StoreError: Another process has this EDGE_HOME, or a newer version wrote the outbox.
        """
        if self._pipeline is not None:
            self._pipeline.start()

    def record(self, record: RequestRecord) -> None:
        """Count a request and hand it to the outbox, where it is at most a second later. Never blocks, never raises."""
        self._requests.observe(record)
        if self._pipeline is not None:
            self._pipeline.writer.offer(record)

    def add_gauge(
        self,
        name: str,
        reading: Reading,
        *,
        unit: str = "1",
        text: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Read a gauge with `reading` whenever metrics are asked for.

        Args:
            name: OpenTelemetry style, ``edge.models.loaded``; Prometheus gets it with underscores and the unit.
            reading: Called from any thread, so it has to be quick and safe; None leaves the gauge out.
            unit: UCUM code: ``s``, ``By``, ``1`` (a share), or what is counted in braces, ``{model}``.
            labels: Several readings may share a name under different labels.
        """
        self.registry.gauge(name, unit=unit, text=text or name).watch(reading, labels_of(labels or {}))

    def totals(self) -> RequestTotals:
        """What was counted since the start."""
        return self._requests.totals()

    def prometheus(self) -> str:
        """Every metric in Prometheus text format 0.0.4."""
        return render_prometheus(self.registry.collect())

    def status(self) -> OutboxState:
        """How the spool is after the last commit; reads memory only."""
        if self._pipeline is None:
            return _state(self._settings, OutboxStats(), last_error=None)
        writer, forwarding = self._pipeline.writer, self._pipeline.forwarder.state()
        return _state(
            self._settings, writer.stats, last_error=writer.error or forwarding.last_error, forwarding=forwarding
        )

    def sync(self) -> None:
        """Return when everything recorded so far is on the disk.

        Raises:
            StoreError: The disk takes nothing; what was recorded is kept in memory and tried again.
        """
        if self._pipeline is not None:
            self._pipeline.writer.sync()

    def flush(self, timeout_s: float = 10.0) -> OutboxState:
        """Commit what is buffered, with the metrics as they are, and try to send all of it now. How the spool is then.

        Raises:
            StoreError: The disk takes nothing.
        """
        if self._pipeline is not None:
            self._pipeline.writer.sync(with_metrics=True)
            self._pipeline.forwarder.drain(timeout_s)
        return self.status()

    def close(self) -> None:
        """Commit what is buffered and end the threads; what is not sent waits on the disk. Twice is as good as once."""
        if self._pipeline is not None:
            self._pipeline.close()

    def _watch_outbox(self, writer: OutboxWriter) -> None:
        for name, unit, text, reading in (
            (semconv.OUTBOX_ROWS, "{batch}", "Batches that wait.", lambda: writer.stats.rows),
            (semconv.OUTBOX_SIZE, "By", "Bytes of the batches on the disk.", lambda: writer.stats.size_bytes),
            (semconv.OUTBOX_DROPPED, "{batch}", "Batches dropped so far.", lambda: writer.stats.dropped_rows),
            (semconv.OUTBOX_QUARANTINED, "{batch}", "Batches set aside.", lambda: writer.stats.quarantined_rows),
            (semconv.OUTBOX_SENT, "{batch}", "Batches delivered so far.", lambda: writer.stats.sent_rows),
        ):
            self.add_gauge(name, reading, unit=unit, text=text)


class _Pipeline:
    """The two threads, and the lock that makes them the only ones."""

    def __init__(self, settings: Settings, registry: Registry, *, device_id: str) -> None:
        self._lock = OutboxLock(settings.home / LOCK_NAME)
        self._is_started = False
        encoder = RowEncoder(registry.collect, device_id=device_id, host_name=platform.node(), version=__version__)

        def open_outbox() -> Outbox:
            return Outbox(
                settings.telemetry_db, device_id, limit_bytes=settings.outbox_bytes, encode_gaps=encoder.encode_gaps
            )

        self.writer = OutboxWriter(
            open_outbox,
            encoder,
            metrics_interval_s=settings.metrics_interval_s,
            on_commit=lambda: self.forwarder.notify(),
        )
        self.forwarder = ForwarderThread(self.writer, lambda: OtlpHttpExporter(settings.gateway_url))

    def start(self) -> None:
        self._lock.acquire()
        try:
            self.writer.start()
        except StoreError:
            self.writer.close()
            self._lock.release()
            raise
        self.forwarder.start()
        self._is_started = True

    def close(self) -> None:
        if self._is_started:
            self._is_started = False
            self.forwarder.stop()
            self.writer.close()
            self._lock.release()


def flush_without_server(settings: Settings) -> OutboxState:
    """Send what waits on the disk, from this process, while no appliance runs. How the spool is then.

    Raises:
        ConfigError: No gateway is configured, or its address is none.
        StoreError: Another process works on the outbox, or it cannot be used.
    """
    if not settings.gateway_url:
        raise ConfigError("No gateway is configured, so there is nowhere to send to.", hint="Set EDGE_GATEWAY_URL.")
    check_gateway_url(settings.gateway_url)
    if not settings.telemetry_db.exists():
        return OutboxState(enabled=True, gateway_url=without_password(settings.gateway_url))
    device_id = load_device_id(settings.home)
    encoder = RowEncoder(lambda: (), device_id=device_id, host_name=platform.node(), version=__version__)
    with OutboxLock(settings.home / LOCK_NAME), OtlpHttpExporter(settings.gateway_url) as exporter:
        outbox = Outbox(
            settings.telemetry_db, device_id, limit_bytes=settings.outbox_bytes, encode_gaps=encoder.encode_gaps
        )
        with closing(outbox):
            error = _drain(Forwarder(outbox, exporter))
            return _state(settings, outbox.stats(), last_error=error)


def read_state(settings: Settings) -> OutboxState:
    """How the spool on the disk is, by looking only; an appliance may run or not.

    Raises:
        StoreError: It cannot be read.
    """
    stats = OutboxStats(limit_bytes=settings.outbox_bytes)
    if settings.telemetry_db.exists():
        stats = read_stats(settings.telemetry_db, limit_bytes=settings.outbox_bytes)
    return _state(settings, stats, last_error=None)


def _drain(forwarder: Forwarder) -> str | None:
    progress = forwarder.step()
    while progress.wait_s is not None and progress.error is None:
        progress = forwarder.step()
    return progress.error


def _state(
    settings: Settings, stats: OutboxStats, *, last_error: str | None, forwarding: ForwarderState | None = None
) -> OutboxState:
    return OutboxState(
        enabled=bool(settings.gateway_url),
        gateway_url=without_password(settings.gateway_url),
        rows=stats.rows,
        size_bytes=stats.size_bytes,
        limit_bytes=settings.outbox_bytes,
        oldest_age_s=stats.oldest_age_s,
        sent_batches=stats.sent_rows,
        dropped_rows=stats.dropped_rows,
        quarantined_rows=stats.quarantined_rows,
        last_success_age_s=forwarding.last_success_age_s if forwarding else None,
        last_error=last_error,
        next_attempt_s=forwarding.next_attempt_s if forwarding else None,
    )


def check_gateway_url(url: str) -> None:
    """Raise if records cannot be sent there.

    Raises:
        ConfigError: It has no host, an impossible port, or a part that has no meaning here.
    """
    try:
        parts = urlsplit(url)
        is_usable = (
            bool(parts.hostname) and (parts.port is None or parts.port > 0) and not (parts.query or parts.fragment)
        )
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(
            f"gateway_url is no address that telemetry can be sent to: {without_password(url)!r}.",
            hint="Give the base, as in http://gateway.example:4318; /v1/traces and the like are added.",
        )
