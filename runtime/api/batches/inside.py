"""Requests that the appliance sends to itself: through the same door, and the same code, as those over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar.types import HTTPScope, Message

from runtime.api.access import Caller
from runtime.api.guard import INSIDE

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


class _Code(msgspec.Struct):
    code: str | None = None


class _Error(msgspec.Struct):
    error: _Code | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    body: bytes
    retry_after_s: float | None = None

    @property
    def code(self) -> str:
        """The code of the error; empty where there is none."""
        with contextlib.suppress(msgspec.MsgspecError):
            error = msgspec.json.decode(self.body, type=_Error).error
            return (error.code if error else None) or ""
        return ""


async def post(app: ASGI, caller: Caller, path: str, body: bytes) -> Reply:
    """Send JSON as this caller, and wait for the whole answer. Cancelling it is a client that goes away."""
    arrived: list[Message] = []
    is_read = False

    async def receive() -> dict[str, object]:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # nobody goes away but by cancelling
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        arrived.append(message)

    await app(_scope(caller, path, len(body)), receive, send)
    return _reply(arrived)


def _scope(caller: Caller, path: str, num_bytes: int) -> HTTPScope:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % num_bytes)]
    scope: Any = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": None, "server": None, "state": {}, "extensions": {INSIDE: caller},
    }  # fmt: skip
    return scope


def _reply(messages: list[Message]) -> Reply:
    status, retry_after_s, parts = 500, None, list[bytes]()
    for message in messages:
        if message["type"] == "http.response.start":
            status = message["status"]
            told = next((v for k, v in message["headers"] if k.lower() == b"retry-after"), b"")
            retry_after_s = float(told) if told.isdigit() else None
        elif message["type"] == "http.response.body":
            parts.append(message["body"])
    return Reply(status, b"".join(parts), retry_after_s)
