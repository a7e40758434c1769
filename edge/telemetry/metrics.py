"""Counters, gauges and histograms, and their rendering for Prometheus.

Our own registry of some two hundred lines and no SDK: the OpenTelemetry SDK has no queue on disk, and it costs start-up
time and memory that a device has better uses for. `otlp.encode_metrics` renders the same numbers as protobuf.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from edge.errors import ConfigError

from . import semconv
from .span import bounded

log = logging.getLogger("edge.telemetry")

Labels = tuple[tuple[str, str], ...]
"""Attribute names and values, sorted by name."""
Kind = Literal["counter", "gauge", "histogram"]
Reading = Callable[[], float | None]
"""Reads a value now, quickly and from any thread; None where there is none."""

MAX_SERIES = 200
"""Label sets that one instrument keeps apart. Names of models come from clients, who must not fill the memory."""
OVERFLOW: Labels = ((semconv.METRIC_OVERFLOW, "true"),)


def labels_of(attributes: Mapping[str, str]) -> Labels:
    """Attributes as a key: sorted, each value bounded."""
    return tuple(sorted((name, bounded(value)) for name, value in attributes.items()))


@dataclass(frozen=True, slots=True)
class NumberPoint:
    labels: Labels
    value: float


@dataclass(frozen=True, slots=True)
class HistogramPoint:
    """`counts[i]` observations were at most `bounds[i]` and above the bound before; the last count is the rest."""

    labels: Labels
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Metric:
    """The state of one instrument at one moment. `unit` is a UCUM code, as OpenTelemetry wants it."""

    name: str
    kind: Kind
    unit: str
    help: str
    points: tuple[NumberPoint | HistogramPoint, ...]


class Counter:
    """A number that only grows, for each label set."""

    def __init__(self, name: str, *, unit: str, text: str) -> None:
        self.name, self.unit, self.help = name, unit, text
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float, labels: Labels = ()) -> None:
        """Add `amount`; a negative one is ignored, since a counter that falls reads as a restart."""
        if amount < 0:
            return
        with self._lock:
            key = _admitted(self._values, labels)
            self._values[key] = self._values.get(key, 0) + amount

    def total(self) -> float:
        """The sum over every label set."""
        with self._lock:
            return sum(self._values.values())

    def collect(self) -> Metric:
        with self._lock:
            points = tuple(NumberPoint(labels, value) for labels, value in self._values.items())
        return Metric(self.name, "counter", self.unit, self.help, points)


class Histogram:
    """How observations spread over fixed bounds, for each label set."""

    def __init__(self, name: str, *, unit: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.unit, self.help = name, unit, text
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._totals: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count one observation; what is not a number is ignored, since it would spoil the sum for good."""
        if math.isnan(value):
            return
        with self._lock:
            key = _admitted(self._counts, labels)
            counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
            counts[bisect_left(self._bounds, value)] += 1
            self._totals[key] = self._totals.get(key, 0.0) + value

    def collect(self) -> Metric:
        with self._lock:
            points = tuple(
                HistogramPoint(labels, self._bounds, tuple(counts), self._totals[labels])
                for labels, counts in self._counts.items()
            )
        return Metric(self.name, "histogram", self.unit, self.help, points)


class Gauge:
    """A value read when it is asked for, for each label set."""

    def __init__(self, name: str, *, unit: str, text: str) -> None:
        self.name, self.unit, self.help = name, unit, text
        self._readings: dict[Labels, Reading] = {}
        self._failed: set[Labels] = set()
        self._lock = threading.Lock()

    def watch(self, reading: Reading, labels: Labels = ()) -> None:
        """Read this label set with `reading` from now on; a second call replaces the first."""
        with self._lock:
            self._readings[_admitted(self._readings, labels)] = reading

    def collect(self) -> Metric:
        """The values now. One that cannot be read is left out, and the first failure of each is logged."""
        with self._lock:
            readings = list(self._readings.items())
        values = [(labels, self._read(labels, reading)) for labels, reading in readings]
        points = tuple(NumberPoint(labels, value) for labels, value in values if value is not None)
        return Metric(self.name, "gauge", self.unit, self.help, points)

    def _read(self, labels: Labels, reading: Reading) -> float | None:
        try:
            return reading()
        except Exception:  # a supervisor of callbacks that others own: one bad gauge must not hide the rest
            if labels not in self._failed:
                self._failed.add(labels)
                log.warning("gauge %s %s cannot be read and is left out", self.name, dict(labels), exc_info=True)
            return None


