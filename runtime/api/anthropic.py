"""Anthropic's Messages API: the same calls as OpenAI's, in other words."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from litestar import Response, post
from litestar.datastructures import State

from edge.errors import EdgeError
from runtime import wire
from runtime.api import sse
from runtime.api.access import needs
from runtime.api.anthropic_schema import (
    AnsweredBlock,
    AnsweredText,
    AnsweredThinking,
    AnsweredToolUse,
    AnthropicMessage,
    AnthropicUsage,
    CountedTokens,
    CountTokensRequest,
    MessagesRequest,
)
from runtime.api.call import Call, HttpRequest, Steps
from runtime.api.describe import EVENTS, exchanges
from runtime.api.errors import fault_of, request_id_of
from runtime.api.openai import Answer, start_chat, warning_headers, whole_answers
from runtime.api.parsing import parse_body
from runtime.api.responses import EventStream
from runtime.api.tokens import rendered

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request, and what its answer says of it."""

    body: MessagesRequest
    call: Call
    warnings: list[str]

    @property
    def token(self) -> str:
        """What tells this request from others."""
        return self.call.id.rpartition("-")[2]

    @property
    def headers(self) -> dict[str, str]:
        return {**warning_headers(self.warnings), "request-id": request_id_of(self.token)}

    def message(self, content: list[AnsweredBlock]) -> AnthropicMessage:
        """The answer as far as it came."""
        reason, sequence = self.end()
        return AnthropicMessage(
            id=f"msg_{self.token}", model=self.call.model, content=content, stop_reason=reason, stop_sequence=sequence,
            usage=self.usage(), warnings=self.warnings or msgspec.UNSET,
        )  # fmt: skip

    def usage(self) -> AnthropicUsage:
        """Tokens so far."""
        prompt, cached, output = self.call.tokens
        return AnthropicUsage(input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=output)

    def end(self) -> tuple[str | None, str | None]:
        """Why the answer ended, and the stop sequence that ended it; nothing while it goes on."""
        last = self.call.last
        if last is None or last.finish_reason is None:
            return None, None
        if last.finish_reason == "stop" and last.stop in (self.body.stop_sequences or ()):
            return "stop_sequence", last.stop
        if last.finish_reason == "length" and last.num_output < self.body.max_tokens:
            return "model_context_window_exceeded", None
        return _REASONS[last.finish_reason], None


@post("/v1/messages", opt=needs("chat") | exchanges(MessagesRequest, streams=EVENTS), status_code=200)
async def messages(request: HttpRequest, state: State) -> Response[AnthropicMessage] | EventStream:
    """Answer a conversation, in Anthropic's words."""
    body, warnings = parse_body(await request.body(), MessagesRequest)
    calls, streams = await start_chat(request, state, body.chat())
    asked = _Asked(body, calls[0], warnings + body.warnings(_ready(calls[0])))
    if body.stream:
        return EventStream(_events(asked, streams[0]), on_close=lambda: asked.call.finish(None), headers=asked.headers)
    (answer,) = await whole_answers(request, calls, streams)
    return Response(asked.message(_content(answer)), headers=asked.headers)


@post("/v1/messages/count_tokens", opt=needs("chat") | exchanges(CountTokensRequest), status_code=200)
async def count_tokens(request: HttpRequest, state: State) -> Response[CountedTokens]:
    """How many tokens a conversation's prompt has."""
    body, warnings = parse_body(await request.body(), CountTokensRequest)
    _, last = await rendered(request, state, body.chat())
    return Response(CountedTokens(input_tokens=len(last.tokens or ())), headers=warning_headers(warnings))


def _ready(call: Call) -> wire.Ready | None:
    return call.host.ready if call.host is not None else None


def _content(answer: Answer) -> list[AnsweredBlock]:
    """The blocks of a whole answer. There is one at least: clients read the first. A call that was cut is none."""
    thought = [AnsweredThinking(answer.reasoning)] if answer.reasoning else []
    calls = [AnsweredToolUse(c.id, c.name, found) for c in answer.calls if (found := _object(c.arguments)) is not None]
    said = [AnsweredText(answer.text)] if answer.text or not (thought or calls) else []
    return [*thought, *said, *calls]


def _object(text: str) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, object])
    except msgspec.DecodeError:
        return None


# ---------------------------------------------------------------- streams

PING = sse.event("ping", b'{"type": "ping"}')


def _event(name: str, **fields: object) -> bytes:
    return sse.event(name, msgspec.json.encode({"type": name, **fields}))


@dataclass(slots=True)
class _Blocks:
    """The content blocks of a streamed answer. One is open at a time; a piece that is of another kind closes it."""

    index: int = -1
    kind: str = ""

    def events(self, piece: wire.Piece) -> bytes:
        """What a piece adds."""
        out = b""
        if piece.reasoning:
            out += self._open("thinking", AnsweredThinking("")) + self._delta(
                "thinking_delta", thinking=piece.reasoning
            )
        if piece.text:
            out += self._open("text", AnsweredText("")) + self._delta("text_delta", text=piece.text)
        for call in piece.calls:
            out += self._open(f"call {call.index}", AnsweredToolUse(call.id, call.name, {}))
            if call.arguments:
                out += self._delta("input_json_delta", partial_json=call.arguments)
        return out

    def close(self) -> bytes:
        """The end of the last block. An answer without any has an empty text, as a whole one has."""
        start = b"" if self.kind else self._open("text", AnsweredText(""))
        return start + _event("content_block_stop", index=self.index)

    def _open(self, kind: str, block: AnsweredBlock) -> bytes:
        """Begin a block, unless it is the one that is open."""
        if kind == self.kind:
            return b""
        end = self.close() if self.kind else b""
        self.kind, self.index = kind, self.index + 1
        start = _event("content_block_start", index=self.index, content_block=block)
        return end + start + (PING if self.index == 0 else b"")

    def _delta(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=self.index, delta={"type": kind, **fields})


async def _events(asked: _Asked, steps: Steps) -> AsyncGenerator[bytes]:
    """The stream of an answer. What goes wrong after the first byte is an event, since the status is spent."""
    error: BaseException | None = None
    blocks = _Blocks()
    try:
        start = msgspec.structs.replace(asked.message([]), stop_reason=None, stop_sequence=None)
        yield _event("message_start", message=start)
        async with aclosing(steps):
            async for pieces in steps:
                out = b"".join(map(blocks.events, pieces)) if pieces else PING
                if pieces and pieces[-1].finish_reason is not None:
                    out += blocks.close() + _end(asked)
                if out:
                    yield out
    except EdgeError as e:
        error = e
        yield sse.event("error", msgspec.json.encode(fault_of(e).anthropic(request_id_of(asked.token))))
    except BaseException as e:
        error = e
        raise
    finally:
        asked.call.finish(error)


def _end(asked: _Asked) -> bytes:
    reason, sequence = asked.end()
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return _event("message_delta", delta=delta, usage=asked.usage()) + _event("message_stop")


HANDLERS = [messages, count_tokens]
