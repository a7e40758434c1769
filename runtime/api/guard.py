"""Who may speak to the API: programs of this machine, those who hold a key, and no web page that a browser happens to
show, but for those that the operator listed.

A page from anywhere can make a browser send requests to loopback. Its `Origin` tells on it; where a name was rebound to
127.0.0.1 so that no `Origin` is sent, the `Host` does. Programs send no `Origin`, and name this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from litestar import Request
from litestar.types import (
    ASGIApp,
    HTTPReceiveMessage,
    HTTPScope,
    Message,
    Receive,
    Scope,
    Send,
    WebSocketReceiveMessage,
)

from edge.config import Settings, listed
from edge.errors import EdgeError, Forbidden
from runtime.api.access import METERED, Access, Caller, Meter, Need
from runtime.api.errors import to_response
from runtime.api.parsing import set_strict

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_PREFLIGHT_S = 600
INSIDE = "edge.caller"
"""The extension of a scope in which the appliance says on whose behalf it asks itself. No client can set one."""
_EXPOSED = (
    "Retry-After, WWW-Authenticate, x-edge-warnings, x-should-retry, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


def host_of(header: str) -> str:
    """The host of a `Host` header, without its port (RFC 9110, section 7.2)."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def check_host(host: str | None, *, allowed: frozenset[str]) -> None:
    """See that a request names this device.

    Raises:
        Forbidden: It names another host.
    """
    if host is not None and host_of(host) not in allowed:
        raise Forbidden(
            f"This appliance does not answer for the host {host[:100]!r}.",
            hint="Use its address, or have the operator list the name in allowed_hosts.",
        )


def check_origin(origin: str | None, *, hosts: frozenset[str], listed_origins: frozenset[str]) -> None:
    """See that a request comes from a program, or from a page of this device or one that is listed.

    Raises:
        Forbidden: It comes from a page of another site.
    """
    if origin is not None and origin.lower() not in listed_origins and _origin_host(origin) not in hosts:
        raise Forbidden(
            f"Pages of {origin[:100]!r} may not use this appliance.",
            hint="Ask from a program, or have the operator list the origin in cors_origins.",
        )


def _origin_host(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
        return parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        return None


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sent the request of this scope."""
    return meter_of(scope).caller


def meter_of(scope: Mapping[str, Any]) -> Meter:
    """What the request of this scope uses."""
    meter: Meter = scope["state"]["meter"]
    return meter


def guard(settings: Settings, access: Access) -> Callable[[ASGIApp], ASGIApp]:
    """Middleware that lets in whom the settings and the keys allow, and counts what they use."""
    gate = _Gate(settings, access)
    return lambda app: gate.around(app)


class _Gate:
    def __init__(self, settings: Settings, access: Access) -> None:
        self._access = access
        self._named_hosts = listed(settings.allowed_hosts)
        self._origins = listed(settings.cors_origins)
        self._is_strict = settings.strict == "on"

    def around(self, app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._answer(app, scope, receive, send)

        return guarded

    async def _answer(self, app: ASGIApp, scope: HTTPScope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        meter: Meter | None = None
        is_metered = False

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if meter is not None:
                    meter.status = message["status"]
                raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
                message["headers"] = [*message["headers"], *raw]
            await send(message)

        async def counted() -> HTTPReceiveMessage | WebSocketReceiveMessage:
            message = await receive()
            if message["type"] == "http.request" and meter is not None:
                meter.arrive(len(message["body"]))
            return message

        try:
            headers |= self._check_page(scope)
            if scope["method"] == "OPTIONS":
                headers |= _preflight(scope) if headers else {}
            else:
                caller, need = self._identify(scope)
                meter = scope["state"]["meter"] = Meter(caller)
                is_metered = need in METERED and scope["method"] == "POST"
                caller.check(need)
                if is_metered:
                    self._access.admit(meter, num_bytes=_body_bytes(scope))
                headers |= self._access.limit_headers(caller)
                set_strict(_header(scope, b"x-edge-strict"), by_default=self._is_strict)
            await app(scope, counted, with_headers)
        except EdgeError as e:  # the page that asks is told why, so the answer goes through the same door
            request: Request[Any, Any, Any] = Request(scope, receive, send)
            response = to_response(request, e).to_asgi_response(None, request)  # pyright: ignore[reportUnknownMemberType]  # litestar leaves an encoder's type open
            if meter is not None:
                headers |= self._access.limit_headers(meter.caller)
            await response(scope, receive, with_headers)
        finally:
            if meter is not None and is_metered:
                self._access.settle(meter)

    def _check_page(self, scope: HTTPScope) -> dict[str, str]:
        """See that no foreign page asks. What a page that may is told; nothing where none asks."""
        server = scope["server"]
        if server is None or server[1] is None:
            return {}  # the Unix socket: no page reaches it
        own = _LOCAL | {server[0].lower()} | self._named_hosts
        if self._named_hosts or not self._access.keys_required:
            check_host(_header(scope, b"host"), allowed=own)
        origin = _header(scope, b"origin")
        check_origin(origin, hosts=own if not self._access.keys_required else _LOCAL, listed_origins=self._origins)
        if origin is None:
            # A foreign page's images and links tell no origin, but that they are a foreign page's.
            if _need(scope) != "nothing" and _header(scope, b"sec-fetch-site") in ("cross-site", "same-site"):
                raise Forbidden("Pages of other sites may not use this appliance.", hint="Ask from a program.")
            return {}
        # Never with credentials: cookies are nobody's key here.
        return {"access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": _EXPOSED}

    def _identify(self, scope: HTTPScope) -> tuple[Caller, Need]:
        if (inside := _inside(scope)) is not None:
            return inside, _need(scope)
        server, client = scope["server"], scope["client"]
        is_local = server is None or server[1] is None
        address = "unix" if is_local or client is None else client[0]
        need = _need(scope)
        if need == "nothing":
            return Caller(None, address), need
        return self._access.identify(scope["headers"], address=address, is_local=is_local), need


def _inside(scope: Mapping[str, Any]) -> Caller | None:
    """On whose behalf the appliance asks itself; None where it is asked by others."""
    extensions: Mapping[str, Any] | None = scope.get("extensions")
    caller: Caller | None = extensions.get(INSIDE) if extensions else None
    return caller


def _body_bytes(scope: HTTPScope) -> int:
    """Of the body, as it is announced; 0 where it is not."""
    length = _header(scope, b"content-length") or ""
    return int(length) if length.isdecimal() and len(length) < 12 else 0


def _need(scope: HTTPScope) -> Need:
    need: Need = scope["route_handler"].opt.get("needs", "admin")
    return need


def _preflight(scope: HTTPScope) -> dict[str, str]:
    """What a browser is told that asks before it sends (Fetch standard, "CORS protocol")."""
    wanted = _header(scope, b"access-control-request-headers") or ""
    names = [name.strip() for name in wanted.split(",")][:64]
    return {
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": ", ".join(n for n in names if _is_token(n)),
        "access-control-max-age": str(_PREFLIGHT_S),
    }


def _is_token(name: str) -> bool:
    return 0 < len(name) <= 64 and all(c.isalnum() or c in "-_" for c in name) and name.isascii()


def _header(scope: HTTPScope, name: bytes) -> str | None:
    """A header's value; of one that stands there twice, both, which no list allows."""
    found = [value for key, value in scope["headers"] if key == name]
    return b", ".join(found).decode("latin-1") if found else None
