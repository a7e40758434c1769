"""The lines of a batch's file: read one at a time, and never believed."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from .schema import BatchError

MAX_LINES = 50_000
"""As at OpenAI; here blank ones count too."""
MAX_ERRORS = 100
"""Of a file that are told; then nobody looks further."""
LINE_EXTRA_BYTES = 4096
"""What a line may have beside its body."""
_SKIP_BYTES = 1 << 16


class _Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: msgspec.Raw


class _Streams(msgspec.Struct):
    stream: object = None


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` is counted from 1, `body` is JSON of which only the outside was looked at."""

    number: int
    custom_id: str
    body: bytes


class LineError(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def at(self, number: int) -> BatchError:
        """As it is told."""
        return BatchError(code=self.code, message=str(self), line=number, param=self.param)


def raw_lines(file: BinaryIO, *, max_bytes: int) -> Generator[tuple[int, bytes | None]]:
    """Each line that is not blank, with its number; None for one that is too long, of which no more is held. After
    `MAX_LINES` also blank ones, so that who counts may stop."""
    number = 0
    while data := file.readline(max_bytes + 2):
        number += 1
        if len(data.rstrip(b"\r\n")) > max_bytes:
            while data and not data.endswith(b"\n"):
                data = file.readline(_SKIP_BYTES)
            yield number, None
        elif (data := data.strip()) or number > MAX_LINES:
            yield number, data


def parse_line(number: int, data: bytes | None, endpoint: str) -> Line:
    """The request of a line.

    Raises:
        LineError: It is none, or one for another endpoint.
    """
    if data is None:
        raise LineError("line_too_long", "This line is longer than a request may be.")
    try:
        entry = msgspec.json.decode(data, type=_Entry)
        entry.custom_id.encode()
        is_object = bytes(entry.body).startswith(b"{")
        streams = bool(msgspec.json.decode(entry.body, type=_Streams).stream) if is_object else False
    except msgspec.ValidationError as e:
        raise _wrong_field(e) from e
    except (msgspec.DecodeError, UnicodeError, RecursionError) as e:
        raise LineError("invalid_json_line", f"This line is not a JSON object: {e}.") from e
    if entry.method != "POST":
        raise LineError("invalid_method", f"The method is {entry.method[:20]!r}; it is 'POST'.", "method")
    if entry.url != endpoint:
        raise LineError("mismatched_url", f"The url is {entry.url[:80]!r}; the batch is for {endpoint!r}.", "url")
    if not is_object:
        raise LineError("invalid_body", "The body is not a JSON object.", "body")
    if streams:
        raise LineError("invalid_body", "Answers of a batch are not streamed: leave 'stream' out.", "body.stream")
    return Line(number, entry.custom_id, bytes(entry.body))


def _wrong_field(error: msgspec.ValidationError) -> LineError:
    message, _, path = str(error).partition(" - at `$")
    name = path.strip("`.") or (message.split("`")[1] if "`" in message else "")
    if name.startswith("body."):
        return LineError("invalid_body", f"{message}.", name)
    kind = "missing_required_parameter" if "missing required" in message else "invalid_request"
    return LineError(kind, f"{message}.", name or None)


def check_lines(lines: Iterable[tuple[int, bytes | None]], endpoint: str) -> tuple[int, list[BatchError]]:
    """How many requests there are, and what is wrong; of so many errors or lines too many, nobody looks further."""
    seen: set[bytes] = set()
    errors: list[BatchError] = []
    num, is_too_long = 0, False
    for number, data in lines:
        num += 1
        if (is_too_long := number > MAX_LINES) or len(errors) >= MAX_ERRORS:
            break
        try:
            _check_new(parse_line(number, data, endpoint).custom_id, seen)
        except LineError as e:
            errors.append(e.at(number))
    if is_too_long:
        errors.append(BatchError(code="too_many_requests", message=f"A batch has {MAX_LINES:,} lines at most."))
    if not num:
        errors.append(BatchError(code="empty_file", message="The file has no lines."))
    return num, errors


def _check_new(custom_id: str, seen: set[bytes]) -> None:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        raise LineError("duplicate_custom_id", f"The custom_id {custom_id[:64]!r} is another line's.", "custom_id")
    seen.add(digest)


def unanswered(path: Path, endpoint: str, answered: set[int], *, max_bytes: int) -> Generator[Line]:
    """The requests of a checked file that have no answer yet.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, data in raw_lines(file, max_bytes=max_bytes):
            if number not in answered:
                yield parse_line(number, data, endpoint)
