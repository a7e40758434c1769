"""Server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

PING = b": ping\n\n"
PING_INTERVAL_S = 15.0
DONE = b"data: [DONE]\n\n"


def data(body: bytes) -> bytes:
    """An event without a name. `body` is one line."""
    return b"data: " + body + b"\n\n"


def event(name: str, body: bytes) -> bytes:
    """A named event."""
    return b"event: " + name.encode() + b"\n" + data(body)


async def with_pings(source: AsyncIterator[bytes], *, interval_s: float = PING_INTERVAL_S) -> AsyncGenerator[bytes]:
    """A stream with a comment wherever it is silent for `interval_s`: proxies and clients cut silent connections."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait([pending], timeout=interval_s)
            if not done:
                yield PING
                continue
            try:
                chunk = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield chunk
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait([pending])
        if isinstance(source, AsyncGenerator):
            await source.aclose()
