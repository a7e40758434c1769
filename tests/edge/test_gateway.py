"""The gateway over the wire: what it keeps, what it refuses, what it tells."""

from __future__ import annotations

import gzip
import random
import resource
import socket
import sqlite3
import zlib
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Histogram, HistogramDataPoint, Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from edge.database import NewerFormat
from edge.errors import ConfigError, EdgeError, InvalidRequest, QueueFull, StoreError
from edge.gateway.ingest import MAX_BODY_BYTES, MAX_UNPACKED_BYTES, Batch, Signal, parse_batch, unpacked
from edge.gateway.ledger import MAX_WAITING, Ledger, Receipt
from edge.gateway.server import bind
from edge.telemetry import otlp
from edge.telemetry.instruments import RequestInstruments
from edge.telemetry.metrics import Registry
from edge.telemetry.span import span_of
from tests.edge.telemetry_parts import GatewayProcess, request_record, running_gateway
from tests.edge.test_outbox import no_file_larger_than
from tests.support import run_edge

HEADERS = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}


def body_of(device: str, *response_ids: str, **changes: Any) -> bytes:
    """A gzipped traces body of that device."""
    chance = random.Random(f"{device} {response_ids}")
    records = [request_record(response_id=name, started_unix_ns=10**18, **changes) for name in response_ids]
    spans = [span_of(record, entropy=chance.randbytes) for record in records]
    return otlp.encode_spans(otlp.Resource(device, "a-host", "1.2.3"), spans)


def metrics_of(device: str, registry: Registry) -> bytes:
    """A gzipped metrics body of that device."""
    return otlp.encode_metrics(otlp.Resource(device, "a-host", "1"), registry.collect(), start_unix_ns=1, now_unix_ns=2)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayProcess]:
    """A real gateway; each test is a device of its own."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def post(
    gateway: GatewayProcess, body: bytes, *, key: str | None = None, path: str = "/v1/traces", **more: str
) -> httpx.Response:
    """Send a body."""
    headers = {
        **HEADERS,
        **({"idempotency-key": key} if key else {}),
        **{k.replace("_", "-"): v for k, v in more.items()},
    }
    return httpx.post(f"{gateway.url}{path}", content=body, headers=headers, trust_env=False, timeout=30)


def device_info(gateway: GatewayProcess, device: str) -> dict[str, Any]:
    """What the gateway says of a device."""
    (found,) = (d for d in gateway.get("/fleet/v1/devices?limit=1000")["devices"] if d["id"] == device)
    return found


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    """The response is a problem of RFC 9457 that says those words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert problem["status"] == status
    for word in words:
        assert word in f"{problem['detail']} {problem['hint']}"


# ---------------------------------------------------------------- what is kept


def test_a_batch_is_kept_once_however_often_it_comes(gateway: GatewayProcess) -> None:
    body = body_of("once", "a", "b")
    for number in range(4):
        response = post(gateway, body, key="once/boot/1", edge_sent_unix_ms="1000")
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-protobuf"
        assert ExportTraceServiceResponse.FromString(response.content) == ExportTraceServiceResponse()
        assert ("idempotency-replayed" in response.headers) == (number > 0)
    info = device_info(gateway, "once")
    assert (info["hostname"], info["version"]) == ("a-host", "1.2.3")
    assert (info["num_batches"], info["num_duplicates"], info["num_requests"]) == (1, 3, 2)
    assert info["clock_skew_s"] < -1e9, "the device's clock stands in 1970"
    (a, b) = gateway.requests("once")
    assert (a["response_id"], b["response_id"], a["boot"], a["seq"]) == ("a", "b", "boot", 1)
    assert (a["duration_s"], a["ttft_s"], a["finish_reasons"], a["error_type"]) == (2.0, 1.0, ["stop"], None)


def test_a_request_that_comes_in_two_batches_is_counted_once(gateway: GatewayProcess) -> None:
    for number in (1, 2):
        assert post(gateway, body_of("spans", "same"), key=f"spans/boot/{number}").status_code == 200
    assert device_info(gateway, "spans")["num_requests"] == 1


