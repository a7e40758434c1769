"""The wire structs of the fleet API, ``/fleet/v1``. Times are Unix seconds on the gateway's clock."""

from __future__ import annotations

import msgspec


class DeviceInfo(msgspec.Struct, kw_only=True):
    """One device, as its telemetry shows it."""

    id: str
    hostname: str
    version: str
    first_seen: float
    last_seen: float
    clock_skew_s: float | None
    """The device's clock minus the gateway's, when it last sent."""
    num_batches: int
    num_duplicates: int
    """Batches that came again, their reply having been lost on the way; each was counted once."""
    num_requests: int
    num_lost_batches: int
    """What the device itself reported as lost: dropped, expired or refused."""
    num_lost_records: int


class DeviceList(msgspec.Struct, kw_only=True):
    devices: list[DeviceInfo]
    next: str | None = None
    """Give it as `after` for the next page."""


class MetricValue(msgspec.Struct, kw_only=True):
    """The last value of one series. `value` is of a counter or gauge; the rest below is of a histogram."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    unit: str
    attributes: dict[str, str]
    received: float
    value: float | None = None
    count: int | None = None
    sum: float | None = None
    bounds: list[float] | None = None
    counts: list[int] | None = None


class MetricList(msgspec.Struct, kw_only=True):
    device: str
    metrics: list[MetricValue]


class RequestInfo(msgspec.Struct, kw_only=True):
    """One request that a device served. Never what was asked or answered."""

    id: int
    """Rises with arrival at the gateway."""
    boot: str
    seq: int
    """Number of the batch it came in, counted from the device's start `boot`."""
    trace_id: str
    span_id: str
    operation: str
    request_model: str
    response_model: str
    response_id: str
    started_unix_ns: int
    """On the device's clock."""
    duration_s: float
    ttft_s: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reasons: list[str]
    error_type: str | None


class RequestPage(msgspec.Struct, kw_only=True):
    requests: list[RequestInfo]
    next: int | None = None
    """Give it as `after` for the next page."""


class Problem(msgspec.Struct, kw_only=True):
    """RFC 9457 problem details, the body of every error."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = None
