"""Responses that watch their client: event streams, and answers nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from litestar import Response
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Scope, Send
from typing_extensions import override

from edge.errors import EdgeError

T = TypeVar("T")


class ClientClosed(EdgeError):
    """The client went away before its answer was complete."""

    code = "client_closed"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientClosed: It did.
    """
    task, watcher = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientClosed("The client closed the connection.")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait({task, watcher})


class _StreamingApp(ASGIStreamingResponse):
    """Streams, and closes its source in any case: also where the client left before the first byte."""

    __slots__ = ("on_close", "source")

    def __init__(
        self, source: AsyncGenerator[bytes], on_close: Callable[[], None], headers: dict[str, str], media_type: str,
        status_code: int,
    ) -> None:  # fmt: skip
        super().__init__(  # pyright: ignore[reportUnknownMemberType]  # litestar leaves the iterator's type open
            iterator=source, media_type=media_type, status_code=status_code, headers=headers
        )
        self.source = source
        self.on_close = on_close

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()
            self.on_close()


class EventStream(Response[bytes]):
    """Server-sent events, or what else is sent as it comes to be. `on_close` is called when the stream is over, however
    it ended."""

    def __init__(
        self, source: AsyncGenerator[bytes], *, on_close: Callable[[], None], headers: dict[str, str] | None = None,
        media_type: str = "text/event-stream", status_code: int = 200,
    ) -> None:  # fmt: skip
        super().__init__(b"", media_type=media_type, status_code=status_code)
        self._sent_as, self._status = media_type, status_code
        self._source = source
        self._on_close = on_close
        # no-transform keeps proxies from buffering or compressing what should arrive token by token
        self._headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no", **(headers or {})}

    @override
    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIResponse:
        return _StreamingApp(self._source, self._on_close, self._headers, self._sent_as, self._status)
