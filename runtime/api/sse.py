"""Server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

PING = b": ping\n\n"
"""A comment, sent where a stream is silent for long: proxies and clients cut silent connections."""
DONE = b"data: [DONE]\n\n"


def data(body: bytes) -> bytes:
    """An event without a name. `body` is one line."""
    return b"data: " + body + b"\n\n"


def event(name: str, body: bytes) -> bytes:
    """A named event."""
    return b"event: " + name.encode() + b"\n" + data(body)
