"""From a request that ended to the gateway's table: also through kills, lost replies and disks that fail."""

from __future__ import annotations

import gzip
import json
import math
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from edge.config import Settings, without_password
from edge.database import NewerFormat
from edge.errors import ConfigError, StoreError
from edge.telemetry import otlp, writer
from edge.telemetry.identity import OutboxLock
from edge.telemetry.outbox import Priority, read_rows
from edge.telemetry.service import LOCK_NAME, OutboxState, Telemetry, read_state
from edge.telemetry.span import RequestRecord, parse_trace_parent, span_of
from runtime.api.schema import OutboxStatus
from tests.edge.telemetry_parts import FaultProxy, GatewayProcess, request_record, running_gateway, start_device
from tests.edge.test_outbox import no_file_larger_than
from tests.support import free_port, run_edge, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def settings(home: Path, url: str = "", *, metrics_interval_s: float = 1000) -> Settings:
    """Settings with that gateway, and metrics out of the way."""
    return Settings(home=home, gateway_url=url, metrics_interval_s=metrics_interval_s)


def nobody() -> str:
    """An address at which nothing answers."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayProcess]:
    """A real gateway."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


# ---------------------------------------------------------------- the span


def encoded(record: RequestRecord) -> Span:
    """The record's span as OTLP, decoded again."""
    body = otlp.encode_spans(otlp.Resource("d", "h", "v"), [span_of(record, entropy=lambda n: b"\1" * n)])
    request = ExportTraceServiceRequest.FromString(gzip.decompress(body))
    return request.resource_spans[0].scope_spans[0].spans[0]


def test_a_request_becomes_a_span_under_opentelemetry_names() -> None:
    record = request_record(started_unix_ns=10**18, temperature=0.5, seed=7, trace_parent=PARENT, key_id="app")
    span = encoded(record)
    assert (span.name, span.kind) == ("chat smollm2", Span.SPAN_KIND_INTERNAL)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert span.end_time_unix_nano - span.start_time_unix_nano == 2_000_000_000
    values = {a.key: a.value for a in span.attributes}
    assert values["gen_ai.usage.input_tokens"].int_value == 12
    assert values["gen_ai.usage.cache_read.input_tokens"].int_value == 4
    assert values["gen_ai.request.temperature"].double_value == 0.5
    assert values["gen_ai.request.stream"].bool_value is True
    assert [v.string_value for v in values["gen_ai.response.finish_reasons"].array_value.values] == ["stop"]
    assert values["gen_ai.response.time_to_first_chunk"].double_value == 1.0
    assert "gen_ai.request.top_p" not in values
    assert span.status.code == Status.STATUS_CODE_UNSET


def test_a_failure_is_an_error_span() -> None:
    span = encoded(request_record(error_type="worker_died", ttft_s=None))
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "worker_died")
    assert {a.value.string_value for a in span.attributes if a.key == "error.type"} == {"worker_died"}


def test_a_caller_that_leaves_is_no_failure(tmp_path: Path) -> None:
    record = request_record(error_type="cancelled")
    assert encoded(record).status.code == Status.STATUS_CODE_UNSET
    telemetry = Telemetry(settings(tmp_path))
    telemetry.record(record)
    assert (telemetry.totals().requests, telemetry.totals().failures) == (1, 0)


@given(st.text(max_size=80))
def test_a_trace_parent_is_valid_or_none(text: str) -> None:
    assert parse_trace_parent(text) is None
    assert parse_trace_parent(PARENT + text) == (parse_trace_parent(PARENT) if not text else None)


@pytest.mark.parametrize("bad", ["ff" + PARENT[2:], PARENT.replace("b7ad6b7169203331", "0" * 16), PARENT.upper(), None])
def test_an_invalid_trace_parent_begins_a_new_trace(bad: str | None) -> None:
    assert parse_trace_parent(bad) is None


@given(
    st.text(st.characters(exclude_categories=()), max_size=300),
    st.floats(),
    st.integers() | st.none(),
    st.integers(-(2**70), 2**70),
)
def test_whatever_a_client_sends_can_be_encoded(text: str, number: float, seed: int | None, started: int) -> None:
    record = request_record(
        request_model=text, response_id=text, finish_reasons=(text,) * 40, temperature=number, seed=seed
    )
    span = encoded(record)
    assert all(len(a.key) < 100 and len(a.value.string_value) <= 256 for a in span.attributes)
    assert len(span.SerializeToString()) < 60_000


