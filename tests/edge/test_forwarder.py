"""Forwarding: what each answer means, how long to wait, and that a lost reply costs a resend and no more."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from edge.errors import StoreError
from edge.telemetry.encoder import RowEncoder
from edge.telemetry.exporter import Accepted, Delivery, OtlpHttpExporter, Rejected, Unavailable
from edge.telemetry.forwarder import BASE_WAIT_S, DISK_WAIT_S, MAX_WAIT_S, Forwarder, ForwarderThread
from edge.telemetry.outbox import MAX_REJECTIONS, Gap, NewRow, Outbox, Priority, Row, read_rows
from edge.telemetry.writer import OutboxWriter
from tests.edge.telemetry_parts import FaultProxy, GatewayProcess, ScriptedServer, request_record, running_gateway
from tests.edge.test_outbox import DEVICE, Clock, open_outbox, usage
from tests.support import free_port, wait_until

PROTOBUF = {"content-type": "application/x-protobuf"}


class ScriptedExporter:
    """Answers what it is told to, and keeps what it was given."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.deliveries = list(deliveries)
        self.keys: list[str] = []

    def export(self, row: Row) -> Delivery:
        self.keys.append(row.key)
        return self.deliveries.pop(0) if len(self.deliveries) > 1 else self.deliveries[0]


@pytest.fixture
def clock() -> Clock:
    """Time that the test moves."""
    return Clock()


@pytest.fixture
def outbox(tmp_path: Path, clock: Clock) -> Generator[Outbox]:
    """An outbox with three rows."""
    with closing(open_outbox(tmp_path / "telemetry.db", clock=clock)) as opened:
        opened.append([usage(b"1"), usage(b"2"), usage(b"3")])
        yield opened


def test_rows_are_sent_in_order_and_forgotten(outbox: Outbox) -> None:
    exporter = ScriptedExporter(Accepted())
    forwarder = Forwarder(outbox, exporter)
    first = forwarder.step()
    assert (first.num_sent, first.wait_s, first.error) == (3, 0.0, None)
    assert [key[-2:] for key in exporter.keys] == ["/1", "/2", "/3"]
    assert forwarder.step().wait_s is None
    outbox.append([usage(b"4")])
    assert forwarder.step().num_sent == 1
    stats = outbox.stats()
    assert (stats.rows, stats.sent_rows) == (0, 4)


def test_what_was_delivered_before_a_failure_is_not_sent_again(outbox: Outbox) -> None:
    exporter = ScriptedExporter(Accepted(), Unavailable("link down"), Accepted())
    forwarder = Forwarder(outbox, exporter, chance=lambda: 0.5)
    progress = forwarder.step()
    assert (progress.num_sent, progress.wait_s, progress.error) == (1, BASE_WAIT_S / 2, "link down")
    forwarder.step()
    assert [key[-2:] for key in exporter.keys] == ["/1", "/2", "/2", "/3"]


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30))
def test_waits_are_jittered_over_a_bound_that_doubles(chances: Sequence[float]) -> None:
    class OneRow:
        def lease(self, max_rows: int) -> list[Row]:
            return [Row(1, "d/b/1", Priority.USAGE, "traces", 1, 0.0, 0, False, b"")]

        def acknowledge(self, ids: object) -> None: ...
        def release(self, ids: object) -> None: ...
        def reject(self, row_id: int, *, retry_after_s: float) -> None: ...

    drawn = iter(chances)
    forwarder = Forwarder(OneRow(), ScriptedExporter(Unavailable("down")), chance=lambda: next(drawn))
    for number, chance in enumerate(chances):
        assert forwarder.step().wait_s == chance * min(MAX_WAIT_S, BASE_WAIT_S * 2**number)


def test_retry_after_is_the_least_wait(outbox: Outbox) -> None:
    forwarder = Forwarder(outbox, ScriptedExporter(Unavailable("busy", 40.0)), chance=lambda: 0.9)
    assert [forwarder.step().wait_s for _ in range(3)] == [40.0, 40.0, 40.0]


