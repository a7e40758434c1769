"""Server-sent events, read strictly and within bounds.

Source: HTML Living Standard, section 9.2.6 "Interpreting an event stream". `id` and `retry` are read over: the
appliance sends neither, and the caller decides when to connect again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge.errors import EdgeError

MAX_LINE_BYTES = 1 << 20
MAX_EVENT_BYTES = 4 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class InvalidReply(EdgeError):
    """What answered does not speak the appliance's API."""

    code = "invalid_reply"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name and its data, lines joined by a newline."""

    name: str
    data: bytes


class EventParser:
    """Turns the bytes of one stream into events, however they are cut.

    An event that the stream's end cuts off is never given out.
    """

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._is_first = True
        self._name = ""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are complete with `chunk`.

        Raises:
            InvalidReply: A line or an event is longer than its bound, or a name is not UTF-8.
        """
        events: list[Event] = []
        for line in self._lines(chunk):
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        return events

    def _lines(self, chunk: bytes) -> list[bytes]:
        buffer = self._rest + chunk
        # A carriage return at the end may be half of a pair: it waits for the next byte.
        held = b"\r" if buffer.endswith(b"\r") else b""
        *lines, rest = _LINE_END.split(buffer.removesuffix(held) if held else buffer)
        self._rest = rest + held
        if max((len(line) for line in lines), default=0) > self._max_line_bytes or len(rest) > self._max_line_bytes:
            raise InvalidReply(f"The event stream has a line of more than {self._max_line_bytes:,} bytes.")
        if lines and self._is_first:
            self._is_first = False
            lines[0] = lines[0].removeprefix(_BOM)
        return lines

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            try:
                self._name = value.decode()
            except UnicodeDecodeError as e:
                raise InvalidReply("The event stream has an event whose name is not UTF-8.") from e
        elif name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            if self._data_bytes > self._max_event_bytes:
                raise InvalidReply(f"The event stream has an event of more than {self._max_event_bytes:,} bytes.")

    def _dispatch(self) -> Event | None:
        name, data = self._name or "message", self._data
        self._name, self._data, self._data_bytes = "", [], 0
        return Event(name, b"\n".join(data)) if data else None
