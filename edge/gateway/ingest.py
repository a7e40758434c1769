"""What a body says, read strictly: every length is bounded before anything is kept."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint, Metric, NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from edge.errors import InvalidRequest
from edge.telemetry import semconv

Signal = Literal["traces", "metrics", "logs"]
Kind = Literal["counter", "gauge", "histogram"]

MAX_BODY_BYTES = 1 << 20
MAX_UNPACKED_BYTES = 4 << 20
"""A body of nothing but empty messages takes 130 MB and 2.5 s once it is parsed."""
MAX_SPANS = 10_000
MAX_POINTS = 10_000
MAX_ATTRIBUTES = 64
MAX_BUCKETS = 200
MAX_TEXT = 1024
_Export = TypeVar("_Export", ExportTraceServiceRequest, ExportMetricsServiceRequest, ExportLogsServiceRequest)
_KEY = re.compile(r"([A-Za-z0-9_.-]{1,64})/([A-Za-z0-9_.-]{1,64})/([1-9][0-9]{0,17})")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The name of one batch for ever: device, the device's start, number since that start."""

    device: str
    boot: str
    seq: int


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """A request that a device served."""

    trace_id: str
    span_id: str
    operation: str
    request_model: str
    response_model: str
    response_id: str
    started_unix_ns: int
    duration_s: float
    ttft_s: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reasons: tuple[str, ...]
    error_type: str | None


