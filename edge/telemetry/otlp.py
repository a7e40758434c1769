"""Spans, metrics and gaps as OTLP protobuf. The one module here that imports protobuf: 30 ms, on the writer's thread.

Source: opentelemetry-proto 1.x, packages trace, metrics, logs and collector, all v1. Temporality is cumulative: a body
that is sent twice says the same number twice, while a delta would be counted twice.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ProtoResource
from opentelemetry.proto.trace.v1 import trace_pb2

from . import semconv
from .metrics import HistogramPoint, Metric, NumberPoint
from .outbox import Gap, Signal
from .span import AttributeValue, Span

REQUESTS = {
    "traces": ExportTraceServiceRequest,
    "metrics": ExportMetricsServiceRequest,
    "logs": ExportLogsServiceRequest,
}
_GZIP_LEVEL = 6
# Protobuf's JSON has bytes in base64; OTLP's has ids in hexadecimal (OTLP specification, "JSON Protobuf Encoding").
_ID_FIELDS = ("traceId", "spanId", "parentSpanId")


@dataclass(frozen=True, slots=True)
class Resource:
    """What every body says about its sender."""

    device_id: str
    host_name: str
    version: str

    def attributes(self) -> dict[str, AttributeValue]:
        """Under OpenTelemetry's names. The instance is the device, so that a series goes on after a restart."""
        return {
            semconv.SERVICE_NAME: "slm-edge",
            semconv.SERVICE_VERSION: self.version,
            semconv.SERVICE_INSTANCE_ID: self.device_id,
            semconv.DEVICE_ID: self.device_id,
            semconv.HOST_NAME: self.host_name,
        }


def encode_spans(resource: Resource, spans: Iterable[Span]) -> bytes:
    """The gzipped body for ``/v1/traces``."""
    scope = trace_pb2.ScopeSpans(scope=_scope(resource), spans=[_span(s) for s in spans], schema_url=semconv.SCHEMA_URL)
    body = trace_pb2.ResourceSpans(resource=_resource(resource), scope_spans=[scope], schema_url=semconv.SCHEMA_URL)
    return _packed(ExportTraceServiceRequest(resource_spans=[body]).SerializeToString())


def encode_metrics(resource: Resource, metrics: Iterable[Metric], *, start_unix_ns: int, now_unix_ns: int) -> bytes:
    """The gzipped body for ``/v1/metrics``: every series since `start_unix_ns`."""
    scope = metrics_pb2.ScopeMetrics(
        scope=_scope(resource),
        metrics=[_metric(m, start=start_unix_ns, now=now_unix_ns) for m in metrics],
        schema_url=semconv.SCHEMA_URL,
    )
    body = metrics_pb2.ResourceMetrics(
        resource=_resource(resource), scope_metrics=[scope], schema_url=semconv.SCHEMA_URL
    )
    return _packed(ExportMetricsServiceRequest(resource_metrics=[body]).SerializeToString())


def encode_gaps(resource: Resource, gaps: Iterable[Gap], *, now_unix_ns: int) -> bytes:
    """The gzipped body for ``/v1/logs``: one warning for each class and reason."""
    scope = logs_pb2.ScopeLogs(
        scope=_scope(resource),
        log_records=[_gap(gap, now=now_unix_ns) for gap in gaps],
        schema_url=semconv.SCHEMA_URL,
    )
    body = logs_pb2.ResourceLogs(resource=_resource(resource), scope_logs=[scope], schema_url=semconv.SCHEMA_URL)
    return _packed(ExportLogsServiceRequest(resource_logs=[body]).SerializeToString())


def decode(signal: Signal, body: bytes) -> dict[str, Any]:
    """A row's body in OTLP's JSON form (ids in hexadecimal), for people to read.

    Raises:
        ValueError: The body is no gzipped OTLP.
    """
    try:
        request = REQUESTS[signal].FromString(gzip.decompress(body))
    except (DecodeError, OSError, EOFError) as e:
        raise ValueError(f"The body of this row cannot be decoded: {e}") from e
    return _with_hex_ids(MessageToDict(request))