# ---------------------------------------------------------------- the facade


def test_importing_costs_no_protobuf_no_http_no_psutil() -> None:
    code = "import sys, edge.telemetry.service; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {m.partition(".")[0] for m in loaded} & {"google", "opentelemetry", "httpx", "psutil", "litestar"}


def test_without_a_gateway_there_are_numbers_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = set(threading.enumerate())
    telemetry = Telemetry(settings(tmp_path))
    telemetry.start()
    for _ in range(3):
        telemetry.record(request_record())
    telemetry.sync()
    assert telemetry.flush() == OutboxState(enabled=False, limit_bytes=64 << 20)
    assert set(threading.enumerate()) == before
    telemetry.close()
    assert [file.name for file in tmp_path.iterdir()] == ["device-id"]
    assert "edge_requests_total{" in telemetry.prometheus()
    assert telemetry.totals().requests == 3


def test_records_reach_the_gateway_and_the_status_says_so(tmp_path: Path, gateway: GatewayProcess) -> None:
    telemetry = Telemetry(settings(tmp_path, gateway.url))
    telemetry.add_gauge("edge.models.loaded", lambda: 2, unit="{model}")
    telemetry.start()
    telemetry.record(request_record(response_id="good"))
    telemetry.record(request_record(response_id="bad", error_type="worker_died"))
    state = telemetry.flush()
    assert (state.enabled, state.rows, state.last_error) == (True, 0, None)
    assert state.sent_batches == 3
    OutboxStatus(**{field: getattr(state, field) for field in OutboxState.__slots__})
    found = {r["response_id"]: r for r in gateway.requests(telemetry.device_id)}
    assert found["bad"]["error_type"] == "worker_died"
    assert (found["good"]["input_tokens"], found["good"]["output_tokens"], found["good"]["cached_tokens"]) == (
        12,
        11,
        4,
    )
    metrics = gateway.get(f"/fleet/v1/devices/{telemetry.device_id}/metrics")["metrics"]
    values = {m["name"]: m for m in metrics}
    assert values["edge.models.loaded"]["value"] == 2
    assert sum(m["count"] for m in metrics if m["name"] == "gen_ai.server.request.duration") == 2
    assert "edge_outbox_sent 3" in telemetry.prometheus()
    telemetry.close()
    telemetry.close()


def test_records_are_on_the_disk_within_a_second(tmp_path: Path) -> None:
    telemetry = Telemetry(settings(tmp_path, nobody()))
    telemetry.start()
    with closing(telemetry):
        started = time.monotonic()
        telemetry.record(request_record())
        wait_until(lambda: telemetry.status().rows == 1, what="the commit")
        assert time.monotonic() - started < 1.0


def test_metrics_are_spooled_by_the_clock(tmp_path: Path) -> None:
    telemetry = Telemetry(settings(tmp_path, nobody(), metrics_interval_s=0.05))
    telemetry.start()
    with closing(telemetry):
        wait_until(lambda: telemetry.status().rows >= 3, what="three rows of metrics")
    assert {row.priority for row in read_rows(tmp_path / "telemetry.db")} == {Priority.METRIC}


def test_closing_keeps_what_was_recorded(tmp_path: Path) -> None:
    telemetry = Telemetry(settings(tmp_path, nobody()))
    telemetry.start()
    for number in range(1200):
        telemetry.record(request_record(response_id=str(number)))
    telemetry.close()
    rows = [row for row in read_rows(tmp_path / "telemetry.db") if row.signal == "traces"]
    assert sum(row.records for row in rows) == 1200
    assert max(row.records for row in rows) <= writer.MAX_RECORDS_PER_ROW
    telemetry.record(request_record())
    with pytest.raises(StoreError, match="closed"):
        telemetry.sync()


def test_a_record_that_cannot_be_encoded_costs_itself_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry(settings(tmp_path, nobody()))
    telemetry.start()
    with closing(telemetry):
        for number in range(9):
            telemetry.record(request_record(input_tokens=2**70 if number == 4 else 1))
        telemetry.sync()
        (row,) = (r for r in read_rows(tmp_path / "telemetry.db") if r.signal == "traces" and r.records == 4)
        assert row.records == 4
        found = read_rows(tmp_path / "telemetry.db")
        assert sum(r.records for r in found if r.signal == "traces") == 8
    assert "cannot be encoded" in caplog.text


