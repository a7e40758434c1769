"""What a client may do at the socket, in raw bytes: what is not HTTP, what is ambiguous, too slow or too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from litestar.types import Receive, Scope, Send
from uvicorn.server import ServerState

from runtime.connection import MAX_HEADERS, MAX_PIPELINED, HttpConnection
from runtime.door import Door, Manners
from runtime.listener import MAX_LEAVING, Listener

TLS = Path(__file__).parents[1] / "goldens" / "tls"
MANNERS = Manners(64, 64)
WAIT_S = 10.0
LARGE = 16 << 20
"""More than the kernel takes for a client that does not read."""


async def until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Echo:
    """An application that tells what it got."""

    left: list[str] = field(default_factory=list[str])
    """Paths whose client left before the end."""
    num_begun: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.num_begun += 1
        path = scope["path"]
        if path == "/early":
            await self._answer(send, 401, b"no")
        elif path == "/large":
            await self._answer(send, 200, b"x" * LARGE)
        elif path == "/stream":
            await self._stream(path, receive, send)
        elif path == "/hold":
            await self._hold(path, receive, send)
        else:
            body = await self._body(receive)
            if body is None:
                self.left.append(path)
                return
            told = {
                "method": scope["method"], "path": path, "body": len(body), "version": scope["http_version"],
                "headers": sorted(name.decode() for name, _ in scope["headers"]),
            }  # fmt: skip
            await self._answer(send, 200, json.dumps(told).encode())

    async def _body(self, receive: Receive) -> bytes | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message["body"]
            if not message["more_body"]:
                return body

    async def _answer(self, send: Send, status: int, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, path: str, receive: Receive, send: Send) -> None:
        await self._body(receive)
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            await asyncio.sleep(0)
            if gone.done():
                self.left.append(path)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _hold(self, path: str, receive: Receive, send: Send) -> None:
        await self._body(receive)
        assert (await receive())["type"] == "http.disconnect"
        self.left.append(path)


@dataclass
class Served:
    """The protocol with an application behind it."""

    app: Echo
    door: Door
    port: int
    clients: list[Client] = field(default_factory=list["Client"])

    async def connect(self, **options: Any) -> Client:
        """A connection that is let in."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, **options))
        self.clients.append(client)
        return client

    async def ask(self, raw: bytes) -> bytes:
        """All that comes back on a connection of its own, until it is closed."""
        client = await self.connect()
        client.writer.write(raw)
        try:
            return await client.rest()
        finally:
            client.close()

    def later(self, seconds: float) -> None:
        """Look after connections as if so much time had passed."""
        self.door.sweep(asyncio.get_running_loop().time() + seconds)


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, raw: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        self.writer.write(raw)
        async with asyncio.timeout(WAIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
            return (
                int(head[0].split()[1]),
                headers,
                await self.reader.readexactly(int(headers.get("content-length", 0))),
            )

    async def rest(self) -> bytes:
        """What comes until the end."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
        return b""

    def close(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(manners: Manners = MANNERS, *, tls: ssl.SSLContext | None = None) -> AsyncGenerator[Served]:
    """The protocol on a free port. Nothing of it is left afterwards."""
    app = Echo()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", lifespan="off", timeout_keep_alive=75
    )  # fmt: skip
    config.load()
    state, door = ServerState(), Door(manners)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        served = Served(app, door, sock.getsockname()[1])
        listener = Listener(
            sock, door, lambda s, peer: HttpConnection(config, state, {}, door=door, sock=s, peer=peer), tls
        )
        try:
            yield served
        finally:
            listener.close()
            for client in served.clients:
                client.close()
            for guest in door.guests():
                guest.drop()
            await until(lambda: not len(door) and not state.connections and not state.tasks)


async def recv_all(sock: socket.socket) -> bytes:
    """What comes until the end; the socket stays open."""
    sock.setblocking(False)
    received, loop = b"", asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_S):
        while part := await loop.sock_recv(sock, 1 << 16):
            received += part
    return received


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test on the loop that the appliance has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


def with_server(
    test: Callable[[Served], Awaitable[None]], manners: Manners = MANNERS, *, tls: ssl.SSLContext | None = None
) -> None:
    """A test with a server of its own."""

    async def go() -> None:
        async with serving(manners, tls=tls) as served:
            await test(served)

    run(go)


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"

REFUSED: list[tuple[str, bytes, int]] = [
    ("length and chunks", POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("chunks and length", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    ("two lengths", POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    ("the same length twice", POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("a list of lengths", POST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    ("a length with a sign", POST + b"Content-Length: +3\r\n\r\nabc", 400),
    ("a negative length", POST + b"Content-Length: -3\r\n\r\nabc", 400),
    ("a length in hex", POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
    ("a length beyond any integer", POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc", 400),
    ("an empty length", POST + b"Content-Length: \r\n\r\nabc", 400),
    ("another coding", POST + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
    ("chunked, and more", POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    ("more, and chunked", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    ("chunked twice", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("almost chunked", POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    ("chunks that begin with a tab", POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    ("chunks of HTTP/1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("a space before the colon", POST + b"Content-Length : 3\r\n\r\nabc", 400),
    ("a bare LF between headers", b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
    ("bare LF at the end", b"GET / HTTP/1.1\r\nHost: x\n\n", 400),
    ("a bare CR", b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400),
    ("a folded header", b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    ("a folded first header", b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    ("NUL in a value", b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
    ("NUL in a name", b"GET / HTTP/1.1\r\nHost: x\r\nA\x00: b\r\n\r\n", 400),
    ("NUL in the path", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("a space in the path", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("a header without a name", b"GET / HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", 400),
    ("a header without a colon", b"GET / HTTP/1.1\r\nHost: x\r\nab\r\n\r\n", 400),
    ("no host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    ("no such method", b"FETCH / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("a small method", b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("no such version", b"GET / HTTP/1.7\r\nHost: x\r\n\r\n", 400),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("a tunnel", b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("TLS", bytes.fromhex("16030100a5010000a10303") + bytes(100), 400),
    ("not HTTP", b"hello\r\n\r\n", 400),
    ("a tunnel with a body", b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("a tunnel to a path", b"CONNECT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("a tunnel to an address", b"CONNECT http://x/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("a chunk without size", POST + b"Transfer-Encoding: chunked\r\n\r\n\r\n\r\n", 400),
    ("a chunk size that is none", POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n", 400),
    ("a chunk size beyond any integer", POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n", 400),
    ("a chunk longer than it says", POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n", 400),
    ("chunk lines that end in LF", POST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n", 400),
    ("a long path", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ("many headers", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n", 431),
    ("a long header", b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    ("many trailers", POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "status"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_programs_on_the_way_could_read_differently_is_refused_and_the_connection_closed(
    raw: bytes, status: int
) -> None:
    async def test(served: Served) -> None:
        answer = await served.ask(raw + GET)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status, answer
        assert b"connection: close" in head
        assert answer.count(b"\r\n\r\n") == 1, "what follows is not read"
        problem = json.loads(body)
        assert problem["status"] == status
        assert problem["code"] != ""

    with_server(test)


def test_an_error_has_the_shape_of_its_path() -> None:
    async def test(served: Served) -> None:
        raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"
        body = (await served.ask(raw)).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["error"]["code"] == "bad_http"

    with_server(test)


def test_heads_without_end_are_refused() -> None:
    async def test(served: Served) -> None:
        for begin in (b"GET /", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: "):
            client = await served.connect()
            client.writer.write(begin)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    client.writer.write(b"a" * 4096)
                    await client.writer.drain()
            assert b" 431 " in (answer := await client.rest()) or b" 414 " in answer
            client.close()

    with_server(test)


def test_chunks_that_are_mostly_not_body_are_refused() -> None:
    async def test(served: Served) -> None:
        for filling in (b"1;" + b"x" * 8000 + b"\r\na\r\n", b"0\r\nA: " + b"b" * 20_000):
            client = await served.connect()
            client.writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    client.writer.write(filling)
                    await client.writer.drain()
                    await asyncio.sleep(0)
            assert (await client.rest()).startswith(b"HTTP/1.1 4")
            client.close()

    with_server(test)


def test_garbage_after_a_request_leaves_its_answer_whole() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        client.writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n\x00\x00garbage")
        await until(lambda: served.app.num_begun == 1)
        client.writer.write(b"more")
        client.close()
        await until(lambda: served.app.left == ["/hold"])
        answer = await served.ask(POST + b"Content-Length: 3\r\n\r\nabc\x00garbage")
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1 ") == 1

    with_server(test)


def test_what_clients_do_works() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        for raw, body in (
            (POST + b"Content-Length: 3\r\n\r\nabc", 3),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n", 5),
            (POST + b"Transfer-Encoding: Chunked\r\n\r\n0\r\nEvil: yes\r\n\r\n", 0),
            (b"\r\n" + GET, 0),
            (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 0),
        ):
            status, _, told = await client.answer(raw)
            assert (status, json.loads(told)["body"]) == (200, body), raw
            assert "evil" not in json.loads(told)["headers"], "trailers are no headers"
        client.writer.write(GET * (MAX_PIPELINED // 2))
        assert [(await client.answer())[0] for _ in range(MAX_PIPELINED // 2)] == [200] * (MAX_PIPELINED // 2)
        head = await served.ask(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert head.endswith(b"\r\n\r\n"), "no body"
        client.close()

    with_server(test)


def test_more_requests_ahead_than_may_wait_are_not_answered() -> None:
    async def test(served: Served) -> None:
        hold = b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n"
        client = await served.connect()
        client.writer.write(hold + GET * 5000)
        await until(lambda: served.app.num_begun == 1)
        client.close()
        await until(lambda: served.app.left == ["/hold"])  # the first of many is told that the client left
        assert served.app.num_begun == 1

    with_server(test)


def test_a_client_is_asked_for_its_body_where_it_waits_for_that() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        client.writer.write(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await client.answer(b"abc"))[0] == 200
        client.close()
        refused = await served.ask(
            b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        assert refused.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in refused

    with_server(test)


def test_a_short_body_that_nobody_wanted_keeps_the_connection_and_a_long_one_does_not() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        early = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        assert (await client.answer(early % 3))[0] == 401
        assert (await client.answer(b"abc" + GET))[0] == 200
        client.close()
        client = await served.connect()
        status, headers, _ = await client.answer(early % 10_000_000)
        assert (status, headers["connection"]) == (401, "close")
        for _ in range(50):  # still read, so that the answer is not lost to a reset
            client.writer.write(b"x" * 10_000)
            await client.writer.drain()
        assert await client.rest() == b""
        client.close()

    with_server(test)


def test_http_1_0_gets_an_answer_without_chunks_and_a_close() -> None:
    async def test(served: Served) -> None:
        assert (await served.ask(b"GET / HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        client = await served.connect()
        client.writer.write(b"GET /stream HTTP/1.0\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"chunked" not in head
        assert await client.reader.readexactly(20_000) == b"x" * 20_000
        client.close()

    with_server(test)


def test_an_upgrade_is_passed_over_and_the_connection_closed() -> None:
    async def test(served: Served) -> None:
        answer = await served.ask(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1 ") == 1

    with_server(test)


OFFER = POST + b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEA\r\nUpgrade: h2c\r\n"


@pytest.mark.parametrize("size", [1, 7, 1000], ids=["by byte", "in parts", "at once"])
@pytest.mark.parametrize(
    ("raw", "num"),
    [
        (OFFER + b"Content-Length: %d\r\n\r\n" % len(GET) + GET, len(GET)),
        (OFFER + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nEvil: yes\r\n\r\n", 3),
        (OFFER.replace(b" /", b" /early") + b"Content-Length: 3\r\n\r\nabc", None),
    ],
    ids=["length", "chunks", "answered early"],
)
def test_an_upgrade_before_a_body_is_passed_over_and_the_connection_goes_on(
    raw: bytes, num: int | None, size: int
) -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        for _ in range(2):
            for i in range(0, len(raw), size):
                client.writer.write(raw[i : i + size])
                await asyncio.sleep(0)
            status, _, told = await client.answer()
            assert status == (200 if num is not None else 401)
            assert num is None or json.loads(told)["body"] == num
            status, _, told = await client.answer(GET)
            assert (status, json.loads(told)["method"], json.loads(told)["headers"]) == (200, "GET", ["host"])

    with_server(test)


def test_requests_sent_ahead_may_each_offer_an_upgrade() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        client.writer.write((OFFER + b"Content-Length: 3\r\n\r\nabc") * MAX_PIPELINED + GET)
        bodies = [json.loads((await client.answer())[2])["body"] for _ in range(MAX_PIPELINED + 1)]
        assert bodies == [3] * MAX_PIPELINED + [0]

    with_server(test)


def test_what_follows_an_upgrade_is_read_as_strictly() -> None:
    async def test(served: Served) -> None:
        for wrong in (b"Content-Length: 3\r\n\r\nabc\x00garbage", b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n"):
            assert (await served.ask(OFFER + wrong)).count(b"\r\n\r\n") == 1, "one answer"

    with_server(test)


def test_slow_heads_end() -> None:
    async def test(served: Served) -> None:
        silent, slow = await served.connect(), await served.connect()
        assert (await slow.answer(GET))[0] == 200
        (quick,) = [g for g in served.door.guests() if (g.leisure or (0, 0))[0] == 2]
        slow.writer.write(b"GET / HTTP/1.1\r\nHo")
        await until(lambda: (quick.leisure or (0, 0))[0] == 1)
        served.later(9)
        assert len(served.door) == 2
        served.later(11)
        assert (await slow.rest()).startswith(b"HTTP/1.1 408 ")
        assert await silent.rest() == b"", "who said nothing expects no answer"
        slow.close()

    with_server(test)


def test_an_idle_connection_cannot_stay_by_sending_empty_lines() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        assert (await client.answer(GET))[0] == 200
        client.writer.write(b"\r\n")
        (guest,) = served.door.guests()
        await until(lambda: (guest.leisure or (0, 0))[0] == 1)
        served.later(11)
        assert await client.rest() == b""

    with_server(test)


def test_a_body_that_comes_after_its_answer_does_not_keep_the_connection() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        early = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
        assert (await client.answer(early))[0] == 401
        (guest,) = served.door.guests()
        client.writer.write(b"abc")
        assert (await (await served.connect()).answer(GET))[0] == 200  # what was sent before it is read by now
        assert guest.leisure is not None
        served.later(74)
        assert len(served.door) == 2
        served.later(76)
        assert await client.rest() == b""

    with_server(test)


def test_slow_bodies_end() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        client.writer.write(POST + b"Content-Length: 100000\r\n\r\nabc")
        await until(lambda: served.app.num_begun == 1)
        served.later(29)
        for i in range(2, 5):  # goes on as it should
            client.writer.write(b"x" * 10_000)
            await asyncio.sleep(0.01)
            served.later(29 * i)
        assert len(served.door) == 1
        served.later(29 * 4 + 31)
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
        await until(lambda: served.app.left == ["/"])
        client.close()

    with_server(test)


def test_who_does_not_read_is_cut_off_and_who_does_is_not() -> None:
    async def test(served: Served) -> None:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, ("127.0.0.1", served.port))
        await loop.sock_sendall(deaf, b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        reader = await served.connect()
        reader.writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        served.later(0)
        for i in range(1, 5):
            await reader.reader.readexactly(2_000_000)
            served.later(10 * i)
        await until(lambda: served.app.left == ["/stream"])
        await reader.reader.readexactly(100_000)
        deaf.close()
        reader.close()

    with_server(test)


def test_near_the_bound_those_go_that_ask_for_nothing() -> None:
    async def test(served: Served) -> None:
        busy = await served.connect()
        busy.writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.app.num_begun == 1)
        slow = [await served.connect() for _ in range(31)]
        for client in slow:
            client.writer.write(b"GET / HTT")
        await until(lambda: len(served.door) == 32)
        for _ in range(3):
            normal = await served.connect()
            assert (await normal.answer(GET))[0] == 200
        assert await slow[0].rest() == b""
        assert len(served.door) <= 32
        assert served.app.left == []
        busy.close()

    with_server(test, Manners(32, 32))


def test_where_all_are_busy_one_more_is_told_to_come_again() -> None:
    async def test(served: Served) -> None:
        busy = [await served.connect() for _ in range(16)]
        for client in busy:
            client.writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.app.num_begun == 16)
        refused = await (await served.connect()).rest()
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5" in refused
        for num in range(MAX_LEAVING + 2):
            with socket.create_connection(("127.0.0.1", served.port)) as eager:
                assert (await recv_all(eager)).startswith(b"HTTP/1.1 503 "), num
                for _ in range(2):
                    eager.sendall(GET)  # to a socket that is closed the second would fail
        busy[0].close()
        await until(lambda: len(served.door) == 15)
        assert (await (await served.connect()).answer(GET))[0] == 200
        for client in busy:
            client.close()

    with_server(test, Manners(16, 16))


def test_an_answer_that_is_still_being_sent_makes_no_room() -> None:
    async def test(served: Served) -> None:
        client = await served.connect()
        client.writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        (guest,) = served.door.guests()
        served.door.make_room(1)
        assert len(await client.reader.readexactly(LARGE)) == LARGE
        await until(lambda: guest.leisure is not None)
        served.door.make_room(1)
        assert await client.rest() == b""

    with_server(test)


def test_half_closed_connections_are_freed() -> None:
    async def test(served: Served) -> None:
        clients = [await served.connect() for _ in range(50)]
        for i, client in enumerate(clients):
            client.writer.write((b"", b"GET / H", b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n", GET)[i % 4])
        await until(lambda: served.app.num_begun == 24)
        for client in clients:
            client.writer.write_eof()
        await until(lambda: len(served.door) == 0)
        assert served.app.left == ["/hold"] * 12

    with_server(test)


def test_nobody_is_lost_where_descriptors_are_short() -> None:
    async def test(served: Served) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.socket()
        waiting.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
        try:
            await asyncio.get_running_loop().sock_connect(waiting, ("127.0.0.1", served.port))
            await asyncio.sleep(0.1)
            assert len(served.door) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: len(served.door) == 1)
        waiting.close()

    with_server(test)


def test_while_it_stops_each_answer_is_the_last_of_its_connection() -> None:
    async def test(served: Served) -> None:
        idle, new = await served.connect(), await served.connect()
        assert (await idle.answer(GET))[0] == 200
        served.door.drain()
        assert await idle.rest() == b""
        status, headers, _ = await new.answer(GET)
        assert (status, headers["connection"]) == (200, "close")
        assert await new.rest() == b""

    with_server(test)


def test_tls_handshakes_have_a_deadline_and_count() -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(TLS / "first.pem", TLS / "first.key")
    trusting = ssl.create_default_context(cafile=TLS / "first.pem")
    trusting.check_hostname = False

    async def test(served: Served) -> None:
        silent, garbage = await served.connect(), await served.connect()
        await until(lambda: len(served.door) == 2)
        garbage.writer.write(GET)
        await until(lambda: len(served.door) == 1)
        client = await served.connect(ssl=trusting)
        assert (await client.answer(GET))[0] == 200
        half = await served.connect(ssl=trusting)
        half.writer.write(b"GET / HT")
        assert (await client.answer(GET))[0] == 200
        served.later(11)
        assert await silent.rest() == b""
        await until(lambda: len(served.door) == 1)
        slow = [await served.connect() for _ in range(15)]
        await until(lambda: len(served.door) == 16)
        assert (await (await served.connect(ssl=trusting)).answer(GET))[0] == 200
        for c in (*slow, client, half, garbage):
            c.close()

    with_server(test, Manners(16, 16), tls=server)