def test_an_invalid_row_is_tried_a_few_times_then_set_aside_and_reported(outbox: Outbox, clock: Clock) -> None:
    class OneIsBad(ScriptedExporter):
        def export(self, row: Row) -> Delivery:
            self.keys.append(row.key)
            return Rejected("no OTLP") if row.body == b"2" else Accepted()

    exporter = OneIsBad(Accepted())
    forwarder = Forwarder(outbox, exporter)
    assert forwarder.step().num_sent == 2, "the others go past it"
    assert forwarder.step().wait_s is None, "it is not due at once"
    for _ in range(10):
        clock.now_s += 3600
        forwarder.step()
    assert sum(key.endswith("/2") for key in exporter.keys) == MAX_REJECTIONS
    stats = outbox.stats()
    assert (stats.rows, stats.quarantined_rows, stats.dropped_rows) == (0, 1, 0)
    assert exporter.keys[-1].endswith("/4"), "the gap was reported"
    (aside,) = read_rows(outbox.path)
    assert (aside.body, aside.is_quarantined) == (b"2", True)


def test_a_disk_that_takes_no_acknowledgement_stops_the_sending(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = ScriptedExporter(Accepted())
    forwarder = Forwarder(outbox, exporter)

    def fail(ids: object) -> None:
        if ids:
            raise StoreError("full")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "acknowledge", fail)
        assert forwarder.step().wait_s == DISK_WAIT_S
        assert forwarder.step().error == "full"
    forwarder.step()
    assert len(exporter.keys) == 3, "nothing was sent twice"
    assert outbox.stats().rows == 0


def _row(body: bytes = b"body") -> Row:
    return Row(1, "d/b/1", Priority.USAGE, "traces", 4, 0.0, 0, False, body)


PARTIAL = ExportTraceServiceResponse(
    partial_success=ExportTracePartialSuccess(rejected_spans=3, error_message="too old")
).SerializeToString()


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (200, PROTOBUF, b"", Accepted()),
        (200, {}, b"", Accepted()),
        (200, PROTOBUF, PARTIAL, Accepted(3)),
        (200, {"content-type": "text/html"}, b"<html>log in to the wifi", Unavailable),
        (200, {"content-type": "text/html"}, b"", Unavailable),
        (200, PROTOBUF, b"\xff\xff\xff", Unavailable),
        (204, {}, b"", Unavailable),
        (302, {"location": "http://127.0.0.1:1/"}, b"", Unavailable),
        (400, {}, b"bad", Rejected),
        (409, {}, b"", Rejected),
        (413, {}, b"", Rejected),
        (401, {}, b"", Unavailable),
        (404, {}, b"", Unavailable),
        (429, {"retry-after": "7"}, b"", Unavailable),
        (503, {"retry-after": "999999999999"}, b"", Unavailable),
        (500, {}, b"x" * 1_000_000, Unavailable),
    ],
)
def test_what_an_answer_means(
    status: int, headers: Mapping[str, str], body: bytes, expected: Delivery | type[Delivery]
) -> None:
    with ScriptedServer((status, headers, body)) as server, OtlpHttpExporter(f"{server.url}/base/") as exporter:
        delivery = exporter.export(_row())
        assert delivery == expected or isinstance(delivery, expected if isinstance(expected, type) else ())
        assert server.paths == ["/base/v1/traces"]
        assert server.keys == ["d/b/1"]
        if isinstance(delivery, Unavailable | Rejected):
            assert len(delivery.reason) < 500
        if "retry-after" in headers:
            assert isinstance(delivery, Unavailable)
            assert delivery.retry_after_s in (7.0, 3600.0)


