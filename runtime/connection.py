"""HTTP/1.1 for peers that have no manners: a deadline on heads, a least pace for bodies and readers, bounds on sizes.

uvicorn's parser and cycle of request and response, with what they lack. Its httptools protocol bounds neither the size
nor the time of a head, answers garbage in the midst of another answer, appends trailers to the headers, tells only the
last of several pipelined requests that the client left, and sends chunks to clients of HTTP/1.0.

Source: RFC 9112; Node's defaults for the bounds.
"""

from __future__ import annotations

import contextlib
import socket
from functools import partial
from typing import TYPE_CHECKING, Literal

import httptools
import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from runtime.api.errors import Fault, written
from runtime.door import Door, Pace

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import (
        ASGI3Application,
        ASGIReceiveCallable,
        ASGISendCallable,
        ASGISendEvent,
        HTTPResponseStartEvent,
        Scope,
    )

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
"""Trailers included."""
MAX_TARGET_BYTES = 8 << 10
MAX_PIPELINED = 16
"""Requests that may wait for the answer to the one before them."""
MAX_OVERHEAD_BYTES, MAX_OVERHEAD_FACTOR = 64 << 10, 16
"""Of chunk sizes, their extensions and trailers beside a body: a chunk of one byte takes six."""
MAX_UNREAD_BYTES = 64 << 10
"""Of a body that nobody wants; one that has more to come is not waited for: its connection closes."""
MIN_BYTES = 8 << 10
"""What has to go on in `stall_s`, in or out: a quarter of what a radio link of 9,600 bit/s carries."""
WRITE_BUFFER_BYTES = 16 << 10
LINGER_S = 5.0
"""How long a connection that was closed here may still send what nobody reads."""

_CLOSING, _HEAD, _IDLE, _BODY = range(4)


