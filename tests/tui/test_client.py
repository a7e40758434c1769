"""The typed client against a real server, against servers that talk nonsense, and against none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import msgspec
import pytest

from edge.errors import (
    ConfigError,
    EdgeError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    ServerUnavailable,
    SourceUnavailable,
)
from runtime.api.schema import DeviceStatus, Job
from tests.tui.appliance import Refusal, ScriptedAppliance, a_device
from tui.client import (
    Address,
    ApplianceError,
    ChatDelta,
    ChatMessage,
    ChatParams,
    InvalidReply,
    RuntimeClient,
    Usage,
    find_address,
)

HELLO = [ChatMessage("user", "Hello")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.asynccontextmanager
async def answering(*parts: bytes, stay_open: bool = False, path: Path | None = None) -> AsyncGenerator[RuntimeClient]:
    """A client of a server that answers every request with these bytes, and then hangs up or stays silent."""

    answers: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        answers.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if stay_open:
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await (asyncio.start_unix_server(answer, path) if path else asyncio.start_server(answer, "127.0.0.1", 0))
    async with server:
        port = 0 if path else server.sockets[0].getsockname()[1]
        address = Address("http://localhost", path, socket_only=True) if path else Address(f"http://127.0.0.1:{port}")
        async with RuntimeClient(address) as client:
            yield client
        await asyncio.gather(*answers)


def http(body: bytes, *, status: str = "200 OK", media_type: str = "application/json", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\n{extra}connection: close\r\n\r\n".encode() + body


def sse(body: bytes) -> bytes:
    return http(body, media_type="text/event-stream")


async def collect(answer: AsyncGenerator[ChatDelta], into: list[str]) -> None:
    async for delta in answer:
        into.append(delta.content)  # noqa: PERF401  # a comprehension would lose the text before an error


async def test_reports_come_typed(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    scripted.log_lines = ["one", "two", "three"]
    assert await client.status() == scripted.status
    assert await client.models() == scripted.status.models
    assert await client.telemetry() == scripted.status.outbox
    assert await client.jobs() == []
    assert await client.logs(num_lines=2) == ["two", "three"]


async def test_every_action_reaches_the_appliance(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    assert (await client.load("stories:15m")).state == "ready"
    assert (await client.unload("stories:15m")).state == "unloaded"
    await client.delete("stories:15m")
    job = await client.pull("hf://org/repo/model.gguf", name="mine")
    assert (await client.job(job.id)).state == "running"
    assert (await client.cancel_job(job.id)).state == "cancelled"
    assert (await client.flush()).rows == 0
    assert [path for path, _ in scripted.calls] == [
        "models/load", "models/unload", "models/delete", "models/pull", "jobs/cancel", "telemetry/flush",
    ]  # fmt: skip
    assert [m.ref for m in scripted.status.models] == ["smollm2:135m-instruct"]


async def test_events_are_typed_and_unknown_ones_passed_over(
    client: RuntimeClient, scripted: ScriptedAppliance
) -> None:
    job = Job(id="1", kind="pull", subject="x", state="running")
    async with contextlib.aclosing(client.events()) as events:
        assert await anext(events) == scripted.status
        scripted.tell(b": keep-alive\n\nevent: novelty\ndata: {}\n\n")
        scripted.tell(job)
        assert await anext(events) == job
        scripted.tell(a_device(cpu_percent=7.0))
        event = await anext(events)
        assert isinstance(event, DeviceStatus)
        assert event.cpu_percent == 7.0


async def test_a_chat_streams_text_then_reason_then_usage(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    params = ChatParams(temperature=0.0, max_tokens=8, stop=("\n",))
    deltas = [d async for d in client.chat("smollm2:135m-instruct", HELLO, params)]
    assert "".join(d.content for d in deltas) == "Hello from the **edge**."
    assert deltas[-2:] == [ChatDelta(finish_reason="stop"), ChatDelta(usage=Usage(31, 5))]
    _, body = scripted.calls[-1]
    assert body == {
        "model": "smollm2:135m-instruct", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.0, "max_tokens": 8, "stop": ["\n"],
    }  # fmt: skip


async def test_closing_a_chat_hangs_up(client: RuntimeClient, scripted: ScriptedAppliance) -> None:
    scripted.hold_after = 1
    async with contextlib.aclosing(client.chat("smollm2:135m-instruct", HELLO)) as answer:
        assert (await anext(answer)).content == "Hello"
    async with asyncio.timeout(5):
        while scripted.num_streams_cut == 0:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refusal(404, "model_not_found", "No such model.", "Models here: a:b."), ModelNotFound),
        (Refusal(429, "queue_full", "The queue is full.", "Try again in 2 s."), QueueFull),
        (Refusal(400, "invalid_request", "Wrong."), InvalidRequest),
        (Refusal(502, "source_unavailable", "The hub is away."), SourceUnavailable),
        (Refusal(507, "does_not_fit", "Too big.", "What would fit: Q4_0."), ApplianceError),
    ],
)
async def test_a_problem_becomes_our_error_in_the_appliances_words(
    client: RuntimeClient, scripted: ScriptedAppliance, refusal: Refusal, kind: type[EdgeError]
) -> None:
    scripted.refusals["models/load"] = refusal
    with pytest.raises(kind) as caught:
        await client.load("smollm2:135m-instruct")
    assert (caught.value.message, caught.value.hint) == (refusal.problem.detail, refusal.problem.hint)
    if isinstance(caught.value, ApplianceError):
        assert (caught.value.remote_code, caught.value.status) == ("does_not_fit", 507)
    if isinstance(caught.value, ModelNotFound):
        assert caught.value.ref == "smollm2:135m-instruct"


async def test_an_openai_error_names_its_field() -> None:
    body = b'{"error":{"message":"Too long.","type":"x","param":"messages","code":"invalid_request"}}'
    async with answering(http(body, status="400 Bad Request")) as client:
        with pytest.raises(InvalidRequest, match="Too long") as caught:
            await anext(client.chat("m", HELLO))
    assert caught.value.field == "messages"


async def test_an_error_inside_a_stream_ends_it_after_the_text() -> None:
    stream = (
        b'data: {"choices":[{"delta":{"content":"Hal"}}]}\n\n'
        b'event: error\ndata: {"error":{"message":"The engine ended.","code":"worker_died"}}\n\n'
    )
    got: list[str] = []
    async with answering(sse(stream)) as client:
        with pytest.raises(ApplianceError, match="engine ended") as caught:
            await collect(client.chat("m", HELLO), got)
    assert (got, caught.value.remote_code) == (["Hal"], "worker_died")


async def test_nobody_there_says_how_to_start_one(tmp_path: Path) -> None:
    for address in (
        Address(f"http://127.0.0.1:{free_port()}"),
        Address("http://localhost", tmp_path / "edge.sock", socket_only=True),
    ):
        async with RuntimeClient(address) as client:
            with pytest.raises(ServerUnavailable, match="No appliance answers at") as caught:
                await client.status()
        assert str(address) in caught.value.message
        assert caught.value.hint == "Start it with: edge serve"


async def test_a_socket_left_by_a_dead_server_is_nobody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    async with RuntimeClient(Address("http://localhost", tmp_path / "s")) as client:
        with pytest.raises(ServerUnavailable, match="No appliance answers at unix:"):
            await client.status()


async def test_the_socket_is_used_from_the_moment_it_exists(scripted: ScriptedAppliance, tmp_path: Path) -> None:
    path = tmp_path / "s"
    scripted.status = a_device(hostname="by-tcp")
    by_socket = http(msgspec.json.encode(a_device(hostname="by-socket")))
    async with RuntimeClient(Address(scripted.url, path)) as client:
        assert (await client.status()).hostname == "by-tcp"
        async with answering(by_socket, path=path):
            assert str(client.address) == f"unix:{path}"
            assert (await client.status()).hostname == "by-socket"


@pytest.mark.parametrize(
    "reply",
    [
        http(b"<html>router login</html>", media_type="text/html"),
        http(b""),
        http(b"{"),
        http(b'{"version": 3}'),
        http(b"[" * 100_000),
        http(b'{"models": [\xff]}'),
        http(b"\x1f\x8b\x08", extra="content-encoding: gzip\r\n"),
        http(b" " * (9 << 20)),
    ],
    ids=["html", "empty", "cut-json", "wrong-types", "deep", "not-utf8", "gzip", "huge"],
)
async def test_garbage_is_an_invalid_reply(reply: bytes) -> None:
    async with answering(reply) as client:
        with pytest.raises(InvalidReply, match="is not this appliance's API"):
            await client.status()


@pytest.mark.parametrize(
    "reply",
    [b"", b"\x00\x01\x02 not http\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{"],
    ids=["nothing", "not-http", "cut-body"],
)
async def test_a_broken_connection_is_unavailable(reply: bytes) -> None:
    async with answering(reply) as client:
        with pytest.raises(ServerUnavailable, match="broke"):
            await client.status()


@pytest.mark.parametrize(
    "body", [b"", b"<h1>Bad gateway</h1>", b'{"error": 3}', b"[" * 60_000], ids=["empty", "html", "other", "deep"]
)
async def test_an_error_without_a_body_we_know_keeps_its_status(body: bytes) -> None:
    async with answering(http(body, status="502 Bad Gateway")) as client:
        with pytest.raises(ApplianceError, match="answered 502 to /edge/v1/status") as caught:
            await client.status()
    assert caught.value.status == 502


async def test_a_huge_error_body_is_bounded() -> None:
    async with answering(http(b"x" * (1 << 20), status="500 Internal Server Error")) as client:
        with pytest.raises(InvalidReply, match="longer than 65,536 bytes"):
            await client.status()


async def test_a_stream_that_is_cut_is_not_a_whole_answer() -> None:
    cut = b'data: {"choices":[{"delta":{"content":"Hal"}}]}\n\ndata: {"choices":[{"del'
    got: list[str] = []
    async with answering(sse(cut)) as client:
        with pytest.raises(ServerUnavailable, match="cut off"):
            await collect(client.chat("m", HELLO), got)
    assert got == ["Hal"]


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"event: status\ndata: {}\n\n", "missing required field"),
        (b"event: status\ndata: nonsense\n\n", "malformed"),
        (b"data: " + b"x" * (2 << 20), "line of more than"),
        (b"data: xxxxxxxxxxxxxxxx\n" * 300_000, "event of more than"),
    ],
    ids=["half-status", "nonsense", "huge-line", "huge-event"],
)
async def test_garbage_events_are_an_invalid_reply(stream: bytes, reason: str) -> None:
    async with answering(sse(stream)) as client:
        with pytest.raises(InvalidReply, match=reason):
            await anext(client.events())


async def test_events_that_end_are_an_error_and_half_an_event_is_none() -> None:
    async with answering(sse(b'event: job\ndata: {"id":"1","kind":"pull"')) as client:
        with pytest.raises(ServerUnavailable, match="ended the stream"):
            await anext(client.events())


async def test_what_is_not_a_stream_is_refused() -> None:
    async with answering(http(b"{}")) as client:
        with pytest.raises(InvalidReply, match="a stream of events was due"):
            await anext(client.events())


async def test_silence_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.client.SILENCE_TIMEOUT_S", 0.1)
    async with answering(sse(b": hello\n\n"), stay_open=True) as client:
        with pytest.raises(ServerUnavailable, match="did not answer in time"):
            await anext(client.events())


async def test_read_only_sends_nothing_but_questions(scripted: ScriptedAppliance) -> None:
    async with RuntimeClient(Address(scripted.url), read_only=True) as client:
        assert await client.models()
        for change in (client.load("a"), client.unload("a"), client.delete("a"), client.flush(), client.pull("a")):
            with pytest.raises(InvalidRequest, match="read only"):
                await change
        with pytest.raises(InvalidRequest, match="read only"):
            await anext(client.chat("a", HELLO))
    assert scripted.calls == []


async def test_the_transport_can_be_replaced() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"lines": ["a"]}))
    async with RuntimeClient(Address("http://nowhere.invalid"), transport=transport) as client:
        assert await client.logs() == ["a"]


async def test_a_proxy_of_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedAppliance
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    async with RuntimeClient(Address(scripted.url)) as client:
        assert await client.models()


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://host:99999999", "http://[", ""])
async def test_a_wrong_url_is_a_setting_to_mend(url: str) -> None:
    with pytest.raises(ConfigError):
        RuntimeClient(Address(url))


def test_the_address_is_what_was_given_else_the_default(tmp_path: Path) -> None:
    def found(url: str | None = None, socket: Path | None = None) -> Address:
        return find_address(url=url, socket=socket, default_url="http://127.0.0.1:8080", default_socket=default)

    default = tmp_path / "run" / "edge.sock"
    assert str(found()) == "http://127.0.0.1:8080"
    assert str(found(url="http://pi:8080/")) == "http://pi:8080"
    assert str(found(socket=tmp_path / "s")) == f"unix:{tmp_path / 's'}"
    default.parent.mkdir()
    default.touch()
    assert str(found()) == f"unix:{default}"
    assert str(found(url="http://pi:8080")) == "http://pi:8080"
    with pytest.raises(ConfigError, match="not both"):
        found(url="http://pi", socket=default)


def test_the_client_imports_no_textual() -> None:
    code = "import sys, tui.client; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
