"""The registry, and its two renderings."""

from __future__ import annotations

import gzip
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from edge.telemetry import otlp, semconv
from edge.telemetry.host import CpuMeter, available_memory_bytes, process_memory_bytes, temperature_c, watch_host
from edge.telemetry.instruments import RequestInstruments
from edge.telemetry.metrics import MAX_SERIES, OVERFLOW, Registry, labels_of, render_prometheus
from tests.edge.telemetry_parts import request_record

Sample = tuple[str, frozenset[tuple[str, str]]]
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(rf'({_NAME})="((?:[^"\\\n]|\\[\\n"])*)"(,|$)')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", '\\"': '"'}


def parse_prometheus(text: str) -> tuple[dict[str, str], dict[Sample, float]]:
    """Types and samples of an exposition, strictly after the text format 0.0.4."""
    types: dict[str, str] = {}
    samples: dict[Sample, float] = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types, f"{name} has two blocks"
            types[name] = kind
        elif not line.startswith("# HELP "):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub("_(bucket|sum|count)$", "", match[1]) if match[1] not in types else match[1]
            assert family == list(types)[-1], "a sample stands in its own block"
            key = (match[1], frozenset(_labels(match[2] or "")))
            assert key not in samples, line
            samples[key] = float(match[3])
    return types, samples


