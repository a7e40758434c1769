"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec
from litestar import Response, get, post
from litestar.datastructures import State

from edge.errors import EdgeError
from edge.store.models import StoredModel
from runtime import wire
from runtime.api import sse
from runtime.api.appliance import appliance_of
from runtime.api.call import Call, HttpRequest
from runtime.api.errors import fault_of
from runtime.api.openai_schema import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Model,
    Models,
)
from runtime.api.parsing import check_items, parse_body
from runtime.api.responses import EventStream, until_disconnect
from runtime.selection import combined_name, refuse_adapter


async def _collect(call: Call, steps: AsyncGenerator[list[wire.Piece]]) -> tuple[str, str]:
    """The whole answer and why it ended."""
    texts: list[str] = []
    reason = "stop"
    async for pieces in steps:
        texts += [p.text for p in pieces]
        reason = next((p.finish_reason for p in pieces if p.finish_reason), reason)
    return "".join(texts), reason


async def _answer(http: HttpRequest, call: Call, steps: AsyncGenerator[list[wire.Piece]]) -> tuple[str, str]:
    error: BaseException | None = None
    try:
        return await until_disconnect(http.receive, _collect(call, steps))
    except BaseException as e:
        error = e
        raise
    finally:
        call.finish(error)


Format = Callable[[str | None, str | None], bytes]
"""One event's JSON, of a text that was added and of the reason why the answer ended."""


async def _events(
    call: Call,
    steps: AsyncGenerator[list[wire.Piece]],
    *,
    first: bytes,
    format_event: Format,
    tail: Callable[[], bytes],
) -> AsyncGenerator[bytes]:
    """The stream of an answer. What goes wrong after the first byte is an event, since the status is spent."""
    error: BaseException | None = None
    try:
        if first:
            yield sse.data(first)
        async for pieces in steps:
            if not pieces:
                yield sse.PING
                continue
            out = b"".join(sse.data(format_event(p.text, None)) for p in pieces if p.text)
            if reason := pieces[-1].finish_reason:
                out += sse.data(format_event(None, reason)) + tail() + sse.DONE
            if out:
                yield out
    except EdgeError as e:
        error = e
        yield sse.data(msgspec.json.encode(fault_of(e).openai()))
    except BaseException as e:
        error = e
        raise
    finally:
        call.finish(error)


def _chunk_format(call: Call, kind: str, choice: Callable[[str | None, str | None], bytes]) -> Format:
    """Events with all that stays the same encoded once."""
    head = msgspec.json.encode(
        {
            "id": call.id,
            "object": kind,
            "created": call.created,
            "model": call.model,
            "system_fingerprint": call.fingerprint,
        }
    )[:-1]

    def format_event(text: str | None, reason: str | None) -> bytes:
        return head + b',"choices":[' + choice(text, reason) + b"]}"

    return format_event


def _chat_choice(text: str | None, reason: str | None) -> bytes:
    if reason is not None:
        return b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"' + reason.encode() + b'"}'
    return b'{"index":0,"delta":{"content":' + msgspec.json.encode(text) + b'},"logprobs":null,"finish_reason":null}'


def _text_choice(text: str | None, reason: str | None) -> bytes:
    why = b'"' + reason.encode() + b'"' if reason else b"null"
    return b'{"index":0,"text":' + msgspec.json.encode(text or "") + b',"logprobs":null,"finish_reason":' + why + b"}"


def _stream(
    call: Call,
    steps: AsyncGenerator[list[wire.Piece]],
    warnings: list[str],
    *,
    kind: str,
    choice: Callable[[str | None, str | None], bytes],
    first_choice: bytes = b"",
) -> EventStream:
    format_event = _chunk_format(call, kind, choice)
    empty = format_event("", None)
    head = empty[: empty.index(b',"choices":[')]
    wants_usage = call.body.stream_options is not None and call.body.stream_options.include_usage

    def tail() -> bytes:
        """OpenAI's last chunk: no choices, and the usage; only for who asked."""
        if not wants_usage:
            return b""
        return sse.data(head + b',"choices":[],"usage":' + msgspec.json.encode(call.usage()) + b"}")

    first = head + b',"choices":[' + first_choice + b"]}" if first_choice else b""
    events = _events(call, steps, first=first, format_event=format_event, tail=tail)
    return EventStream(events, on_close=lambda: call.finish(None), headers=warning_headers(warnings))


def warning_headers(warnings: list[str]) -> dict[str, str]:
    """The header that lists what was left out of account."""
    text = "; ".join(warnings).encode("ascii", "replace").decode("ascii")
    return {"x-edge-warnings": "".join(c if c.isprintable() else "?" for c in text)} if warnings else {}


