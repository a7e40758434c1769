"""Who may speak to the API over TCP: programs of this machine, and no web page that a browser here happens to show.

A page from anywhere can make a browser send requests to loopback. Its `Origin` tells on it; where a name was rebound to
127.0.0.1 so that no `Origin` is sent, the `Host` does. Programs send no `Origin`, and name this machine.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from litestar.types import ASGIApp, Receive, Scope, Send

from edge.errors import Forbidden

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def host_of(header: str) -> str:
    """The host of a `Host` header, without its port (RFC 9110, section 7.2)."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def check_caller(*, host: str | None, origin: str | None, bound_to: str) -> None:
    """Let a program of this machine pass.

    Raises:
        Forbidden: The request names another host, or comes from a page of another site.
    """
    allowed = _LOCAL | {bound_to.lower()}
    if host is not None and host_of(host) not in allowed:
        raise Forbidden(f"This appliance does not answer for the host {host[:100]!r}.", hint="Use http://127.0.0.1.")
    if origin is not None and _origin_host(origin) not in allowed:
        raise Forbidden(f"Pages of {origin[:100]!r} may not use this appliance.", hint="Ask from a program instead.")


def _origin_host(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
        return parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        return None


def _header(scope: Scope, name: bytes) -> str | None:
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if found else None


def guard(app: ASGIApp) -> ASGIApp:
    """Middleware: check callers over TCP. The Unix socket has file permissions instead."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        server = scope["server"]
        if scope["type"] == "http" and server is not None and server[1] is not None:
            check_caller(host=_header(scope, b"host"), origin=_header(scope, b"origin"), bound_to=server[0])
        await app(scope, receive, send)

    return checked