def _labels(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while text:
        match = _LABEL.match(text)
        assert match, text
        found.append((match[1], re.sub(r"\\.", lambda m: _ESCAPES[m[0]], match[2])))
        text = text[match.end() :]
    assert len({name for name, _ in found}) == len(found)
    return found


def attributes(pairs: list[KeyValue]) -> dict[str, str]:
    """Text attributes as a mapping."""
    return {pair.key: pair.value.string_value for pair in pairs}


@given(
    st.dictionaries(st.sampled_from(["a", "b.c", "gen_ai.request.model"]), st.text(max_size=20)),
    st.lists(st.floats(allow_nan=False, width=32), max_size=20),
)
def test_prometheus_text_is_parsed_back(labels: Mapping[str, str], observations: list[float]) -> None:
    registry = Registry()
    histogram = registry.histogram("edge.a", unit="s", text='odd\n"help\\', bounds=(0.5, 1.0, 2.5))
    for value in observations:
        histogram.observe(value, labels_of(labels))
    if not observations:
        assert render_prometheus(registry.collect()) == ""
        return
    types, samples = parse_prometheus(render_prometheus(registry.collect()))
    assert types == {"edge_a_seconds": "histogram"}
    key = frozenset((name.replace(".", "_"), value) for name, value in labels.items())
    for bound, shown in ((0.5, "0.5"), (1.0, "1"), (2.5, "2.5"), (math.inf, "+Inf")):
        assert samples["edge_a_seconds_bucket", key | {("le", shown)}] == sum(v <= bound for v in observations)
    assert samples["edge_a_seconds_count", key] == len(observations)


def test_a_request_is_counted_under_opentelemetry_names() -> None:
    registry = Registry()
    RequestInstruments(registry).observe(request_record())
    types, samples = parse_prometheus(render_prometheus(registry.collect()))
    labels = {
        ("gen_ai_operation_name", "chat"),
        ("gen_ai_provider_name", "slm-edge"),
        ("gen_ai_request_model", "smollm2:135m-instruct"),
        ("gen_ai_response_model", "smollm2:135m-instruct"),
    }
    assert types["gen_ai_server_request_duration_seconds"] == "histogram"
    assert samples["edge_requests_total", frozenset(labels)] == 1
    assert samples["gen_ai_server_request_duration_seconds_sum", frozenset(labels)] == 2.0
    assert samples["gen_ai_server_time_to_first_token_seconds_sum", frozenset(labels)] == 1.0
    assert samples["gen_ai_server_time_per_output_token_seconds_sum", frozenset(labels)] == 0.1
    assert samples["gen_ai_server_time_per_output_token_seconds_bucket", frozenset({*labels, ("le", "10")})] == 1
    assert samples["gen_ai_client_token_usage_sum", frozenset({*labels, ("gen_ai_token_type", "input")})] == 12
    assert samples["gen_ai_client_token_usage_sum", frozenset({*labels, ("gen_ai_token_type", "output")})] == 11
    assert samples["edge_tokens_cached_total", frozenset(labels)] == 4
    assert samples["edge_request_queue_duration_seconds_sum", frozenset(labels)] == 0.25


def test_a_failure_without_tokens_says_nothing_of_token_times() -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    instruments.observe(request_record(error_type="worker_died", ttft_s=None, output_tokens=0))
    types, samples = parse_prometheus(render_prometheus(registry.collect()))
    assert "gen_ai_server_time_to_first_token_seconds" not in types
    (failures,) = (v for (name, _), v in samples.items() if name == "edge_request_failures_total")
    assert failures == 1
    assert all(("error_type", "worker_died") in labels for _, labels in samples)
    totals = instruments.totals()
    assert (totals.requests, totals.failures, totals.input_tokens, totals.output_tokens) == (1, 1, 12, 0)


def test_both_renderings_say_the_same() -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    registry.gauge("edge.models.loaded", unit="{model}", text="Models.").watch(lambda: 2)
    for number in range(50):
        instruments.observe(request_record(duration_s=number / 3, known_model=f"m{number % 4}"))
    metrics = registry.collect()
    _, samples = parse_prometheus(render_prometheus(metrics))
    body = otlp.encode_metrics(otlp.Resource("d", "h", "v"), metrics, start_unix_ns=5, now_unix_ns=9)
    request = ExportMetricsServiceRequest.FromString(gzip.decompress(body))
    assert request.resource_metrics[0].schema_url == semconv.SCHEMA_URL
    assert attributes(list(request.resource_metrics[0].resource.attributes)) == {
        "service.name": "slm-edge", "service.version": "v", "service.instance.id": "d", "device.id": "d",
        "host.name": "h",
    }  # fmt: skip
    found: dict[str, float] = {}
    for metric in request.resource_metrics[0].scope_metrics[0].metrics:
        if metric.HasField("histogram"):
            assert metric.histogram.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
            assert {p.start_time_unix_nano for p in metric.histogram.data_points} == {5}
            found[metric.name] = sum(p.sum for p in metric.histogram.data_points)
            assert all(sum(p.bucket_counts) == p.count for p in metric.histogram.data_points)
        elif metric.HasField("sum"):
            assert metric.sum.is_monotonic
            found[metric.name] = sum(p.as_int for p in metric.sum.data_points)
        else:
            found[metric.name] = metric.gauge.data_points[0].as_int
    assert found["edge.models.loaded"] == 2
    for name, shown in (
        ("gen_ai.server.request.duration", "gen_ai_server_request_duration_seconds_sum"),
        ("edge.tokens.input", "edge_tokens_input_total"),
        ("gen_ai.client.token.usage", "gen_ai_client_token_usage_sum"),
    ):
        assert math.isclose(found[name], sum(v for (n, _), v in samples.items() if n == shown))


def test_names_from_clients_cannot_fill_the_memory() -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    for number in range(3 * MAX_SERIES):
        instruments.observe(request_record(known_model=f"made-up-{number}" + "x" * 10_000))
    for metric in registry.collect():
        assert len(metric.points) <= MAX_SERIES + 1
        assert all(len(value) <= 256 for point in metric.points for _, value in point.labels)
        assert any(point.labels == OVERFLOW for point in metric.points)
    assert instruments.totals().requests == 3 * MAX_SERIES


def test_what_a_client_types_is_no_label() -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    for number in range(10):
        typed = {"request_model": f"typed-{number}", "response_model": f"typed-{number}"}
        instruments.observe(request_record(**typed, known_model="", error_type="model_not_found"))
    text = render_prometheus(registry.collect())
    assert "typed" not in text
    assert 'gen_ai_request_model="unknown",gen_ai_response_model="unknown"' in text


def test_counts_are_exact_under_many_threads() -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    threads = [threading.Thread(target=lambda: [instruments.observe(request_record()) for _ in range(500)])
               for _ in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert instruments.totals().requests == 4000
    assert instruments.totals().output_tokens == 44_000


def test_a_gauge_that_fails_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    registry.gauge("edge.bad", unit="1", text="Bad.").watch(lambda: 1 / 0)
    registry.gauge("edge.absent", unit="1", text="Absent.").watch(lambda: None)
    registry.gauge("edge.good", unit="Cel", text="Good.").watch(lambda: 41.5, labels_of({"sensor": "cpu"}))
    registry.collect()
    types, samples = parse_prometheus(render_prometheus(registry.collect()))
    assert types == {"edge_good_celsius": "gauge"}
    assert samples == {("edge_good_celsius", frozenset({("sensor", "cpu")})): 41.5}
    assert len(caplog.records) == 1, "each is reported once"


def test_the_host_is_read() -> None:
    registry = Registry()
    watch_host(registry)
    _, samples = parse_prometheus(render_prometheus(registry.collect()))
    assert 0 <= samples["system_cpu_utilization_ratio", frozenset()] <= 1
    assert samples["system_memory_linux_available_bytes", frozenset()] > 2**20
    assert 2**20 < process_memory_bytes() < 2**40
    assert available_memory_bytes() > 2**20
    assert 0 <= CpuMeter().read() <= 1


def test_the_hottest_plausible_sensor_counts(tmp_path: Path) -> None:
    assert temperature_c(hwmon=tmp_path, thermal=tmp_path) is None
    for name, text in (("hwmon0/temp1_input", "41500\n"), ("hwmon0/temp2_input", "-273000"), ("hwmon1/temp1_input", ""),
                       ("thermal_zone0/temp", "52000"), ("thermal_zone1/temp", "65535000")):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert temperature_c(hwmon=tmp_path, thermal=tmp_path) == 52.0