@dataclass(frozen=True, slots=True)
class Series:
    """One metric under one set of attributes, and its value."""

    name: str
    kind: Kind
    unit: str
    attributes: Mapping[str, str]
    value: float | None = None
    count: int | None = None
    total: float | None = None
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loss:
    """What a device reports as lost."""

    priority: str
    reason: str
    batches: int
    records: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the gateway indexes of a body. `sender` is the first resource's attributes."""

    sender: Mapping[str, str]
    requests: tuple[RequestSpan, ...] = ()
    series: tuple[Series, ...] = ()
    losses: tuple[Loss, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """A body as it came, its SHA-256, and what it says."""

    key: BatchKey
    signal: Signal
    digest: bytes
    body: bytes
    facts: Facts
    sent_unix_s: float | None = None
    """On the sender's clock; None where it did not say."""


def unpacked(body: bytes, encoding: str) -> bytes:
    """The body without its content encoding, never more than `MAX_UNPACKED_BYTES` of it.

    Raises:
        InvalidRequest: It is no single gzip stream, or would be too large.
    """
    if encoding == "identity":
        return body
    inflater = zlib.decompressobj(wbits=31)
    try:
        data = inflater.decompress(body, MAX_UNPACKED_BYTES)
    except zlib.error as e:
        raise InvalidRequest(f"The body is no gzip: {e}.", field="body") from e
    if inflater.unconsumed_tail:
        raise InvalidRequest(f"The body unpacks to more than {MAX_UNPACKED_BYTES} bytes.", hint="Send less at a time.")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("The body is not one whole gzip stream.", field="body")
    return data


def parse_batch(signal: Signal, body: bytes, data: bytes, *, key: str | None, sent_unix_s: float | None) -> Batch:
    """What `data`, the unpacked `body`, says.

    A body without a key is named by its content, so that one sent twice is still counted once.

    Raises:
        InvalidRequest: It is no OTLP, breaks a limit, or names another device than its key.
    """
    digest = hashlib.sha256(body).digest()
    try:
        facts = _PARSERS[signal](data)
    except (DecodeError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"The body is no OTLP {signal} request: {e}.", field="body") from e
    return Batch(_key(key, facts.sender, digest), signal, digest, body, facts, sent_unix_s)


def _key(key: str | None, sender: Mapping[str, str], digest: bytes) -> BatchKey:
    device = sender.get(semconv.DEVICE_ID) or sender.get(semconv.SERVICE_INSTANCE_ID)
    if device is not None and not _NAME.fullmatch(device):
        raise InvalidRequest(f"The resource's device id must match {_NAME.pattern}.", field=semconv.DEVICE_ID)
    if key is None:
        return BatchKey(device or ANONYMOUS, f"sha256.{digest[:24].hex()}", 1)
    match = _KEY.fullmatch(key)
    if match is None:
        raise InvalidRequest("The Idempotency-Key must read DEVICE/BOOT/NUMBER.", field="idempotency-key")
    if device is not None and device != match[1]:
        raise InvalidRequest(f"The key is of {match[1]}, the body of {device}.", field="idempotency-key")
    return BatchKey(match[1], match[2], int(match[3]))


def _parse_traces(data: bytes) -> Facts:
    request = _known(ExportTraceServiceRequest.FromString(data))
    spans = [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
    _limit("spans", len(spans), MAX_SPANS)
    requests = [found for span in spans if (found := _request(span)) is not None]
    return Facts(_sender(r.resource for r in request.resource_spans), requests=tuple(requests))


def _parse_metrics(data: bytes) -> Facts:
    request = _known(ExportMetricsServiceRequest.FromString(data))
    metrics = [metric for r in request.resource_metrics for scope in r.scope_metrics for metric in scope.metrics]
    num_points = sum(len(m.gauge.data_points) + len(m.sum.data_points) + len(m.histogram.data_points) for m in metrics)
    _limit("data points", num_points, MAX_POINTS)
    series = [one for metric in metrics for one in _series(metric)]
    return Facts(_sender(r.resource for r in request.resource_metrics), series=tuple(series))


def _parse_logs(data: bytes) -> Facts:
    request = _known(ExportLogsServiceRequest.FromString(data))
    records = [record for r in request.resource_logs for scope in r.scope_logs for record in scope.log_records]
    _limit("log records", len(records), MAX_POINTS)
    losses = [_loss(record) for record in records if record.event_name == semconv.GAP_EVENT]
    return Facts(_sender(r.resource for r in request.resource_logs), losses=tuple(losses))


_PARSERS: Mapping[Signal, Callable[[bytes], Facts]] = {
    "traces": _parse_traces,
    "metrics": _parse_metrics,
    "logs": _parse_logs,
}


def _known(request: _Export) -> _Export:
    """The request, unless it has top-level fields that OTLP does not: random bytes often parse as such."""
    if len(UnknownFieldSet(request)):
        raise InvalidRequest("The body has fields that no OTLP request has.", field="body")
    return request


def _sender(resources: Iterable[Resource]) -> Mapping[str, str]:
    first = next(iter(resources), None)
    return {} if first is None else _Attributes(first.attributes).texts()


def _request(span: Span) -> RequestSpan | None:
    attributes = _Attributes(span.attributes)
    operation = attributes.text(semconv.OPERATION_NAME)
    if not operation:
        return None
    if len(span.trace_id) != 16 or len(span.span_id) != 8:
        raise InvalidRequest("A span's ids must have 16 and 8 bytes.", field="span_id")
    if span.end_time_unix_nano >= 2**63 or span.start_time_unix_nano > span.end_time_unix_nano:
        raise InvalidRequest("A span must not end before it starts.", field="end_time_unix_nano")
    return RequestSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        operation=operation,
        request_model=attributes.text(semconv.REQUEST_MODEL),
        response_model=attributes.text(semconv.RESPONSE_MODEL),
        response_id=attributes.text(semconv.RESPONSE_ID),
        started_unix_ns=span.start_time_unix_nano,
        duration_s=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        ttft_s=attributes.number(semconv.RESPONSE_TIME_TO_FIRST_CHUNK),
        input_tokens=attributes.count(semconv.USAGE_INPUT_TOKENS),
        output_tokens=attributes.count(semconv.USAGE_OUTPUT_TOKENS),
        cached_tokens=attributes.count(semconv.USAGE_CACHE_READ_INPUT_TOKENS),
        finish_reasons=attributes.list_of_texts(semconv.RESPONSE_FINISH_REASONS),
        error_type=attributes.text(semconv.ERROR_TYPE) or None,
    )


def _series(metric: Metric) -> Iterable[Series]:
    name, unit = _text(metric.name), _text(metric.unit)
    for point in metric.gauge.data_points:
        yield Series(name, "gauge", unit, _Attributes(point.attributes).texts(), value=_number(point))
    for point in metric.sum.data_points:
        kind: Kind = "counter" if metric.sum.is_monotonic else "gauge"
        yield Series(name, kind, unit, _Attributes(point.attributes).texts(), value=_number(point))
    for point in metric.histogram.data_points:
        yield _histogram(name, unit, point)


def _histogram(name: str, unit: str, point: HistogramDataPoint) -> Series:
    bounds, counts = tuple(point.explicit_bounds), tuple(point.bucket_counts)
    _limit("buckets", len(counts), MAX_BUCKETS)
    if counts and len(counts) != len(bounds) + 1:
        raise InvalidRequest(f"A histogram of {len(bounds)} bounds has {len(bounds) + 1} buckets.", field=name)
    if point.count >= 2**63 or any(count >= 2**63 for count in counts):
        raise InvalidRequest("A count must be below 2^63.", field=name)
    labels = _Attributes(point.attributes).texts()
    total = point.sum if math.isfinite(point.sum) else None
    return Series(name, "histogram", unit, labels, count=point.count, total=total, bounds=bounds, counts=counts)


def _number(point: NumberDataPoint) -> float | None:
    value = float(point.as_int) if point.HasField("as_int") else point.as_double
    return value if math.isfinite(value) else None


def _loss(record: LogRecord) -> Loss:
    attributes = _Attributes(record.attributes)
    return Loss(
        priority=attributes.text(semconv.GAP_CLASS),
        reason=attributes.text(semconv.GAP_REASON),
        batches=attributes.count(semconv.GAP_BATCHES),
        records=attributes.count(semconv.GAP_RECORDS),
        size_bytes=attributes.count(semconv.GAP_BYTES),
    )


class _Attributes:
    """Attributes by name, each read as the type it should have."""

    def __init__(self, attributes: Sequence[KeyValue]) -> None:
        _limit("attributes", len(attributes), MAX_ATTRIBUTES)
        self._values: dict[str, AnyValue] = {_text(a.key): a.value for a in attributes}

    def texts(self) -> dict[str, str]:
        """Those that are text."""
        return {name: _text(v.string_value) for name, v in self._values.items() if v.HasField("string_value")}

    def text(self, name: str) -> str:
        """The text, or an empty one."""
        return _text(self._values[name].string_value) if name in self._values else ""

    def count(self, name: str) -> int:
        """The whole number, or 0.

        Raises:
            InvalidRequest: It is negative.
        """
        value = self._values[name].int_value if name in self._values else 0
        if value < 0:
            raise InvalidRequest(f"{name} must not be negative, got {value}.", field=name)
        return value

    def number(self, name: str) -> float | None:
        """The number, or None."""
        value = self._values.get(name)
        if value is None or not (value.HasField("double_value") or value.HasField("int_value")):
            return None
        number = value.double_value if value.HasField("double_value") else float(value.int_value)
        return number if math.isfinite(number) else None

    def list_of_texts(self, name: str) -> tuple[str, ...]:
        """The texts of a list, or none."""
        items = self._values.get(name, AnyValue()).array_value.values
        _limit(name, len(items), MAX_ATTRIBUTES)
        return tuple(_text(item.string_value) for item in items)


def _text(text: str) -> str:
    _limit("characters of a text", len(text), MAX_TEXT)
    return text


def _limit(what: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidRequest(f"There are {number} {what}; {most} are the most.", hint="Send less at a time.")
