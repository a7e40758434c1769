"""Uploads as clients send them: multipart forms (RFC 7578), of which the file goes to the disk while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from litestar.types import Receive
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from edge.errors import FileTooLarge, InvalidRequest
from runtime.api.responses import ClientClosed

from .uploads import Upload

FORM_BYTES = 1 << 16
"""What a form may have beside its file."""
MAX_PARTS = 16
MAX_VALUE_BYTES = 1024


@dataclass(slots=True)
class Form:
    """What a form said.

    Attributes:
        filename: As the client names it; None where no file came.
    """

    fields: dict[str, str] = field(default_factory=dict[str, str])
    filename: str | None = None


async def read_form(
    receive: Receive, boundary: str, upload: Upload, *, limit_bytes: int, check: Callable[[str, str], None]
) -> Form:
    """Read a whole form, the part ``file`` into the upload.

    Args:
        limit_bytes: Of the file.
        check: Called with each other field as it comes, so that what will be refused is not read to its end.

    Raises:
        InvalidRequest: It is malformed, or `check` says so.
        FileTooLarge: It is.
        StoreError: There is no room.
    """
    if not 0 < len(boundary) <= 200:
        raise _malformed("its Content-Type has no boundary")
    reader = _Reader(upload, check)
    try:
        parser = PushMultipartParser(boundary.encode(), max_segment_count=MAX_PARTS)
        async for chunk in _chunks(receive, limit_bytes + FORM_BYTES, limit_bytes):
            for event in parser.parse(chunk):
                await reader.take(event)
        parser.close()
    except MultipartError as e:
        raise _malformed(str(e)) from e
    return reader.form


async def _chunks(receive: Receive, most_bytes: int, limit_bytes: int) -> AsyncGenerator[bytes]:
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientClosed("The client went away before the file was here.")
        more = message["more_body"]
        if (size := size + len(message["body"])) > most_bytes:
            raise FileTooLarge(limit_bytes=limit_bytes)
        if message["body"]:
            yield message["body"]


class _Reader:
    def __init__(self, upload: Upload, check: Callable[[str, str], None]) -> None:
        self.form = Form()
        self._upload, self._check = upload, check
        self._name = ""
        self._value = bytearray()

    async def take(self, event: MultipartSegment | bytes | None) -> None:
        """A part begins, goes on, or ends."""
        if isinstance(event, MultipartSegment):
            self._begin(event.name or "", event.filename)
        elif event is None:
            self._end()
        elif self._name == "file":
            await asyncio.to_thread(self._upload.write, event)
        elif len(self._value) + len(event) > MAX_VALUE_BYTES:
            raise InvalidRequest(f"The field {self._name[:64]!r} is too long.", field=self._name[:64])
        else:
            self._value += event

    def _begin(self, name: str, filename: str | None) -> None:
        if name == "file":
            if self.form.filename is not None:
                raise InvalidRequest("There are two files.", field="file", hint="Send each by itself.")
            self.form.filename = filename or "file"
        self._name, self._value = name, bytearray()

    def _end(self) -> None:
        if self._name == "file":
            return
        value = self._value.decode("utf-8", "replace")
        self._check(self._name, value)
        self.form.fields[self._name] = value


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The form cannot be read: {reason}.", hint="Send multipart/form-data with 'purpose' and 'file'."
    )
