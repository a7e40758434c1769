"""What becomes of a line: the answer as its file has it, and whether to ask again."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from .inside import Reply
from .lines import Line

MAX_TRIES = 10
"""For a model that is being loaded."""
MAX_WAIT_S = 600.0
DEFAULT_WAIT_S = 5.0
MAX_WAIT_FOR_MEMORY_S = 60.0


class _Response(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Problem(msgspec.Struct, kw_only=True):
    code: str
    message: str


class _AnsweredLine(msgspec.Struct, kw_only=True):
    id: str
    custom_id: str
    response: _Response | None = None
    error: _Problem | None = None


Count = Annotated[int, msgspec.Meta(ge=0)]


class _Cached(msgspec.Struct):
    cached_tokens: Count = 0


class _Reasoned(msgspec.Struct):
    reasoning_tokens: Count = 0


class _Usage(msgspec.Struct):
    """Of whichever endpoint: each has its own names."""

    prompt_tokens: Count = 0
    input_tokens: Count = 0
    completion_tokens: Count = 0
    output_tokens: Count = 0
    prompt_tokens_details: _Cached | None = None
    input_tokens_details: _Cached | None = None
    completion_tokens_details: _Reasoned | None = None
    output_tokens_details: _Reasoned | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of an output or an error file, without its end.

    Attributes:
        tokens: Of the prompt, those of it that were cached, of the answer, and those of it that were thoughts.
    """

    number: int
    data: bytes
    is_error: bool
    tokens: tuple[int, int, int, int] = field(default=(0, 0, 0, 0))


def answer_of(line: Line, reply: Reply) -> Answer:
    """What a request was answered, well or badly."""
    response = _Response(
        status_code=reply.status, request_id=f"req_{secrets.token_hex(12)}", body=msgspec.Raw(reply.body or b"null")
    )
    is_error = reply.status != 200
    tokens = (0, 0, 0, 0) if is_error else _tokens(reply.body)
    return Answer(line.number, _encoded(line, response=response), is_error, tokens)


def no_answer(line: Line, *, code: str, message: str) -> Answer:
    """A line that was never answered, and why."""
    return Answer(line.number, _encoded(line, error=_Problem(code=code, message=message)), is_error=True)


def _encoded(line: Line, *, response: _Response | None = None, error: _Problem | None = None) -> bytes:
    made = _AnsweredLine(
        id=f"batch_req_{secrets.token_hex(12)}", custom_id=line.custom_id, response=response, error=error
    )
    return msgspec.json.encode(made)


def _tokens(body: bytes) -> tuple[int, int, int, int]:
    with contextlib.suppress(msgspec.MsgspecError):
        if (used := msgspec.json.decode(body, type=_Body).usage) is not None:
            cached = used.prompt_tokens_details or used.input_tokens_details or _Cached()
            thought = used.completion_tokens_details or used.output_tokens_details or _Reasoned()
            return (
                used.prompt_tokens or used.input_tokens, cached.cached_tokens,
                used.completion_tokens or used.output_tokens, thought.reasoning_tokens,
            )  # fmt: skip
    return 0, 0, 0, 0


def wait_before_retry_s(reply: Reply, *, num_tries: int) -> float | None:
    """How long to wait until the line is asked again; None where its answer stands."""
    asked_s = min(MAX_WAIT_S, max(1.0, reply.retry_after_s or DEFAULT_WAIT_S))
    if reply.status == 429:
        return asked_s
    if reply.status == 503 and reply.code == "server_stopping":  # its model was unloaded, or this task ends soon
        return DEFAULT_WAIT_S
    if reply.status == 507 and reply.code == "does_not_fit":  # while other models are in use; the batch's time ends it
        return min(MAX_WAIT_FOR_MEMORY_S, DEFAULT_WAIT_S * 2.0 ** min(num_tries - 1, 10))
    if reply.status == 503 and num_tries < MAX_TRIES:
        return asked_s
    return None
