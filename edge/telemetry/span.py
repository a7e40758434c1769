"""What one request was, and the span it becomes. Never what was asked or answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from . import semconv

Operation = Literal["chat", "text_completion", "embeddings", "rerank", "count", "tokenize"]
AttributeValue = str | bool | int | float | tuple[str, ...]
Entropy = Callable[[int], bytes]
"""Gives that many random bytes, as `os.urandom` does."""

CANCELLED = "cancelled"
"""The `error_type` of a request whose caller went away: an end like any other, and nobody's failure."""
MAX_TEXT = 256
"""Characters kept of any text that came from outside."""
MAX_FINISH_REASONS = 16
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request that ended, well or badly. Times are seconds unless the name says otherwise.

    Attributes:
        duration_s: From its arrival to its last token, `queue_s` included.
        ttft_s: From its arrival to its first token; None if there was none.
        input_tokens: Tokens of the prompt, cached ones included.
        error_type: Stable code of the error that ended it; None if it ended well.
        trace_parent: The caller's W3C ``traceparent`` header; an invalid one is as none.
        key_id: Name of the API key that asked, never the key.
        known_model: The model's whole name; empty where none was found.
    """

    operation: Operation
    request_model: str
    response_model: str
    started_unix_ns: int
    duration_s: float
    queue_s: float
    prefill_s: float
    ttft_s: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reasons: tuple[str, ...]
    response_id: str
    stream: bool
    error_type: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    trace_parent: str | None = None
    key_id: str | None = None
    known_model: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether it ended with an error that is not the caller's own leaving."""
        return self.error_type not in (None, CANCELLED)

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of a token after the first; None where fewer than two were generated."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return max(0.0, self.duration_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """One timed fact under OpenTelemetry's names. Ids are raw bytes: 16 of the trace, 8 of the span.

    `error_type` sets the span's status; None leaves it unset.
    """

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    name: str
    start_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, AttributeValue]
    error_type: str | None


def bounded(text: str) -> str:
    """At most `MAX_TEXT` characters that UTF-8 can carry: a lone surrogate, which JSON can spell, becomes ``?``."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")


def parse_trace_parent(header: str | None) -> tuple[bytes, bytes] | None:
    """Trace id and parent span id of a ``traceparent`` header, or None if it is absent or invalid.

    Source: W3C Trace Context, section 3.2.2: version ff, and ids of zeros only, are invalid.
    """
    match = _TRACE_PARENT.fullmatch(header[:64]) if header else None
    if match is None or match.string.startswith("ff"):
        return None
    trace_id, span_id = bytes.fromhex(match[1]), bytes.fromhex(match[2])
    return (trace_id, span_id) if any(trace_id) and any(span_id) else None


def span_of(record: RequestRecord, *, entropy: Entropy) -> Span:
    """The span of a request, its own id drawn from `entropy`; its trace is the caller's where it named one."""
    parent = parse_trace_parent(record.trace_parent)
    return Span(
        trace_id=parent[0] if parent else entropy(16),
        span_id=entropy(8),
        parent_span_id=parent[1] if parent else b"",
        name=f"{record.operation} {bounded(record.request_model)}",
        start_unix_ns=max(0, record.started_unix_ns),
        end_unix_ns=max(0, record.started_unix_ns) + round(max(0.0, record.duration_s) * 1e9),
        attributes={name: value for name, value in _attributes(record).items() if value is not None},
        error_type=bounded(record.error_type) if record.error_type and record.is_failure else None,
    )


def _attributes(record: RequestRecord) -> dict[str, AttributeValue | None]:
    return {
        semconv.OPERATION_NAME: record.operation,
        semconv.PROVIDER_NAME: semconv.PROVIDER,
        semconv.REQUEST_MODEL: bounded(record.request_model),
        semconv.RESPONSE_MODEL: bounded(record.response_model),
        semconv.RESPONSE_ID: bounded(record.response_id),
        semconv.RESPONSE_FINISH_REASONS: tuple(bounded(r) for r in record.finish_reasons[:MAX_FINISH_REASONS]),
        semconv.REQUEST_STREAM: record.stream,
        semconv.REQUEST_TEMPERATURE: record.temperature,
        semconv.REQUEST_TOP_P: record.top_p,
        semconv.REQUEST_MAX_TOKENS: _int64(record.max_tokens),
        semconv.REQUEST_SEED: _int64(record.seed),
        semconv.USAGE_INPUT_TOKENS: record.input_tokens,
        semconv.USAGE_OUTPUT_TOKENS: record.output_tokens,
        semconv.USAGE_CACHE_READ_INPUT_TOKENS: record.cached_tokens,
        semconv.RESPONSE_TIME_TO_FIRST_CHUNK: record.ttft_s,
        semconv.QUEUE_S: record.queue_s,
        semconv.PREFILL_S: record.prefill_s,
        semconv.KEY_ID: bounded(record.key_id) if record.key_id else None,
        semconv.ERROR_TYPE: bounded(record.error_type) if record.error_type else None,
    }


def _int64(value: int | None) -> int | None:
    """The number if the wire can carry it: a client may send any."""
    return value if value is not None and -(2**63) <= value < 2**63 else None