def rejected_records(signal: Signal, response: bytes) -> int:
    """How many records a receiver says it threw away; it asks that they are not sent again.

    Raises:
        ValueError: The response is no OTLP response.
    """
    try:
        if signal == "traces":
            return ExportTraceServiceResponse.FromString(response).partial_success.rejected_spans
        if signal == "metrics":
            return ExportMetricsServiceResponse.FromString(response).partial_success.rejected_data_points
        return ExportLogsServiceResponse.FromString(response).partial_success.rejected_log_records
    except DecodeError as e:
        raise ValueError(f"The response is no OTLP response: {e}") from e


def _with_hex_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_hex_ids(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {
            name: base64.b64decode(item).hex() if name in _ID_FIELDS else _with_hex_ids(item)
            for name, item in cast("dict[str, Any]", value).items()
        }
    return value


def _packed(message: bytes) -> bytes:
    # no time stamp in the header: equal content makes equal bytes
    return gzip.compress(message, _GZIP_LEVEL, mtime=0)


def _scope(resource: Resource) -> InstrumentationScope:
    return InstrumentationScope(name=semconv.SCOPE_NAME, version=resource.version)


def _resource(resource: Resource) -> ProtoResource:
    return ProtoResource(attributes=_attributes(resource.attributes()))


def _span(span: Span) -> trace_pb2.Span:
    status = trace_pb2.Status()
    if span.error_type:
        status = trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR, message=span.error_type)
    return trace_pb2.Span(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        name=span.name,
        # the model runs inside the process that the span is of (GenAI spans, "span kind")
        kind=trace_pb2.Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=span.start_unix_ns,
        end_time_unix_nano=span.end_unix_ns,
        attributes=_attributes(span.attributes),
        status=status,
    )


def _metric(metric: Metric, *, start: int, now: int) -> metrics_pb2.Metric:
    proto = metrics_pb2.Metric(name=metric.name, description=metric.help, unit=metric.unit)
    cumulative = metrics_pb2.AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    for point in metric.points:
        if isinstance(point, HistogramPoint):
            proto.histogram.aggregation_temporality = cumulative
            proto.histogram.data_points.append(_histogram_point(point, start=start, now=now))
        elif metric.kind == "counter":
            proto.sum.aggregation_temporality = cumulative
            proto.sum.is_monotonic = True
            proto.sum.data_points.append(_number_point(point, start=start, now=now))
        else:
            proto.gauge.data_points.append(_number_point(point, start=0, now=now))
    return proto


def _number_point(point: NumberPoint, *, start: int, now: int) -> metrics_pb2.NumberDataPoint:
    proto = metrics_pb2.NumberDataPoint(
        attributes=_attributes(dict(point.labels)), start_time_unix_nano=start, time_unix_nano=now
    )
    if float(point.value).is_integer() and abs(point.value) < 2**53:
        proto.as_int = int(point.value)
    else:
        proto.as_double = point.value
    return proto


def _histogram_point(point: HistogramPoint, *, start: int, now: int) -> metrics_pb2.HistogramDataPoint:
    return metrics_pb2.HistogramDataPoint(
        attributes=_attributes(dict(point.labels)),
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=point.count,
        sum=point.total,
        bucket_counts=point.counts,
        explicit_bounds=point.bounds,
    )


def _gap(gap: Gap, *, now: int) -> logs_pb2.LogRecord:
    attributes: dict[str, AttributeValue] = {
        semconv.GAP_CLASS: gap.priority.name.lower(),
        semconv.GAP_REASON: gap.reason,
        semconv.GAP_BATCHES: gap.batches,
        semconv.GAP_RECORDS: gap.records,
        semconv.GAP_BYTES: gap.size_bytes,
    }
    return logs_pb2.LogRecord(
        observed_time_unix_nano=now,
        event_name=semconv.GAP_EVENT,
        severity_number=logs_pb2.SeverityNumber.SEVERITY_NUMBER_WARN,
        severity_text="WARN",
        attributes=_attributes(attributes),
    )


def _attributes(attributes: Mapping[str, AttributeValue]) -> Sequence[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in attributes.items()]


def _value(value: AttributeValue) -> AnyValue:
    # bool before int: it is one in Python
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, str):
        return AnyValue(string_value=value)
    return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=item) for item in value]))