_MESSAGE_FIELDS = frozenset(f.encode_name for f in msgspec.structs.fields(ChatMessage))


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: HttpRequest, state: State) -> Response[ChatCompletion] | EventStream:
    """Answer a conversation."""
    content = await request.body()
    body, warnings = parse_body(content, ChatRequest)
    warnings += check_items(content, "messages", _MESSAGE_FIELDS, frozenset({"tool_calls", "function_call"}))
    max_tokens = body.max_completion_tokens or body.max_tokens or 0
    call = Call(appliance_of(state), request, body, operation="chat", max_tokens=max_tokens)
    messages = [_wire_message(m) for m in body.messages]
    steps = await call.start(
        request.receive,
        lambda i, params: wire.Generate(
            i,
            messages,
            None,
            params,
            max_tokens,
            body.stops(),
            body.ignore_eos,
            body.return_token_ids,
            cache_key=body.prompt_cache_key or "",
            constraint=call.constraint,
        ),
    )
    if call.stream:
        role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        kind = "chat.completion.chunk"
        return _stream(call, steps, warnings, kind=kind, choice=_chat_choice, first_choice=role)
    text, reason = await _answer(request, call, steps)
    completion = ChatCompletion(
        id=call.id,
        created=call.created,
        model=call.model,
        system_fingerprint=call.fingerprint,
        choices=[
            ChatChoice(
                index=0, message=AssistantMessage(content=text), finish_reason=reason, token_ids=call.answer_ids()
            )
        ],
        usage=call.usage(),
        prompt_token_ids=call.prompt_ids(),
        warnings=warnings or msgspec.UNSET,
    )
    return Response(completion, headers=warning_headers(warnings))


def _wire_message(message: ChatMessage) -> wire.ChatMessage:
    role = "system" if message.role == "developer" else message.role
    return wire.ChatMessage(role, message.text())


@post("/v1/completions", status_code=200)
async def completions(request: HttpRequest, state: State) -> Response[Completion] | EventStream:
    """Continue a text, or token ids."""
    body, warnings = parse_body(await request.body(), CompletionRequest)
    max_tokens = body.max_tokens or 16  # OpenAI's default for this endpoint
    call = Call(appliance_of(state), request, body, operation="text_completion", max_tokens=max_tokens)
    steps = await call.start(
        request.receive,
        lambda i, params: wire.Generate(
            i,
            None,
            body.prompt,
            params,
            max_tokens,
            body.stops(),
            body.ignore_eos,
            body.return_token_ids,
            cache_key=body.prompt_cache_key or "",
            constraint=call.constraint,
        ),
    )
    if call.stream:
        return _stream(call, steps, warnings, kind="text_completion", choice=_text_choice)
    text, reason = await _answer(request, call, steps)
    completion = Completion(
        id=call.id,
        created=call.created,
        model=call.model,
        system_fingerprint=call.fingerprint,
        choices=[CompletionChoice(index=0, text=text, finish_reason=reason, token_ids=call.answer_ids())],
        usage=call.usage(),
        prompt_token_ids=call.prompt_ids(),
        warnings=warnings or msgspec.UNSET,
    )
    return Response(completion, headers=warning_headers(warnings))


@get("/v1/models")
async def list_models(state: State) -> Models:
    """The models of the store, also with each adapter that fits. Listing loads nothing."""
    appliance = appliance_of(state)
    stored = await appliance.stored_models()
    adapted = [_adapted(base, adapter) for base, adapter in await appliance.pool.combinations(stored)]
    return Models(data=[_model(m) for m in stored if not m.is_adapter] + adapted)


def _model(stored: StoredModel) -> Model:
    return Model(id=str(stored.ref), created=int(stored.created), owned_by="slm-edge")


def _adapted(base: StoredModel, adapter: StoredModel) -> Model:
    name = combined_name(base, [adapter])
    return Model(id=name, created=int(adapter.created), owned_by="slm-edge", parent=str(base.ref))


@get("/v1/models/{model_id:path}")
async def get_model(state: State, model_id: str) -> Model:
    """One model of the store, perhaps with adapters."""
    appliance = appliance_of(state)
    selection = await appliance.pool.select(model_id.lstrip("/"), [])
    stored = await appliance.stored_model(selection.model)
    await asyncio.to_thread(refuse_adapter, stored, appliance.store)
    model = _model(stored)
    return msgspec.structs.replace(model, id=selection.name, parent=model.id) if selection.adapters else model


HANDLERS = [chat_completions, completions, list_models, get_model]
