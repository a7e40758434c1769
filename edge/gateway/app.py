"""The gateway's HTTP: OTLP in, the fleet API out. Stateless; everything it knows is in the ledger."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast, get_args
from urllib.parse import urlsplit

from litestar import Litestar, MediaType, Request, Response, get, post
from litestar.di import Provide
from litestar.exceptions import HTTPException, NotFoundException, ValidationException
from litestar.params import Parameter

from edge.errors import EdgeError, InvalidRequest, QueueFull, StoreError

from .ingest import MAX_BODY_BYTES, Batch, Signal, parse_batch, unpacked
from .ledger import Ledger, Receipt
from .schema import DeviceList, MetricList, Problem, RequestPage

log = logging.getLogger("edge.gateway")

MAX_PARSERS = 2
"""Bodies parsed at once: a hostile one takes many times its size in memory while it is read."""
MAX_PAGE = 1000
RETRY_AFTER_S = 5
PROTOBUF = "application/x-protobuf"
PROBLEM = "application/problem+json"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_STATUS: tuple[tuple[type[EdgeError], int], ...] = ((InvalidRequest, 400), (QueueFull, 503), (StoreError, 503))
_ENCODINGS = ("gzip", "identity")

AnyRequest = Request[Any, Any, Any]
After = Annotated[int, Parameter(ge=0, le=(1 << 63) - 1, description="Number of the last entry seen.")]
Limit = Annotated[int, Parameter(ge=1, le=MAX_PAGE, description="Most entries of one page.")]


class Receiver:
    """Takes bodies in: parses them off the event loop, a few at a time, and hands them to the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._parsers = asyncio.Semaphore(MAX_PARSERS)

    async def receive(self, signal: Signal, request: AnyRequest) -> Receipt:
        """Read, parse and store one request; on return the batch is on the disk.

        Raises:
            HTTPException: It is of a type, encoding or size that is not taken.
            InvalidRequest: It is no OTLP.
            QueueFull, StoreError: The ledger takes nothing now.
        """
        encoding = _checked_encoding(request)
        body = await request.body()
        async with self._parsers:
            batch = await asyncio.to_thread(_parse, signal, body, encoding, dict(request.headers))
        return await asyncio.wrap_future(self._ledger.store(batch))


def _checked_encoding(request: AnyRequest) -> str:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != PROTOBUF:
        raise HTTPException(status_code=415, detail=f"Send {PROTOBUF}, not {content_type[:80] or 'nothing'}.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in _ENCODINGS:
        raise HTTPException(status_code=415, detail=f"Send gzip or nothing as content-encoding, not {encoding[:80]}.")
    return encoding


def _parse(signal: Signal, body: bytes, encoding: str, headers: dict[str, str]) -> Batch:
    sent_ms = headers.get("edge-sent-unix-ms", "")
    return parse_batch(
        signal,
        body,
        unpacked(body, encoding),
        key=headers.get("idempotency-key"),
        sent_unix_s=int(sent_ms) / 1000 if sent_ms.isdecimal() and len(sent_ms) < 17 else None,
    )


@post("/v1/{signal:str}", status_code=200)
async def receive(signal: str, request: AnyRequest, receiver: Receiver) -> Response[bytes]:
    """OTLP/HTTP: traces, metrics or logs as protobuf. 200 means that the batch is on the disk."""
    if signal not in get_args(Signal):
        raise NotFoundException(detail=f"There is no signal '{signal[:80]}': traces, metrics or logs.")
    receipt = await receiver.receive(cast("Signal", signal), request)
    if receipt is Receipt.CONFLICT:
        raise HTTPException(status_code=409, detail="This Idempotency-Key came before with another body.")
    # The empty message says that all of it was taken. What came before is told apart for whoever looks.
    headers = {"idempotency-replayed": "true"} if receipt is Receipt.DUPLICATE else {}
    return Response(b"", media_type=PROTOBUF, headers=headers)


@get("/fleet/v1/devices")
async def list_devices(ledger: Ledger, limit: Limit = 100, after: str = "") -> DeviceList:
    """Devices in the order of their ids."""
    return await asyncio.to_thread(ledger.devices, after=after, limit=limit)


@get("/fleet/v1/devices/{device:str}/metrics")
async def last_metrics(device: str, ledger: Ledger) -> MetricList:
    """The last value of each metric of a device."""
    await _require_device(ledger, device)
    return await asyncio.to_thread(ledger.metrics, device)


@get("/fleet/v1/devices/{device:str}/requests")
async def list_requests(device: str, ledger: Ledger, limit: Limit = 100, after: After = 0) -> RequestPage:
    """The requests that a device served, in the order in which they arrived here."""
    await _require_device(ledger, device)
    return await asyncio.to_thread(ledger.requests, device, after=after, limit=limit)


async def _require_device(ledger: Ledger, device: str) -> None:
    if not await asyncio.to_thread(ledger.has_device, device):
        raise NotFoundException(detail=f"Nothing came from a device '{device[:80]}'. Known: GET /fleet/v1/devices.")


@get("/livez", media_type=MediaType.TEXT)
async def live() -> str:
    """The process answers."""
    return "ok"


@get("/readyz", media_type=MediaType.TEXT)
async def ready(ledger: Ledger) -> str:
    """Batches can be stored."""
    if ledger.error is not None:
        raise StoreError(ledger.error)
    return "ok"


async def check_host(request: AnyRequest) -> None:
    """Refuse a name that is not this machine's: a web page could have its own name lead here (DNS rebinding).

    Raises:
        HTTPException: The Host header names another machine.
    """
    host = request.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in _LOOPBACK_NAMES:
        raise HTTPException(status_code=421, detail=f"This gateway is not {host[:80]!r}: it answers on loopback only.")


def problem_of(request: AnyRequest, error: Exception) -> Response[Problem]:
    """The response for an error; what is unforeseen is logged and told nobody."""
    if isinstance(error, HTTPException):
        return _problem(error.status_code, _detail(error), code="http_error")
    if isinstance(error, EdgeError):
        status = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
        return _problem(status, error.message, code=error.code, hint=error.hint)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _problem(500, "The gateway failed; its log says why.", code="internal_error")


def _detail(error: HTTPException) -> str:
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        wrong = cast("list[dict[str, str]]", error.extra)
        reasons = "; ".join(f"{one.get('key')}: {one.get('message')}" for one in wrong)
        return f"The query is invalid: {reasons}."
    return error.detail


def _problem(status: int, detail: str, *, code: str, hint: str | None = None) -> Response[Problem]:
    title = http.HTTPStatus(status).phrase
    content = Problem(type="about:blank", title=title, status=status, detail=detail, code=code, hint=hint)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else {}
    return Response(content, status_code=status, media_type=PROBLEM, headers=headers)


def create_app(ledger: Ledger) -> Litestar:
    """The application around a ledger, which it closes when it ends."""

    @asynccontextmanager
    async def own_ledger(_app: Litestar) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(ledger.close)

    receiver = Receiver(ledger)
    return Litestar(
        [receive, list_devices, last_metrics, list_requests, live, ready],
        dependencies={
            "ledger": Provide(lambda: ledger, sync_to_thread=False),
            "receiver": Provide(lambda: receiver, sync_to_thread=False),
        },
        before_request=check_host,
        exception_handlers={Exception: problem_of},
        lifespan=[own_ledger],
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
