"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from litestar import Response, get, post
from litestar.datastructures import State

from edge.access.keys import Limits
from edge.errors import EdgeError
from edge.store.models import StoredModel
from edge.telemetry.span import Operation
from runtime import wire
from runtime.api import sse
from runtime.api.access import needs
from runtime.api.appliance import Appliance, appliance_of
from runtime.api.call import Call, HttpRequest, Steps, merged, start_all, usage_of
from runtime.api.describe import EVENTS, exchanges
from runtime.api.errors import fault_of
from runtime.api.guard import caller_of
from runtime.api.images import Conversation, conversation_of
from runtime.api.logprobs import chat_logprobs
from runtime.api.ollama_facts import capabilities
from runtime.api.openai_schema import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Model,
    Models,
    SamplingFields,
    ToolFields,
)
from runtime.api.parsing import check_items, parse_body
from runtime.api.responses import EventStream, until_disconnect
from runtime.api.tools import CallCollector, CalledFunction, Promise, ToolCallField, unused_options
from runtime.request import Echo, SamplingParams, TokenLogprob
from runtime.selection import combined_name, refuse_adapter

NO_TOOLS = ToolFields()
Started = tuple[list[Call], list[Steps]]
"""The answers that were begun, and what each step gives them."""


@dataclass(slots=True)
class Answer:
    """One whole answer."""

    texts: list[str] = field(default_factory=list[str])
    reason: str = "stop"
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    reasoning: str = ""
    collector: CallCollector = field(default_factory=CallCollector)
    echo: Echo | None = None
    """The prompt, for who asked for it."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def calls(self) -> list[wire.ToolCall]:
        """The tools that it calls."""
        return self.collector.calls

    @property
    def echoed_text(self) -> str:
        """The prompt, if it was asked for, and the answer."""
        return (self.echo.text if self.echo else "") + self.text

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, where they are known."""
        return sum(t.logprob for t in self.logprobs) / max(1, len(self.logprobs))


async def _collect(streams: Sequence[Steps]) -> list[Answer]:
    answers = [Answer() for _ in streams]
    async for index, pieces in merged(streams):
        answer = answers[index]
        for p in pieces:
            answer.texts.append(p.text)
            answer.reasoning += p.reasoning
            answer.collector.push(p.calls)
            answer.logprobs += p.logprobs or ()
            answer.echo = answer.echo or p.echo
            answer.reason = p.finish_reason or answer.reason
    return answers


async def whole_answers(http: HttpRequest, calls: Sequence[Call], streams: Sequence[Steps]) -> list[Answer]:
    """The whole answers, in order."""
    error: BaseException | None = None
    try:
        return await until_disconnect(http.receive, _collect(streams))
    except BaseException as e:
        error = e
        raise
    finally:
        _finish(calls, error)


def _finish(calls: Sequence[Call], error: BaseException | None) -> None:
    for call in calls:
        call.finish(error)


@dataclass(frozen=True, slots=True)
class Event:
    """What one event of a stream tells of one answer: the prompt, what was added, or why the answer ended."""

    index: int
    text: str = ""
    logprobs: Sequence[TokenLogprob] | None = None
    reason: str | None = None
    reasoning: str = ""
    calls: Sequence[wire.CallDelta] = ()
    echo: Echo | None = None


Choice = Callable[[Event], bytes]
"""The JSON of an event's choice."""


async def _events(
    calls: Sequence[Call], streams: Sequence[Steps], *, head: bytes, format_event: Choice, tail: Callable[[], bytes]
) -> AsyncGenerator[bytes]:
    """The stream of the answers. What goes wrong after the first byte is an event, since the status is spent."""
    error: BaseException | None = None
    num_open = len(streams)
    try:
        if head:
            yield head
        async for index, pieces in merged(streams):
            if not pieces:
                yield sse.PING
                continue
            out = b"".join(_piece_events(index, p, format_event) for p in pieces)
            if pieces[-1].finish_reason:
                num_open -= 1
                out += b"" if num_open else tail() + sse.DONE
            if out:
                yield out
    except EdgeError as e:
        error = e
        yield sse.data(msgspec.json.encode(fault_of(e).openai()))
    except BaseException as e:
        error = e
        raise
    finally:
        _finish(calls, error)


def _piece_events(index: int, p: wire.Piece, format_event: Choice) -> bytes:
    out = sse.data(format_event(Event(index, echo=p.echo))) if p.echo else b""
    added = Event(index, p.text, p.logprobs, None, p.reasoning, p.calls)
    out += sse.data(format_event(added)) if p.text or p.logprobs or p.reasoning or p.calls else b""
    return out + sse.data(format_event(Event(index, reason=p.finish_reason))) if p.finish_reason else out


def _chat_choice(event: Event) -> bytes:
    if event.reason is not None:
        return b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s"}' % (event.index, event.reason.encode())
    logprobs = b"null" if event.logprobs is None else msgspec.json.encode(chat_logprobs(event.logprobs))
    parts = (event.index, msgspec.json.encode(_delta(event)), logprobs)
    return b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null}' % parts