def test_a_full_disk_stops_nobody_and_what_waits_is_written_later(tmp_path: Path) -> None:
    telemetry = Telemetry(settings(tmp_path, nobody()))
    telemetry.start()
    with closing(telemetry):
        telemetry.record(request_record(response_id="before"))
        telemetry.sync()
        with no_file_larger_than(1024):
            telemetry.record(request_record(response_id="meanwhile"))
            with pytest.raises(StoreError):
                telemetry.sync()
            error = telemetry.status().last_error
            assert error is not None
            assert "telemetry.db" in error
        telemetry.record(request_record(response_id="after"))
        telemetry.sync()
        bodies = str(
            [otlp.decode("traces", r.body) for r in read_rows(tmp_path / "telemetry.db") if r.signal == "traces"]
        )
        assert all(bodies.count(f"'{name}'") == 1 for name in ("before", "meanwhile", "after"))


def test_what_no_longer_fits_in_memory_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_BUFFERED_RECORDS", 10)
    telemetry = Telemetry(settings(tmp_path, nobody()))
    telemetry.start()
    # the disk is well again before the last commit, at closing
    with closing(telemetry), no_file_larger_than(1024):
        for number in range(8):
            telemetry.record(request_record(response_id=str(number)))
        with pytest.raises(StoreError):
            telemetry.sync()
        for number in range(8, 38):
            telemetry.record(request_record(response_id=str(number)))
    with closing(sqlite3.connect(tmp_path / "telemetry.db")) as db:
        lost = dict(db.execute("SELECT reason, records FROM gaps").fetchall())
    kept = sum(r.records for r in read_rows(tmp_path / "telemetry.db") if r.signal == "traces")
    assert (lost, kept) == ({"buffer_full": 20}, 18)


def test_a_damaged_outbox_is_set_aside_and_reported(tmp_path: Path, gateway: GatewayProcess) -> None:
    (tmp_path / "telemetry.db").write_bytes(b"no database" * 4096)
    telemetry = Telemetry(settings(tmp_path, gateway.url))
    telemetry.start()
    with closing(telemetry):
        telemetry.record(request_record(response_id="after"))
        assert telemetry.flush().rows == 0
        assert gateway.response_ids(telemetry.device_id) == ["after"]
    assert (tmp_path / "telemetry.db.damaged").exists()


def test_a_newer_outbox_and_a_second_appliance_are_refused(tmp_path: Path) -> None:
    first = Telemetry(settings(tmp_path, nobody()))
    first.start()
    with closing(first), pytest.raises(StoreError, match="Another process"):
        Telemetry(settings(tmp_path, nobody())).start()
    with closing(sqlite3.connect(tmp_path / "telemetry.db")) as db:
        db.execute("PRAGMA user_version=99")
    refused = Telemetry(settings(tmp_path, nobody()))
    with pytest.raises(NewerFormat):
        refused.start()
    OutboxLock(tmp_path / LOCK_NAME).acquire()


