"""The instruments that requests feed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from . import semconv
from .metrics import Labels, Registry, labels_of
from .span import RequestRecord

UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """Sums over every request since the start."""

    requests: int
    failures: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int


class RequestInstruments:
    """Turns each request into numbers. Safe to use from any thread; about 30 µs a request."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter(semconv.REQUESTS, unit="{request}", text="Requests that ended.")
        self._failures = registry.counter(
            semconv.REQUEST_FAILURES, unit="{request}", text="Requests that ended with an error."
        )
        self._input = registry.counter(
            semconv.TOKENS_INPUT, unit="{token}", text="Tokens of prompts, cached ones included."
        )
        self._output = registry.counter(semconv.TOKENS_OUTPUT, unit="{token}", text="Tokens generated.")
        self._cached = registry.counter(
            semconv.TOKENS_CACHED, unit="{token}", text="Tokens of prompts that were not computed again."
        )
        self._make_histograms(registry)

    def _make_histograms(self, registry: Registry) -> None:
        seconds = partial(registry.histogram, unit="s", bounds=semconv.DURATION_BUCKETS_S)
        self._duration = seconds(semconv.SERVER_REQUEST_DURATION, text="From a request's arrival to its last token.")
        self._queue = seconds(semconv.QUEUE_DURATION, text="Waiting before prefill.")
        self._prefill = seconds(semconv.PREFILL_DURATION, text="Reading the prompt.")
        self._first_token = seconds(
            semconv.SERVER_TIME_TO_FIRST_TOKEN,
            text="From a request's arrival to its first token: queue and prefill.",
            bounds=semconv.FIRST_TOKEN_BUCKETS_S,
        )
        self._per_token = seconds(
            semconv.SERVER_TIME_PER_OUTPUT_TOKEN,
            text="Mean time of a token after the first, one observation a request.",
            bounds=semconv.OUTPUT_TOKEN_BUCKETS_S,
        )
        self._usage = registry.histogram(
            semconv.CLIENT_TOKEN_USAGE, unit="{token}", text="Tokens of one request.", bounds=semconv.TOKEN_BUCKETS
        )

    def observe(self, record: RequestRecord) -> None:
        """Count one request that ended."""
        labels = _labels(record)
        self._count(record, labels)
        self._duration.observe(record.duration_s, labels)
        self._queue.observe(record.queue_s, labels)
        if record.ttft_s is not None:
            self._prefill.observe(record.prefill_s, labels)
            self._first_token.observe(record.ttft_s, labels)
        if (per_token_s := record.time_per_output_token_s) is not None:
            self._per_token.observe(per_token_s, labels)

    def _count(self, record: RequestRecord, labels: Labels) -> None:
        self._requests.add(1, labels)
        if record.is_failure:
            self._failures.add(1, labels)
        self._input.add(record.input_tokens, labels)
        self._output.add(record.output_tokens, labels)
        self._cached.add(record.cached_tokens, labels)
        for kind, tokens in (("input", record.input_tokens), ("output", record.output_tokens)):
            if tokens > 0:
                self._usage.observe(tokens, tuple(sorted((*labels, (semconv.TOKEN_TYPE, kind)))))

    def totals(self) -> RequestTotals:
        """What was counted since the start."""
        counters = (self._requests, self._failures, self._input, self._output, self._cached)
        return RequestTotals(*(int(counter.total()) for counter in counters))


def _labels(record: RequestRecord) -> Labels:
    attributes = {
        semconv.OPERATION_NAME: record.operation,
        semconv.PROVIDER_NAME: semconv.PROVIDER,
        # What a client types belongs into spans: anyone could make labels of it without end.
        semconv.REQUEST_MODEL: record.known_model or UNKNOWN_MODEL,
        semconv.RESPONSE_MODEL: record.response_model if record.known_model else UNKNOWN_MODEL,
    }
    if record.error_type:
        attributes[semconv.ERROR_TYPE] = record.error_type
    return labels_of(attributes)