def _delta(event: Event) -> dict[str, object]:
    """What was added to a message."""
    delta: dict[str, object] = {"content": event.text} if event.text or not (event.reasoning or event.calls) else {}
    if event.reasoning:
        delta["reasoning_content"] = event.reasoning
    if event.calls:
        delta["tool_calls"] = [_call_delta(call) for call in event.calls]
    return delta


def _call_delta(call: wire.CallDelta) -> dict[str, object]:
    """The beginning of a call, or more of its arguments."""
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def stream_answers(
    calls: Sequence[Call], streams: Sequence[Steps], warnings: list[str], *, kind: str, choice: Choice,
    first_choice: bytes = b"",
) -> EventStream:  # fmt: skip
    """The answers as events; `first_choice`, with a place for the index, begins each of them."""
    call = calls[0]
    same = {
        "id": call.id,
        "object": kind,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": call.fingerprint,
    }
    start = msgspec.json.encode(same)[:-1] + b',"choices":['  # encoded once: all that stays the same
    wants_usage = call.body.stream_options is not None and call.body.stream_options.include_usage

    def tail() -> bytes:
        """OpenAI's last chunk: no choices, and the usage; only for who asked."""
        return sse.data(start + b'],"usage":' + msgspec.json.encode(usage_of(calls)) + b"}") if wants_usage else b""

    def format_event(event: Event) -> bytes:
        return start + choice(event) + b"]}"

    firsts = [sse.data(start + first_choice % c.index + b"]}") for c in calls] if first_choice else []
    events = _events(calls, streams, head=b"".join(firsts), format_event=format_event, tail=tail)
    return EventStream(events, on_close=lambda: _finish(calls, None), headers=warning_headers(warnings))


def calls_for(
    state: State, http: HttpRequest, body: SamplingFields, operation: Operation, max_tokens: int, *,
    first_image: str = "", tools: Sequence[wire.Tool] = (), num_prompts: int = 1,
) -> list[Call]:  # fmt: skip
    """One for each of the answers that are asked for: those to the first prompt, those to the next."""
    body.check()
    appliance, structure = appliance_of(state), body.structure()
    promise = Promise(structure, {t.name: t.parameters for t in tools}) if structure is not None or tools else None
    return [
        Call(
            appliance,
            http,
            body,
            operation=operation,
            max_tokens=max_tokens,
            prompt_number=prompt,
            draw=draw,
            promise=promise,
            first_image=first_image,
        )
        for prompt in range(num_prompts)
        for draw in range(body.num_draws)
    ]


def asked(
    calls: list[Call],
    body: SamplingFields,
    max_tokens: int,
    *,
    conversation: Conversation | None = None,
    prompt: str | list[int] | None = None,
    tools: ToolFields = NO_TOOLS,
) -> Callable[[int, SamplingParams], wire.Generate]:
    """What the engine is asked, but for the id and the sampling of each answer."""
    return lambda i, params: wire.Generate(
        i,
        conversation.messages if conversation else None,
        prompt,
        params,
        max_tokens,
        body.stops(),
        body.ignore_eos,
        body.return_token_ids,
        cache_key=body.prompt_cache_key or "",
        constraint=calls[0].constraint,
        tenant=calls[0].caller.id,
        priority=max(body.priority or 0, calls[0].caller.limits.priority),
        images=tuple(conversation.images) if conversation else (),
        cuts_max_tokens=body.cuts_max_tokens,
        is_raw=body.is_raw,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tools=tools.parallel,
        template_options=tools.template_options,
        truncates=body.truncation == "auto",
    )


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """The header that lists what was left out of account."""
    text = "; ".join(warnings).encode("ascii", "replace").decode("ascii")
    return {"x-edge-warnings": "".join(c if c.isprintable() else "?" for c in text)} if warnings else {}


def template_warnings(body: ChatRequest, call: Call) -> list[str]:
    """Variables that the model's chat template does not look for."""
    ready = call.host.ready if call.host is not None else None
    return unused_options(body.chat_template_kwargs, body.reasoning_effort, ready)