def _admitted(series: Mapping[Labels, object], labels: Labels) -> Labels:
    return labels if labels in series or len(series) < MAX_SERIES else OVERFLOW


_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)


class Registry:
    """Every instrument of the appliance, in the order in which they were made. Safe to use from any thread."""

    def __init__(self) -> None:
        self._instruments: dict[str, Counter | Gauge | Histogram] = {}
        self._lock = threading.Lock()

    def counter(self, name: str, *, unit: str, text: str) -> Counter:
        return self._add(Counter(name, unit=unit, text=text))

    def histogram(self, name: str, *, unit: str, text: str, bounds: Sequence[float]) -> Histogram:
        return self._add(Histogram(name, unit=unit, text=text, bounds=bounds))

    def gauge(self, name: str, *, unit: str, text: str) -> Gauge:
        """The gauge of that name, made at the first call."""
        with self._lock:
            found = self._instruments.get(name)
            if not isinstance(found, Gauge):
                return self._add_locked(Gauge(name, unit=unit, text=text))
            return found

    def collect(self) -> list[Metric]:
        """The state of every instrument that has one."""
        with self._lock:
            instruments = list(self._instruments.values())
        metrics = [instrument.collect() for instrument in instruments]
        return [metric for metric in metrics if metric.points]

    def _add(self, instrument: _Instrument) -> _Instrument:
        with self._lock:
            return self._add_locked(instrument)

    def _add_locked(self, instrument: _Instrument) -> _Instrument:
        if instrument.name in self._instruments:
            raise ConfigError(f"There are two instruments of the name {instrument.name}.")
        self._instruments[instrument.name] = instrument
        return instrument


_UNIT_SUFFIX = {"s": "seconds", "By": "bytes", "Cel": "celsius", "1": "ratio"}
_INVALID_NAME = re.compile(r"[^a-zA-Z0-9_]")


def prometheus_name(metric: Metric) -> str:
    """The metric's name for Prometheus: dots to underscores, then the unit, then ``_total`` for a counter.

    Source: OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility"; units in braces have no suffix.
    """
    name = _INVALID_NAME.sub("_", metric.name)
    suffix = _UNIT_SUFFIX.get(metric.unit, "")
    if suffix and not name.endswith(f"_{suffix}"):
        name = f"{name}_{suffix}"
    return f"{name}_total" if metric.kind == "counter" else name


def render_prometheus(metrics: Sequence[Metric]) -> str:
    """Prometheus text exposition format 0.0.4, one block a metric."""
    return "".join(f"{line}\n" for metric in metrics for line in _block(metric))


def _block(metric: Metric) -> list[str]:
    name = prometheus_name(metric)
    text = metric.help.replace("\\", "\\\\").replace("\n", "\\n")
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {metric.kind}"]
    for point in metric.points:
        if isinstance(point, NumberPoint):
            lines.append(f"{name}{_label_text(point.labels)} {_number(point.value)}")
        else:
            lines += _histogram_lines(name, point)
    return lines


def _histogram_lines(name: str, point: HistogramPoint) -> list[str]:
    lines: list[str] = []
    below = 0
    for bound, count in zip((*point.bounds, math.inf), point.counts, strict=True):
        below += count
        lines.append(f"{name}_bucket{_label_text((*point.labels, ('le', _number(bound))))} {below}")
    lines.append(f"{name}_sum{_label_text(point.labels)} {_number(point.total)}")
    lines.append(f"{name}_count{_label_text(point.labels)} {below}")
    return lines


def _label_text(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{_INVALID_NAME.sub("_", name)}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