@pytest.mark.parametrize("url", ["http://", "http://:80", "http://host:99999", "http://host/?q=1", "http://host:0"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="gateway_url"):
        Telemetry(settings(tmp_path, url))


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    assert without_password("https://me:secret@host:1/x") == "https://***@host:1/x"
    assert read_state(settings(tmp_path, "http://me:secret@host")).gateway_url == "http://***@host"


# ---------------------------------------------------------------- kills


def finish(process: subprocess.Popen[str]) -> list[str]:
    """What a device said until it ended or was killed."""
    assert process.stdout is not None
    lines = process.stdout.read().split("\n")
    process.stdout.close()
    process.wait()
    return lines


def test_two_hundred_requests_and_a_kill(tmp_path: Path) -> None:
    """The gateway is down; the device is killed a second after its last request; one reply in five is lost."""
    down = GatewayProcess(tmp_path / "gateway")
    with FaultProxy(down.url, lambda number: "lose_reply" if number % 5 == 0 else "pass") as proxy:
        device = start_device(tmp_path / "device", nobody(), "r", "200")
        assert device.stdout is not None
        device_id = device.stdout.readline().split()[1]
        assert device.stdout.readline() == "recorded 200\n"
        time.sleep(1.0)  # the promise is a second, and this is what is tested
        device.kill()
        finish(device)
        down.start()
        try:
            again = start_device(tmp_path / "device", proxy.url, "again", "0")
            assert "empty" in finish(again)
            assert again.returncode == 0
            assert Counter(down.response_ids(device_id)) == Counter(f"r-{n}" for n in range(200))
            boots = {request["boot"] for request in down.requests(device_id)}
            assert len(boots) == 1, "what an earlier start left keeps its key"
        finally:
            down.stop()
    assert any(seen.fault == "lose_reply" for seen in proxy.seen)


def test_killed_at_any_moment_nothing_committed_is_lost_or_doubled(tmp_path: Path, gateway: GatewayProcess) -> None:
    """Kills between append and acknowledgement: the device commits each record while its forwarder is at work."""
    chance = random.Random(11)
    committed: set[str] = set()
    device_id = ""
    with FaultProxy(gateway.url, lambda _: "lose_reply" if chance.random() < 0.2 else "pass") as proxy:
        for number in range(8):
            process = start_device(tmp_path, proxy.url, f"k{number}", "400", "sync")
            assert process.stdout is not None
            device_id = process.stdout.readline().split()[1]
            said = [process.stdout.readline() for _ in range(chance.randrange(1, 60))]
            time.sleep(chance.random() * 0.02)  # at any point of a round, not after a line only
            process.kill()
            said += finish(process)
            num_committed = sum(line.startswith("committed ") for line in said)
            committed |= {f"k{number}-{n}" for n in range(num_committed)}
        assert "empty" in finish(start_device(tmp_path, proxy.url, "last", "0"))
    arrived = Counter(gateway.response_ids(device_id))
    assert set(arrived.values()) == {1}
    assert committed <= set(arrived)
    assert len(arrived) - len(committed) <= 8, "at most the record that was being committed at each kill"
    assert len(committed) > 50


# ---------------------------------------------------------------- the command


def test_the_command_shows_and_flushes_what_waits(tmp_path: Path, gateway: GatewayProcess) -> None:
    home = tmp_path / "home"
    assert "nothing is kept" in run_edge("telemetry", "status", home=home).stdout
    assert not home.exists(), "looking makes nothing"
    telemetry = Telemetry(settings(home, nobody()))
    telemetry.start()
    telemetry.record(request_record(request_model="evil\x1b[2Jmodel", response_id="cli"))
    telemetry.close()
    dead = nobody()
    status = json.loads(run_edge("telemetry", "status", "--json", home=home, EDGE_GATEWAY_URL=dead).stdout)
    assert (status["rows"], status["enabled"], status["gateway_url"]) == (2, True, dead)
    tail = run_edge("telemetry", "tail", home=home).stdout
    assert "gen_ai.usage.input_tokens=12" in tail
    assert "\x1b[2J" not in tail, "a terminal obeys no client"
    lines = run_edge("telemetry", "tail", "--json", "-n", "1", home=home).stdout.splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["/v1/metrics"]
    failed = run_edge("telemetry", "flush", home=home, EDGE_GATEWAY_URL=dead)
    assert failed.returncode == 4
    assert "still wait: gateway URL does not answer (connection refused)." in failed.stderr
    with OutboxLock(home / LOCK_NAME):
        held = run_edge("telemetry", "flush", home=home, EDGE_GATEWAY_URL=gateway.url)
        assert held.returncode == 1
        assert "Another process" in held.stderr
    assert run_edge("telemetry", "flush", home=home).returncode == 2
    done = run_edge("telemetry", "flush", "--json", home=home, EDGE_GATEWAY_URL=gateway.url)
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, 0)
    empty = run_edge("telemetry", "tail", home=home)
    assert (empty.stdout, empty.stderr) == ("", "nothing waits: what was kept is sent (see: edge telemetry status)\n")
    assert gateway.response_ids(telemetry.device_id) == ["cli"]


def test_time_per_token_needs_two_tokens() -> None:
    assert request_record(output_tokens=1).time_per_output_token_s is None
    assert request_record(ttft_s=None).time_per_output_token_s is None
    assert math.isclose(request_record().time_per_output_token_s or 0, 0.1)