class _Refused(Exception):
    """What came is not taken."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(status, code, message)


class HttpConnection(HttpToolsProtocol):
    """One connection and its requests. A guest of the door (`runtime.door.Guest`).

    Args:
        peer: Whose it is; empty for programs of this machine.
        sock: The socket under it, to end a TLS handshake; owned by the transport.
    """

    def __init__(
        self, config: uvicorn.Config, state: ServerState, app_state: dict[str, object], *, door: Door,
        sock: socket.socket, peer: str,
    ) -> None:  # fmt: skip
        super().__init__(config, state, app_state)
        self.peer = peer
        self.url = b""
        self._sock = sock
        self._door = door
        self._part: Literal["none", "head", "body"] = "none"
        self._is_first_read = False
        """Of the present part: how much of what was read belongs to it is not known."""
        self._head_since: float | None = self.loop.time()
        self._idle_since = self.loop.time()
        """The end of the last answer, or of the last request if that came later."""
        self._closing_since: float | None = None
        self._body_since = 0.0
        self._is_passing_over = False
        """From the head of a request that offers another protocol before its body, until that is read."""
        self._is_deaf = False
        """What comes now is read, so that the end is noticed, and thrown away."""
        self._num_headers = self._num_head_bytes = self._num_raw = self._num_body = self._num_sent = 0
        self._active: RequestResponseCycle | None = None
        self._is_unframed = False
        self._coming = Pace(door.manners.stall_s, MIN_BYTES, self.loop.time())
        self._going = Pace(door.manners.stall_s, MIN_BYTES, self.loop.time())

    # ------------------------------------------------------------------ as a guest

    @property
    def is_connected(self) -> bool:
        """Whether it was made, TLS included; still true after its end."""
        return bool(self.transport)

    @property
    def _is_answering(self) -> bool:
        return self._active is not None and not self._active.response_complete

    @property
    def _num_unsent(self) -> int:
        return self.transport.get_write_buffer_size() if self.is_connected else 0

    @property
    def leisure(self) -> tuple[int, float] | None:
        """How well it could go; see `runtime.door.Guest`."""
        if self._closing_since is not None:
            return _CLOSING, self._closing_since
        if self._is_answering:
            is_sending = self._part == "body" and self._active is self.cycle and not self.cycle.response_started
            return (_BODY, self._body_since) if is_sending else None
        if self._num_unsent:  # the rest of an answer
            return None
        return (_IDLE, self._idle_since) if self._head_since is None else (_HEAD, self._head_since)

    def check(self, now: float) -> None:
        """End it where it keeps somebody waiting for too long."""
        unsent = self._num_unsent
        if not unsent:
            self._going.restart(now, self._num_sent)
        if self._going.is_too_slow(now, self._num_sent - unsent):
            self._end("slow reader")
        elif self._closing_since is not None:
            if not unsent and now - self._closing_since > LINGER_S:
                self.drop()
        elif self._head_since is not None:
            if now - self._head_since > self._door.manners.head_s:
                self._give_up_head()
        elif self._part == "body":
            self._check_body(now)
        elif not (unsent or self._is_answering) and now - self._idle_since > self.timeout_keep_alive:
            self.transport.close()

    def _check_body(self, now: float) -> None:
        if self.flow.read_paused or self.cycle.waiting_for_100_continue:  # it is we who keep it waiting
            self._coming.restart(now, self._num_body)
        elif self._coming.is_too_slow(now, self._num_body):
            self._refuse(Fault(408, "request_timeout", "The body came too slowly."))

    def _give_up_head(self) -> None:
        if self._part == "head":
            self._refuse(Fault(408, "request_timeout", "The head of the request came too slowly."))
        else:  # nothing was begun: programs that connect ahead of need expect no answer
            self._end("silent")

    def _end(self, reason: str) -> None:
        self._door.note(reason)
        self.drop()

    def drop(self) -> None:
        """End it at once."""
        if self.is_connected:
            self.transport.abort()
        else:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def dismiss(self) -> None:
        """End it if it waits between two requests."""
        is_asked = self._head_since is not None or self._part != "none" or self._is_answering
        if not is_asked and self._closing_since is None:
            self.transport.close()

    # ------------------------------------------------------------------ what comes in

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # uvloop's own low water is 16 bytes: a reader would have to take everything before more is written.
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._is_deaf = True  # there is no parser any more
        self.pipeline.clear()
        self._disconnect()
        self._door.leave(self)

    def _disconnect(self) -> None:
        """Tell the application that nobody waits for its answer."""
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._head_since is None and self._part == "none" and not self._is_answering:
            self._head_since = self.loop.time()
        try:
            self._feed(data)
            self._count(len(data))
        except httptools.HttpParserError as e:
            cause = e.__context__
            self._refuse(cause.fault if isinstance(cause, _Refused) else _not_http(e))
        except _Refused as e:
            self._refuse(e.fault)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
            return
        except httptools.HttpParserUpgrade as e:
            rest = data[e.args[0] :]
        if self._is_passing_over:
            self._pass_over(rest)
        else:
            self._is_deaf = True  # what follows is of another protocol

    def _pass_over(self, rest: bytes) -> None:
        """Read the body of a request that offers another protocol (RFC 9110, section 7.8). The parser leaves it out, so
        one that was offered nothing goes on."""
        lengths = [value for name, value in self.headers if name == b"content-length"]
        framing = b"Content-Length: " + lengths[0] if lengths else b"Transfer-Encoding: chunked"
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        self._is_passing_over = False
        self._feed(rest)

    def _count(self, num_bytes: int) -> None:
        """Count what was read of the present part.

        Raises:
            _Refused: There is no end to it.
        """
        if self._is_first_read:
            self._is_first_read = False
            return
        self._num_raw += num_bytes
        if self._part == "head" and self._num_raw > MAX_HEAD_BYTES:
            raise _head_too_large()
        if self._part == "body" and self._num_raw > MAX_OVERHEAD_BYTES + MAX_OVERHEAD_FACTOR * self._num_body:
            raise _Refused(400, "bad_http", "The body is sent in chunks with more around them than in them.")

    def _begin(self, part: Literal["head", "body"]) -> None:
        self._part = part
        self._is_first_read = True
        self._num_raw = 0

    @override
    def on_message_begin(self) -> None:
        if self._is_passing_over:
            return
        super().on_message_begin()
        self._begin("head")
        self._num_headers = self._num_head_bytes = 0
        if self._head_since is None:
            self._head_since = self.loop.time()

    @override
    def on_url(self, url: bytes) -> None:
        if self._is_passing_over:
            return
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            raise _Refused(414, "target_too_long", f"The path is longer than {MAX_TARGET_BYTES:,} bytes.")

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_passing_over:
            return
        self._num_headers += 1
        self._num_head_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS or self._num_head_bytes > MAX_HEAD_BYTES:
            raise _head_too_large()
        if self._part == "head":  # not trailers: nobody reads them, and a proxy did not check them
            super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        if self._is_passing_over:
            return
        version, is_upgrade = self.parser.get_http_version(), self.parser.should_upgrade()
        _check_head(self.headers, version)
        if self.parser.get_method() == b"CONNECT":
            raise _Refused(400, "bad_http", "This appliance is no proxy: it makes no tunnel ('CONNECT').")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused(400, "bad_http", f"More than {MAX_PIPELINED} requests were sent ahead.")
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
        super().on_headers_complete()
        self._is_passing_over = is_upgrade and _has_body(self.headers)
        if is_upgrade and not self._is_passing_over:
            self.cycle.keep_alive = False
        self._begin("body")
        self._head_since = None
        self._num_body = 0
        self._body_since = self.loop.time()
        self._coming.restart(self._body_since, 0)

    @override
    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        if self._is_passing_over:
            return
        super().on_message_complete()
        self._part = "none"
        self._idle_since = self.loop.time()  # the answer may have come before the end of the request

    # ------------------------------------------------------------------ what goes out

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cycle

        async def answered(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            await app(scope, receive, partial(self._send, cycle))

        super()._start_asgi_task(cycle, answered)

    async def _send(self, cycle: RequestResponseCycle, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._begin_answer(cycle, message)
            await cycle.send(message)
            return
        body = message.get("body", b"")
        leaves_unread = not message.get("more_body", False) and cycle.more_body and not cycle.keep_alive
        if leaves_unread:
            cycle.keep_alive = True  # it would close at once, and what still comes would destroy the answer (RST)
        if self._is_unframed:
            cycle.expected_content_length = len(body)
        await cycle.send(message)
        self._num_sent += len(body)
        if leaves_unread:
            self._close()

    def _begin_answer(self, cycle: RequestResponseCycle, message: HTTPResponseStartEvent) -> None:
        if self._door.is_draining or self._leaves_unread(cycle):
            cycle.keep_alive = False
        has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
        self._is_unframed = cycle.scope["http_version"] == "1.0" and not has_length
        if self._is_unframed:
            cycle.chunked_encoding = False  # HTTP/1.0 knows no chunks: the answer ends with the connection

    def _leaves_unread(self, cycle: RequestResponseCycle) -> bool:
        """Whether the answer comes before a body that is too long, or not certain, to come."""
        if not cycle.more_body:
            return False
        length = next((int(value) for name, value in cycle.scope["headers"] if name == b"content-length"), None)
        is_long = length is None or length - self._num_body > MAX_UNREAD_BYTES
        return cycle.waiting_for_100_continue or is_long

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `check` looks: what comes later does not stop that
        self._idle_since = self.loop.time()

    def _refuse(self, fault: Fault) -> None:
        """Take nothing more. The fault is told where that cannot be taken for a part of another answer."""
        self._is_deaf, self._head_since = True, None
        self._door.note(fault.code)
        if self._is_answering and not (self._active is self.cycle and self._part == "body"):
            self._active_ends_all()
        elif self._is_answering and self.cycle.response_started:
            self.drop()
        else:
            self._disconnect()
            if self._part != "body" or not self.cycle.response_complete:
                self._write(fault)
            self._close()

    def _active_ends_all(self) -> None:
        """What is wrong came after a request that is being answered: close after that answer."""
        if self._active is not None:
            self._active.keep_alive = False
        self.flow.resume_reading()

    def _write(self, fault: Fault) -> None:
        body, media_type = written(fault, self.url.partition(b"?")[0].decode("latin-1"))
        headers = [
            *self.server_state.default_headers,
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[fault.status] + lines + b"\r\n" + body)

    def _close(self) -> None:
        """Close, but read on until the peer closes too: else what it still sends would destroy what it has not read."""
        if self.transport.is_closing():
            return
        self._is_deaf, self._closing_since = True, self.loop.time()
        if self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()


def _not_http(error: httptools.HttpParserError) -> Fault:
    return Fault(400, "bad_http", f"The request is not HTTP/1.1 (RFC 9112): {error}.")


def _head_too_large() -> _Refused:
    most = f"{MAX_HEAD_BYTES:,} bytes or {MAX_HEADERS} headers"
    return _Refused(431, "head_too_large", f"The head of the request has more than {most}.")


def _check_head(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """See that every program on the way reads this head in the same way.

    Raises:
        _Refused: Two might differ on where the request ends, or for whom it is.
    """
    if version not in ("1.0", "1.1"):
        raise _Refused(505, "http_version", "This appliance speaks HTTP/1.1.")
    hosts = [value for name, value in headers if name == b"host"]
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise _Refused(400, "bad_http", "A request names its host once, in 'Host' (RFC 9112, section 3.2).")
    if len(lengths) + len(codings) > 1:
        raise _Refused(400, "bad_http", "The length of the body is said more than once (RFC 9112, section 6.3).")
    if codings and (version == "1.0" or codings[0].lower() != b"chunked"):
        raise _Refused(400, "bad_http", "The only 'Transfer-Encoding' is chunked, of HTTP/1.1.")


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0) for name, value in headers
    )
