"""OpenTelemetry names, as our own constants: the one place to change when the conventions change.

The GenAI conventions are in *Development* and moved to a repository of their own in 2026 (open-telemetry/
semantic-conventions-genai); the constants of the Python package are marked deprecated, so none is imported. What has
no name there is ours and begins with ``edge.``.
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
SCOPE_NAME: Final = "dev.slm-edge.telemetry"
PROVIDER: Final = "slm-edge"
"""Value of `PROVIDER_NAME`: none of the well-known providers is a local engine, and custom values are allowed."""

SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
DEVICE_ID: Final = "device.id"
HOST_NAME: Final = "host.name"

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105  # an attribute's name, no secret
ERROR_TYPE: Final = "error.type"
METRIC_OVERFLOW: Final = "otel.metric.overflow"
"""Marks the series that takes what a bounded instrument has no room for (metrics SDK specification, cardinality)."""

QUEUE_S: Final = "edge.queue.duration"
PREFILL_S: Final = "edge.prefill.duration"
KEY_ID: Final = "edge.api_key.id"

SERVER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"
SERVER_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"  # noqa: S105  # a metric's name
SERVER_TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"  # noqa: S105  # a metric's name
CLIENT_TOKEN_USAGE: Final = "gen_ai.client.token.usage"  # noqa: S105  # a metric's name
QUEUE_DURATION: Final = "edge.request.queue.duration"
PREFILL_DURATION: Final = "edge.request.prefill.duration"
REQUESTS: Final = "edge.requests"
REQUEST_FAILURES: Final = "edge.request.failures"
TOKENS_INPUT: Final = "edge.tokens.input"
TOKENS_OUTPUT: Final = "edge.tokens.output"
TOKENS_CACHED: Final = "edge.tokens.cached"
OUTBOX_ROWS: Final = "edge.outbox.rows"
OUTBOX_SIZE: Final = "edge.outbox.size"
OUTBOX_DROPPED: Final = "edge.outbox.dropped"
OUTBOX_QUARANTINED: Final = "edge.outbox.quarantined"
OUTBOX_SENT: Final = "edge.outbox.sent"
CPU_UTILIZATION: Final = "system.cpu.utilization"
MEMORY_AVAILABLE: Final = "system.memory.linux.available"
PROCESS_MEMORY: Final = "process.memory.usage"
TEMPERATURE: Final = "hw.temperature"
UPTIME: Final = "edge.uptime"

GAP_EVENT: Final = "edge.outbox.gap"
"""Name of the log event that says what the outbox lost before it could be sent."""
GAP_CLASS: Final = "edge.outbox.gap.class"
GAP_REASON: Final = "edge.outbox.gap.reason"
GAP_BATCHES: Final = "edge.outbox.gap.batches"
GAP_RECORDS: Final = "edge.outbox.gap.records"
GAP_BYTES: Final = "edge.outbox.gap.bytes"

DURATION_BUCKETS_S: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
FIRST_TOKEN_BUCKETS_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
# The convention ends at 2.5 s, which an edge CPU passes: 5 and 10 are ours.
OUTPUT_TOKEN_BUCKETS_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
TOKEN_BUCKETS: Final = tuple(float(4**power) for power in range(14))