def _message(answer: Answer) -> AssistantMessage:
    calls = [ToolCallField(id=c.id, function=CalledFunction(name=c.name, arguments=c.arguments)) for c in answer.calls]
    return AssistantMessage(
        content=answer.text or None if calls else answer.text,
        reasoning_content=answer.reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


MESSAGE_FIELDS = frozenset(f.encode_name for f in msgspec.structs.fields(ChatMessage))


async def start_chat(http: HttpRequest, state: State, body: ChatRequest) -> Started:
    """Begin to answer a conversation."""
    max_tokens = body.max_completion_tokens or body.max_tokens or 0
    conversation, asks = conversation_of(body.messages), body.asks()
    calls = calls_for(
        state, http, body, "chat", max_tokens, first_image=conversation.first_image, tools=asks.tools
    )  # fmt: skip
    make = asked(calls, body, max_tokens, conversation=conversation, tools=asks)
    return calls, await start_all(calls, http.receive, make)


async def start_render(http: HttpRequest, state: State, body: ChatRequest, *, as_text: bool) -> Started:
    """Begin to make the prompt of a conversation, which is not answered; see :class:`runtime.wire.Render`."""
    body.check()
    structure, conversation, asks = body.structure(), conversation_of(body.messages), body.asks()
    constraint, first_image = structure.constraint if structure is not None else None, conversation.first_image
    calls = [Call(appliance_of(state), http, body, operation="count", max_tokens=0, first_image=first_image)]
    make = asked(calls, body, 0, conversation=conversation, tools=asks)

    def rendering(number: int, params: SamplingParams) -> wire.Render:
        return wire.Render(number, msgspec.structs.replace(make(0, params), constraint=constraint), as_text)

    return calls, await start_all(calls, http.receive, rendering)


@post("/v1/chat/completions", opt=needs("chat") | exchanges(ChatRequest, streams=EVENTS), status_code=200)
async def chat_completions(request: HttpRequest, state: State) -> Response[ChatCompletion] | EventStream:
    """Answer a conversation."""
    content = await request.body()
    body, warnings = parse_body(content, ChatRequest)
    check_items(content, "messages", MESSAGE_FIELDS, frozenset({"function_call"}))
    calls, streams = await start_chat(request, state, body)
    warnings += template_warnings(body, calls[0])
    if body.stream:
        role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        kind = "chat.completion.chunk"
        return stream_answers(calls, streams, warnings, kind=kind, choice=_chat_choice, first_choice=role)
    answers = await whole_answers(request, calls, streams)
    call = calls[0]
    completion = ChatCompletion(
        id=call.id,
        created=call.created,
        model=call.model,
        system_fingerprint=call.fingerprint,
        choices=[
            ChatChoice(
                index=c.index,
                message=_message(a),
                logprobs=chat_logprobs(a.logprobs) if body.logprobs else None,
                finish_reason=a.reason,
                token_ids=c.answer_ids(),
            )
            for c, a in zip(calls, answers, strict=True)
        ],
        usage=usage_of(calls),
        prompt_token_ids=call.prompt_ids(),
        warnings=warnings or msgspec.UNSET,
    )
    return Response(completion, headers=warning_headers(warnings))


@get("/v1/models", opt=needs("key"))
async def list_models(request: HttpRequest, state: State) -> Models:
    """The models of the store that the key may use, also with each adapter that fits, and the slots. Listing loads
    nothing."""
    appliance, limits = appliance_of(state), caller_of(request.scope).limits
    stored = [m for m in await appliance.stored_models() if limits.may_use(str(m.ref))]
    pairs = await appliance.pool.combinations(stored)
    models = await asyncio.to_thread(lambda: [_model(m) for m in stored if not m.is_adapter])
    models += await asyncio.to_thread(lambda: [_adapted(base, adapter) for base, adapter in pairs])
    models += await _slots(appliance, limits)
    return Models(data=models, first_id=models[0].id if models else None, last_id=models[-1].id if models else None)


async def _slots(appliance: Appliance, limits: Limits) -> list[Model]:
    """The slots, as models whose parent is the version that serves there."""
    found: list[Model] = []
    for name, serving in sorted(appliance.pool.slots.items()):
        with contextlib.suppress(EdgeError):  # a version whose bytes are gone or damaged is no model
            if limits.may_use(name) or limits.may_use(serving.name):
                stored = (await appliance.pool.host(name)).model
                found.append(_in_slot(name, await asyncio.to_thread(_model, stored)))
    return found


def _in_slot(name: str, model: Model) -> Model:
    return msgspec.structs.replace(model, id=name, parent=model.id)


def _model(stored: StoredModel) -> Model:
    return Model(
        id=str(stored.ref), created=int(stored.created), owned_by="slm-edge", capabilities=capabilities(stored)
    )


def _adapted(base: StoredModel, adapter: StoredModel) -> Model:
    name = combined_name(base, [adapter])
    model = _model(base)
    return msgspec.structs.replace(model, id=name, created=int(adapter.created), parent=model.id)


@get("/v1/models/{model_id:path}", opt=needs("key"))
async def get_model(request: HttpRequest, state: State, model_id: str) -> Model:
    """One model of the store, perhaps with adapters."""
    appliance, name = appliance_of(state), model_id.lstrip("/")
    await appliance.check_allowed(caller_of(request.scope).limits, name)
    selection = await appliance.pool.select(name, [])
    stored = await appliance.stored_model(selection.model)
    await asyncio.to_thread(refuse_adapter, stored, appliance.store)
    model = await asyncio.to_thread(_model, stored)
    if name in appliance.pool.slots:
        return _in_slot(name, model)
    return msgspec.structs.replace(model, id=selection.name, parent=model.id) if selection.adapters else model


HANDLERS = [chat_completions, list_models, get_model]