def test_a_key_that_comes_with_another_body_is_refused(gateway: GatewayProcess) -> None:
    assert post(gateway, body_of("clash", "a"), key="clash/boot/1").status_code == 200
    assert_problem(post(gateway, body_of("clash", "b"), key="clash/boot/1"), 409, "another body")
    assert gateway.response_ids("clash") == ["a"]


def test_a_body_without_a_key_is_known_by_its_content(gateway: GatewayProcess) -> None:
    for body in (body_of("keyless", "a"), body_of("keyless", "a"), body_of("keyless", "b")):
        assert post(gateway, body).status_code == 200
    assert device_info(gateway, "keyless")["num_batches"] == 2
    assert gateway.response_ids("keyless") == ["a", "b"]


def test_a_plain_body_counts_as_much_as_a_gzipped_one(gateway: GatewayProcess) -> None:
    body = gzip.decompress(body_of("plain", "a"))
    assert post(gateway, body, key="plain/boot/1", content_encoding="identity").status_code == 200
    assert gateway.response_ids("plain") == ["a"]


def test_the_last_value_of_each_metric_is_told(gateway: GatewayProcess) -> None:
    registry = Registry()
    instruments = RequestInstruments(registry)
    values = [3.0]
    registry.gauge("hw.temperature", unit="Cel", text="T").watch(lambda: values[0])
    bodies: list[bytes] = []
    for _ in range(2):
        instruments.observe(request_record())
        values[0] += 1.5
        bodies.append(metrics_of("meter", registry))
    # The later one first: a number says what is newer, not the arrival.
    for number in (2, 1):
        response = post(gateway, bodies[number - 1], key=f"meter/boot/{number}", path="/v1/metrics")
        assert response.status_code == 200
    found = {m["name"]: m for m in gateway.get("/fleet/v1/devices/meter/metrics")["metrics"]}
    assert (found["hw.temperature"]["value"], found["hw.temperature"]["kind"]) == (6.0, "gauge")
    assert (found["edge.requests"]["value"], found["edge.requests"]["kind"]) == (2.0, "counter")
    duration = found["gen_ai.server.request.duration"]
    assert (duration["count"], duration["sum"], duration["unit"]) == (2, 4.0, "s")
    assert len(duration["counts"]) == len(duration["bounds"]) + 1
    assert duration["attributes"]["gen_ai.request.model"] == "smollm2:135m-instruct"


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path)
    gateway.start()
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(post, gateway, body_of("killed", f"r{n}"), key=f"killed/boot/{n + 1}") for n in range(40)
        ]
        statuses = [answer.result().status_code for answer in answers]
    gateway.kill()
    assert set(statuses) == {200}
    gateway.start()
    try:
        assert sorted(gateway.response_ids("killed")) == sorted(f"r{n}" for n in range(40))
        assert post(gateway, body_of("killed", "r7"), key="killed/boot/8").headers["idempotency-replayed"] == "true"
    finally:
        gateway.stop()
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("SELECT COUNT(*), COUNT(body) FROM batches").fetchone() == (40, 40)


# ---------------------------------------------------------------- what is refused


