"""Rows over HTTP to an OTLP receiver."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import httpx

from edge.errors import root_cause

from .outbox import Row

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 30.0
MAX_REPLY_BYTES = 64 << 10
MAX_RETRY_AFTER_S = 3600.0
_PROTOBUF = "application/x-protobuf"
# What says "this body is invalid" and will say so again. Other refusals (401, 403, 404, 405 …) are about the place or
# the caller: a wrong address must not turn a month of records into rejects.
_INVALID = frozenset({400, 409, 413, 415, 422})


@dataclass(frozen=True, slots=True)
class Accepted:
    """The receiver has it. `rejected_records` of it were thrown away there, and are not to be sent again."""

    rejected_records: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """The receiver calls this body invalid."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Nothing can be said of this body: the link, the receiver or the address is at fault."""

    reason: str
    retry_after_s: float | None = None


Delivery = Accepted | Rejected | Unavailable


class Exporter(Protocol):
    """Sends one row and says what became of it. Network errors are an answer, not an exception."""

    def export(self, row: Row) -> Delivery:
        """Send the row once."""
        ...


class OtlpHttpExporter:
    """OTLP over HTTP, protobuf and gzip, with an ``Idempotency-Key``. Owned by one thread, which closes it.

    Nothing is connected before the first row. Redirects are not followed, and proxies and certificates of the
    environment are not used: records go where the setting says, or nowhere.

    Source: OTLP specification 1.x, "OTLP/HTTP"; draft-ietf-httpapi-idempotency-key-header.
    """

    def __init__(self, gateway_url: str, *, reply_timeout_s: float = REPLY_TIMEOUT_S) -> None:
        import httpx  # 60 ms, on the forwarder's thread

        self._base_url = gateway_url.rstrip("/")
        self._client = httpx.Client(
            timeout=httpx.Timeout(reply_timeout_s, connect=CONNECT_TIMEOUT_S), trust_env=False, follow_redirects=False
        )
        self._errors = (httpx.HTTPError, httpx.InvalidURL)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def export(self, row: Row) -> Delivery:
        """Send the row and judge the reply."""
        headers = {
            "content-type": _PROTOBUF,
            "content-encoding": "gzip",
            "accept-encoding": "identity",
            "idempotency-key": row.key,
            # lets the receiver tell how wrong this device's clock is
            "edge-sent-unix-ms": str(time.time_ns() // 1_000_000),
        }
        try:
            with self._client.stream(
                "POST", f"{self._base_url}/v1/{row.signal}", headers=headers, content=row.body
            ) as response:
                return _judged(row, response, _bounded_body(response))
        except self._errors as e:
            return Unavailable(_reason(e))


def _reason(error: Exception) -> str:
    import httpx

    cause = root_cause(error)
    cause = cause if cause[1:2].isupper() else cause[:1].lower() + cause[1:]
    if isinstance(error, httpx.ConnectError | httpx.TimeoutException):
        return f"gateway URL does not answer ({cause})"
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"gateway URL cannot be used ({cause})"
    return f"gateway broke off ({cause})"


def _bounded_body(response: httpx.Response) -> bytes:
    body = b""
    for chunk in response.iter_raw(4096):
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            break
    return body[:MAX_REPLY_BYTES]


def _judged(row: Row, response: httpx.Response, body: bytes) -> Delivery:
    status = response.status_code
    if status == 200:
        return _accepted(row, response.headers.get("content-type", ""), body)
    reason = f"{response.request.url} answered {status}: {body[:200].decode('utf-8', 'replace')}"
    if status in _INVALID:
        return Rejected(reason)
    return Unavailable(reason, retry_after_s(response))


def _accepted(row: Row, content_type: str, body: bytes) -> Delivery:
    """Only a reply that is OTLP's counts: a captive portal answers 200 to everything."""
    from .otlp import rejected_records

    if content_type.partition(";")[0].strip().lower() != _PROTOBUF and (body or content_type):
        found = content_type or "a body of no type"
        return Unavailable(f"The reply was 200 with {found}, not OTLP: is the address that of an OTLP receiver?")
    try:
        return Accepted(rejected_records(row.signal, body))
    except ValueError as e:
        return Unavailable(str(e))


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, at most an hour. A date counts from the reply's own ``Date``.

    Source: RFC 9110, section 10.2.3.
    """
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return min(MAX_RETRY_AFTER_S, float(value[:9]))
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers.get("date", ""))
    except (ValueError, TypeError):  # no date, or one aware of its zone and one not
        return None
    return min(MAX_RETRY_AFTER_S, max(0.0, wait.total_seconds()))