def test_a_retry_date_counts_from_the_answers_own_clock() -> None:
    headers = {"date": "Thu, 01 Jan 1970 00:00:00 GMT", "retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}
    with ScriptedServer((503, headers, b"")) as server, OtlpHttpExporter(server.url) as exporter:
        delivery = exporter.export(_row())
    assert isinstance(delivery, Unavailable)
    assert delivery.retry_after_s == 120.0


def test_nobody_there_and_a_stall_are_the_links_fault() -> None:
    with OtlpHttpExporter(f"http://127.0.0.1:{free_port()}") as exporter:
        assert exporter.export(_row()) == Unavailable("gateway URL does not answer (connection refused)")
    with (
        FaultProxy("http://127.0.0.1:1", lambda _: "stall") as proxy,
        OtlpHttpExporter(proxy.url, reply_timeout_s=0.2) as exporter,
    ):
        delivery = exporter.export(_row())
    assert isinstance(delivery, Unavailable)
    assert delivery.reason == "gateway URL does not answer (timed out)"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayProcess]:
    """A real gateway."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def test_one_reply_in_five_lost_and_each_record_arrives_once(tmp_path: Path, gateway: GatewayProcess) -> None:
    chance = random.Random(5)
    encoder = RowEncoder(lambda: (), device_id=DEVICE, host_name="here", version="1")
    rows: list[NewRow] = []
    for number in range(60):
        rows += encoder.encode_records([request_record(response_id=f"r{number}-{i}") for i in range(3)])
    with (
        FaultProxy(gateway.url, lambda _: "lose_reply" if chance.random() < 0.2 else "pass") as proxy,
        OtlpHttpExporter(proxy.url) as exporter,
        closing(open_outbox(tmp_path / "telemetry.db")) as outbox,
    ):
        outbox.append(rows)
        forwarder = Forwarder(outbox, exporter)
        while outbox.stats().rows:
            forwarder.step()
    lost = sum(seen.fault == "lose_reply" for seen in proxy.seen)
    assert lost > 5
    assert sorted(gateway.response_ids(DEVICE)) == sorted(f"r{n}-{i}" for n in range(60) for i in range(3))
    (device,) = (d for d in gateway.get("/fleet/v1/devices")["devices"] if d["id"] == DEVICE)
    assert (device["num_batches"], device["num_duplicates"], device["num_requests"]) == (60, lost, 180)
    assert len(proxy.seen) == 60 + lost


def test_what_was_dropped_is_told_to_the_gateway(tmp_path: Path, gateway: GatewayProcess) -> None:
    encoder = RowEncoder(lambda: (), device_id="dropper", host_name="here", version="1")
    path = tmp_path / "telemetry.db"
    outbox = Outbox(path, "dropper", limit_bytes=1 << 16, encode_gaps=encoder.encode_gaps)
    with closing(outbox), OtlpHttpExporter(gateway.url) as exporter:
        rows = encoder.encode_records([request_record()] * 7)
        outbox.append([NewRow(Priority.TRACE, "traces", 7, b"x" * 40_000) for _ in range(5)])
        outbox.append(rows, lost=[Gap(Priority.USAGE, "buffer_full", 0, 9, 0)])
        (trace,) = (row for row in read_rows(path) if row.priority is Priority.TRACE)
        outbox.acknowledge([trace.id])
        forwarder = Forwarder(outbox, exporter)
        while forwarder.step().wait_s is not None:
            pass
        assert outbox.pending_gaps() == []
    (device,) = (d for d in gateway.get("/fleet/v1/devices")["devices"] if d["id"] == "dropper")
    assert (device["num_lost_batches"], device["num_lost_records"]) == (4, 37)
    assert device["num_requests"] == 7


def test_the_thread_waits_after_a_failure_unless_it_is_urgent(tmp_path: Path) -> None:
    reply = [(503, {"retry-after": "600"}, b""), (200, PROTOBUF, b"")]
    path = tmp_path / "telemetry.db"
    with closing(open_outbox(path)) as outbox:
        outbox.append([usage(b"1"), usage(b"2")])
    encoder = RowEncoder(lambda: (), device_id=DEVICE, host_name="here", version="1")
    writer = OutboxWriter(lambda: open_outbox(path), encoder, metrics_interval_s=1000)
    writer.start()
    with ScriptedServer(*reply) as server, closing(writer):
        thread = ForwarderThread(writer, lambda: OtlpHttpExporter(server.url))
        thread.start()
        wait_until(lambda: thread.state().last_error is not None, what="the refusal")
        thread.notify()
        state = thread.state()
        assert state.next_attempt_s is not None
        assert 590 < state.next_attempt_s <= 600
        assert len(server.paths) == 1, "news do not shorten a wait"
        progress = thread.drain(timeout_s=10)
        assert (progress.wait_s, progress.error) == (None, None)
        assert len(server.paths) == 3
        state = thread.state()
        assert (state.last_error, state.next_attempt_s) == (None, None)
        assert state.last_success_age_s is not None
        thread.stop()