def bomb() -> bytes:
    """A hundred megabytes of zeros in a hundred kilobytes."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()


def changed_span(**fields: Any) -> bytes:
    """A request span with fields overwritten, gzipped."""
    request = ExportTraceServiceRequest.FromString(gzip.decompress(body_of("bad", "a")))
    span: Span = request.resource_spans[0].scope_spans[0].spans[0]
    for name, value in fields.items():
        setattr(span, name, value)
    return gzip.compress(request.SerializeToString())


def attributed_span(*attributes: KeyValue) -> bytes:
    """A request span with attributes added, gzipped."""
    request = ExportTraceServiceRequest.FromString(gzip.decompress(body_of("bad", "a")))
    request.resource_spans[0].scope_spans[0].spans[0].attributes.extend(attributes)
    return gzip.compress(request.SerializeToString())


BAD_BODIES: Mapping[str, bytes] = {
    "is no gzip": b"nothing of the kind",
    "whole gzip": gzip.compress(b"x" * 1000)[:-4],
    "one whole": gzip.compress(b"") + b"more",
    "unpacks to more": gzip.compress(bytes(MAX_UNPACKED_BYTES + 1)),
    "no OTLP": gzip.compress(b"\x0a\xff"),
    "fields that no OTLP request": gzip.compress(b"xx"),
    "16 and 8": changed_span(span_id=b"short"),
    "end before": changed_span(end_time_unix_nano=1),
    "characters": attributed_span(KeyValue(key="k" * 2000)),
    "attributes": attributed_span(*[KeyValue(key=f"k{n}") for n in range(70)]),
    "negative": attributed_span(KeyValue(key="gen_ai.usage.input_tokens", value=AnyValue(int_value=-1))),
    "device id": body_of("no/device", "a"),
}


@pytest.mark.parametrize("words", list(BAD_BODIES))
def test_an_invalid_body_is_refused_with_the_reason(gateway: GatewayProcess, words: str) -> None:
    assert_problem(post(gateway, BAD_BODIES[words]), 400, words)


def test_a_bomb_is_refused_before_it_goes_off(gateway: GatewayProcess) -> None:
    body = bomb()
    assert len(body) < MAX_BODY_BYTES
    assert gateway.process is not None
    assert_problem(post(gateway, body), 400, "unpacks to more")
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    (peak_kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak_kib < 300 * 1024


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "application/json"}, 415),
        ({"content_encoding": "br"}, 415),
        ({"key": "no key"}, 400),
        ({"key": "another/boot/1"}, 400),
        ({"key": "wrong/boot/0"}, 400),
        ({"host": "evil.example"}, 421),
        ({"host": "["}, 421),
        ({"path": "/v1/profiles"}, 404),
    ],
)
def test_a_wrong_header_is_refused(gateway: GatewayProcess, headers: dict[str, str], status: int) -> None:
    assert_problem(post(gateway, body_of("wrong", "a"), **headers), status)


def test_a_body_too_large_is_refused(gateway: GatewayProcess) -> None:
    assert_problem(post(gateway, bytes(MAX_BODY_BYTES + 1)), 413)


def test_a_wrong_question_is_a_problem(gateway: GatewayProcess) -> None:
    for path, status in (
        ("/fleet/v1/devices/nobody/requests", 404),
        ("/fleet/v1/devices/nobody/metrics", 404),
        ("/fleet/v1/devices?limit=0", 400),
        ("/fleet/v1/devices?limit=many", 400),
        ("/nowhere", 404),
    ):
        assert_problem(httpx.get(gateway.url + path, trust_env=False), status)
    assert_problem(httpx.get(f"{gateway.url}/v1/traces", trust_env=False), 405)
    assert "limit" in httpx.get(f"{gateway.url}/fleet/v1/devices?limit=0", trust_env=False).json()["detail"]


def test_pages_end(gateway: GatewayProcess) -> None:
    post(gateway, body_of("pager", *[f"r{n}" for n in range(10)]), key="pager/boot/1")
    first = gateway.get("/fleet/v1/devices/pager/requests?limit=4")
    rest = gateway.get(f"/fleet/v1/devices/pager/requests?limit=7&after={first['next']}")
    assert [r["response_id"] for r in first["requests"] + rest["requests"]] == [f"r{n}" for n in range(10)]
    assert rest["next"] is None
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = gateway.get(f"/fleet/v1/devices?limit=2&after={after}")
        seen += [device["id"] for device in page["devices"]]
        after = page["next"]
    assert seen == sorted(set(seen))
    assert "pager" in seen


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["traces", "metrics", "logs"]), st.binary(max_size=200))
def test_random_bytes_are_parsed_or_refused(signal: Signal, data: bytes) -> None:
    try:
        parse_batch(signal, data, data, key=None, sent_unix_s=None)
    except InvalidRequest:
        pass


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["traces", "metrics"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_damaged_bodies_are_parsed_or_refused(signal: Signal, where: int, damage: bytes) -> None:
    registry = Registry()
    RequestInstruments(registry).observe(request_record())
    body = body_of("dev", "a") if signal == "traces" else metrics_of("dev", registry)
    data = bytearray(gzip.decompress(body))
    where %= len(data)
    data[where : where + len(damage)] = damage
    try:
        parse_batch(signal, body, bytes(data), key=None, sent_unix_s=None)
    except InvalidRequest:
        pass


def test_a_histogram_must_be_one() -> None:
    for point in (
        HistogramDataPoint(count=1, bucket_counts=[1, 2], explicit_bounds=[1, 2, 3]),
        HistogramDataPoint(count=2**63),
        HistogramDataPoint(count=1, bucket_counts=[0] * 201, explicit_bounds=[float(n) for n in range(200)]),
    ):
        request = ExportMetricsServiceRequest()
        scope = request.resource_metrics.add().scope_metrics.add()
        scope.metrics.append(Metric(name="h", histogram=Histogram(data_points=[point])))
        data = request.SerializeToString()
        with pytest.raises(InvalidRequest):
            parse_batch("metrics", data, data, key=None, sent_unix_s=None)


def test_the_worst_body_costs_a_bounded_amount_of_memory() -> None:
    """Spans of two bytes each: what parses to the most memory for its size."""
    data = b"\x0a\x00" * (MAX_UNPACKED_BYTES // 2)
    assert unpacked(gzip.compress(data), "gzip") == data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parse_batch("traces", data, data, key=None, sent_unix_s=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


# ---------------------------------------------------------------- the ledger and the address


def batch(device: str, seq: int, *response_ids: str) -> Batch:
    """A parsed batch."""
    body = body_of(device, *response_ids)
    return parse_batch("traces", body, gzip.decompress(body), key=f"{device}/boot/{seq}", sent_unix_s=None)


def test_old_bodies_are_forgotten_and_their_keys_are_not(tmp_path: Path) -> None:
    size = len(batch("dev", 1, "r1").body)
    with closing(Ledger(tmp_path / "gateway.db", keep_bytes=3 * size + 10)) as ledger:
        for number in range(1, 9):
            assert ledger.store(batch("dev", number, f"r{number}")).result(10) is Receipt.STORED
        assert ledger.store(batch("dev", 1, "r1")).result(10) is Receipt.DUPLICATE
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        kept = db.execute("SELECT seq FROM batches WHERE body IS NOT NULL ORDER BY seq").fetchall()
        assert kept == [(6,), (7,), (8,)]
        assert db.execute("SELECT COUNT(*) FROM batches").fetchone() == (8,)


def test_a_disk_that_takes_nothing_is_said_and_gets_well(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "gateway.db")) as ledger:
        with no_file_larger_than(1024):
            failed = ledger.store(batch("dev", 1, "a"))
            assert isinstance(failed.exception(10), StoreError)
            assert ledger.error is not None
        assert ledger.store(batch("dev", 1, "a")).result(10) is Receipt.STORED
        assert ledger.error is None
        assert [r.response_id for r in ledger.requests("dev", after=0, limit=9).requests] == ["a"]


def test_too_many_at_once_are_told_to_wait(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gateway.db")
    ledger.close()
    for _ in range(MAX_WAITING):
        ledger.store(batch("dev", 1, "a"))
    with pytest.raises(QueueFull):
        ledger.store(batch("dev", 1, "a"))
    assert ledger.error == "The ledger is closed."


def test_a_newer_ledger_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "gateway.db").close()
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(NewerFormat):
        Ledger(tmp_path / "gateway.db")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="tell one device"):
        bind(host, 0)


def test_loopback_is_listened_on_once() -> None:
    with bind("localhost", 0) as listener, pytest.raises(ConfigError, match="--port"):
        bind("127.0.0.1", listener.getsockname()[1])
    if socket.has_ipv6:
        try:
            bind("::1", 0).close()
        except EdgeError:
            pytest.skip("no IPv6 on this machine's loopback")


def test_the_command_refuses_an_open_address(tmp_path: Path) -> None:
    refused = run_edge("gateway", "--host", "0.0.0.0", home=tmp_path)
    assert refused.returncode == 2
    assert "cannot tell one device from another" in refused.stderr
