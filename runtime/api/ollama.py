"""Ollama's endpoints that ask models: the same calls as OpenAI's, in other words."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from litestar import Response, post
from litestar.datastructures import State

from edge.errors import EdgeError, InvalidRequest
from edge.telemetry.span import Operation
from runtime import wire
from runtime.api.access import needs
from runtime.api.admin import act
from runtime.api.appliance import appliance_of
from runtime.api.call import Call, HttpRequest, Steps
from runtime.api.completions import start_completion
from runtime.api.describe import exchanges
from runtime.api.embeddings import EmbeddingRequest, read_texts, written
from runtime.api.errors import fault_of
from runtime.api.guard import caller_of
from runtime.api.logprobs import chat_logprobs
from runtime.api.ollama_schema import (
    AnswerFields,
    Embeddings,
    KeepAlive,
    Line,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OneEmbedding,
    Options,
    Said,
    SaidCall,
    SaidFunction,
    Timed,
    kept_s,
    nanoseconds,
    now,
    ollama_name,
    option_warnings,
)
from runtime.api.openai import Answer, start_chat, warning_headers, whole_answers
from runtime.api.parsing import check_items, parse_body, passed_over
from runtime.api.responses import EventStream, until_disconnect
from runtime.api.tools import CallCollector, unused_options
from runtime.host import ModelHost
from runtime.request import TokenLogprob

NDJSON = "application/x-ndjson"
"""One JSON object a line."""


@dataclass(slots=True)
class _Asked:
    """One request for an answer, and how that is written."""

    http: HttpRequest
    body: AnswerFields
    warnings: list[str]
    started: float
    is_chat: bool

    def line(
        self, text: str, logprobs: Sequence[TokenLogprob] | None = None, *, done: str = "", thinking: str = "",
        calls: Sequence[wire.ToolCall] = (),
    ) -> Line:  # fmt: skip
        """The answer or a part of it; its end where `done` says why."""
        thought = thinking or msgspec.UNSET
        said = Said(content=text, thinking=thought, tool_calls=_said_calls(calls) or msgspec.UNSET)
        return Line(
            model=self.body.model,
            created_at=now(),
            message=said if self.is_chat else msgspec.UNSET,
            response=msgspec.UNSET if self.is_chat else text,
            thinking=msgspec.UNSET if self.is_chat else thought,
            logprobs=chat_logprobs(logprobs).content if logprobs else msgspec.UNSET,
            done=bool(done),
            done_reason="stop" if done == "tool_calls" else done,
        )

    def last(self, call: Call, answer: Answer) -> Line:
        """The end of the answer, with what it took."""
        line = self.line(
            answer.text, answer.logprobs, done=answer.reason, thinking=answer.reasoning, calls=answer.calls
        )  # fmt: skip
        _fill(line, call, self.started)
        line.warnings = self.warnings + _dropped(call)
        return line


def _said_calls(calls: Sequence[wire.ToolCall]) -> list[SaidCall]:
    """Calls with their arguments as objects. One that the token limit cut is no call."""
    whole = [c for c in calls if _is_object(c.arguments)]
    return [
        SaidCall(id=c.id, function=SaidFunction(name=c.name, arguments=msgspec.Raw(c.arguments.encode())))
        for c in whole
    ]


def _is_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return False
    return True


def _fill(line: Timed, call: Call, started: float) -> None:
    line.total_duration = nanoseconds(time.perf_counter() - started)
    line.load_duration = nanoseconds(call.load_s)
    if (p := call.last) is not None:
        line.prompt_eval_count, line.eval_count = p.num_prompt, p.num_output
        line.prompt_eval_duration = nanoseconds(p.prefill_s)
        line.eval_duration = nanoseconds(p.total_s - p.queue_s - p.prefill_s)


def _dropped(call: Call) -> list[str]:
    number = call.last.num_dropped if call.last else 0
    return [f"truncate left out {number} tokens of the prompt"] if number else []


@post("/api/chat", opt=needs("chat") | exchanges(OllamaChatRequest, streams=NDJSON), status_code=200)
async def chat(request: HttpRequest, state: State) -> Response[Line] | EventStream:
    """Answer a conversation."""
    started, content = time.perf_counter(), await request.body()
    body, warnings = parse_body(content, OllamaChatRequest)
    if body.messages:
        check_items(content, "messages", _MESSAGE_FIELDS, frozenset[str]())
    asked = _checked(request, body, warnings + option_warnings(content), started, is_chat=True)
    if not body.messages:
        return await _load(asked)
    return await _answer(asked, *await start_chat(request, state, body.answer()))


@post("/api/generate", opt=needs("chat") | exchanges(OllamaGenerateRequest, streams=NDJSON), status_code=200)
async def generate(request: HttpRequest, state: State) -> Response[Line] | EventStream:
    """Answer a prompt, or with `raw` or `suffix` continue it."""
    started, content = time.perf_counter(), await request.body()
    body, warnings = parse_body(content, OllamaGenerateRequest)
    asked = _checked(request, body, warnings + option_warnings(content), started, is_chat=False)
    if not (body.prompt or body.images or body.suffix):
        return await _load(asked)
    if body.is_continued:
        text = body.completion()
        return await _answer(asked, *await start_completion(request, state, text, max_tokens=text.max_tokens or 0))
    return await _answer(asked, *await start_chat(request, state, body.answer()))


_MESSAGE_FIELDS = frozenset(f.encode_name for f in msgspec.structs.fields(OllamaMessage))


def _checked(http: HttpRequest, body: AnswerFields, warnings: list[str], started: float, *, is_chat: bool) -> _Asked:
    body.check()
    warnings += body.warnings() + _keep_warnings(http, body.keep_alive)
    return _Asked(http, body, warnings, started, is_chat)


async def _load(asked: _Asked) -> Response[Line]:
    """Load the model, or unload it as soon as nobody uses it."""
    body = asked.body
    name, keep_s = ollama_name(body.model), kept_s(body.keep_alive)
    if keep_s == 0:
        await _unload(asked.http, name)
        return Response(asked.line("", done="unload"), headers=warning_headers(asked.warnings))
    _keep(asked.http, await _loaded(asked.http, name, "chat"), body.keep_alive)
    line = asked.line("", done="load")
    line.total_duration = line.load_duration = nanoseconds(time.perf_counter() - asked.started)
    line.warnings = asked.warnings
    return Response(line, headers=warning_headers(asked.warnings))


async def _loaded(http: HttpRequest, name: str, operation: Operation) -> ModelHost:
    """The host of a model, which is loaded for it."""
    appliance, limits = appliance_of(http.app.state), caller_of(http.scope).limits
    await appliance.check_allowed(limits, name)
    ref = (await appliance.pool.select(name, ())).model
    await appliance.check_purpose(ref, operation, limits)
    return await until_disconnect(http.receive, appliance.pool.ready(ref))


async def _unload(http: HttpRequest, name: str) -> None:
    appliance = appliance_of(http.app.state)
    caller_of(http.scope).check("operate")
    async with act(http, "model.unload", name, on=name):
        host = await appliance.pool.host((await appliance.pool.select(name, ())).model)
        if host.is_idle:
            await host.unload()
        elif host.state in ("ready", "loading"):
            host.keep_alive_s = 0


def _keep(http: HttpRequest, host: ModelHost | None, keep_alive: KeepAlive) -> None:
    """Keep a model loaded as long as the request says for which it was; where it says nothing, as before."""
    seconds = kept_s(keep_alive)
    if host is not None and seconds is not None and _may_keep(http):
        host.keep_alive_s = seconds
        appliance_of(http.app.state).tidy()


def _may_keep(http: HttpRequest) -> bool:
    """What is loaded concerns all who share the device."""
    return caller_of(http.scope).limits.may("operate")


def _keep_warnings(http: HttpRequest, keep_alive: KeepAlive) -> list[str]:
    """Also looks whether it can be read, while there is a status to say so."""
    if kept_s(keep_alive) is None or _may_keep(http):
        return []
    return [passed_over("keep_alive", "keep_alive has no effect: that takes a key of scope 'operate'")]


async def _answer(asked: _Asked, calls: list[Call], streams: list[Steps]) -> Response[Line] | EventStream:
    (call,) = calls
    try:
        asked.warnings += await _warnings_of(asked.body, call.host)
    except BaseException as e:
        call.finish(e)
        raise
    headers = warning_headers(asked.warnings)

    def end() -> None:
        call.finish(None)
        _keep(asked.http, call.host, asked.body.keep_alive)

    if asked.body.is_streamed:
        return EventStream(_lines(asked, call, streams[0]), on_close=end, headers=headers, media_type=NDJSON)
    try:
        (answer,) = await whole_answers(asked.http, calls, streams)
    finally:
        end()
    line = asked.last(call, answer)
    return Response(line, headers=headers)


async def _warnings_of(body: AnswerFields, host: ModelHost | None) -> list[str]:
    """What this model leaves out of account.

    Raises:
        InvalidRequest: It is to think, and cannot.
    """
    if host is None or host.ready is None:
        return []
    warnings: list[str] = []
    wanted, there = (body.options or Options()).num_ctx or 0, host.ready.context_tokens
    if wanted > there:
        text = f"options.num_ctx is {wanted}, and this model's context has {there} tokens"
        warnings.append(passed_over("options.num_ctx", text))
    if body.think and not host.ready.thinks:
        hint = "Leave 'think' out."
        raise InvalidRequest(f"'{body.model[:200]}' does not support thinking.", field="think", hint=hint)
    if body.think is not None and host.ready.thinks and unused_options({}, body.effort(), host.ready):
        warnings.append(passed_over("think", "think has no effect: this model decides by itself"))
    return warnings


async def _lines(asked: _Asked, call: Call, steps: Steps) -> AsyncGenerator[bytes]:
    """The answer line by line. What goes wrong after the first byte is a line, since the status is spent."""
    error: BaseException | None = None
    calls = WholeCalls()
    try:
        async with aclosing(steps):
            async for pieces in steps:
                if out := b"".join(map(ndjson, _lines_of(asked, call, pieces, calls))):
                    yield out
    except EdgeError as e:
        error = e
        yield ndjson(fault_of(e).ollama())
    except BaseException as e:
        error = e
        raise
    finally:
        call.finish(error)


class WholeCalls:
    """Calls that are told as soon as they are whole."""

    def __init__(self) -> None:
        self._collector = CallCollector()
        self._num_told = 0

    def push(self, piece: wire.Piece) -> list[wire.ToolCall]:
        """What a step made whole: a call is, when another begins or the answer ends."""
        self._collector.push(piece.calls)
        calls = self._collector.calls
        told, self._num_told = self._num_told, len(calls) if piece.finish_reason else max(0, len(calls) - 1)
        return calls[told : self._num_told]


def _lines_of(asked: _Asked, call: Call, pieces: list[wire.Piece], calls: WholeCalls) -> list[Line]:
    """What a step gave. Where nothing came for long, an empty one: proxies and clients cut silent connections."""
    lines = list[Line]()
    for p in pieces:
        whole = calls.push(p)
        if p.text or p.logprobs or p.reasoning or whole:
            lines.append(asked.line(p.text, p.logprobs, thinking=p.reasoning, calls=whole))
    if not pieces:
        lines.append(asked.line(""))
    elif (reason := pieces[-1].finish_reason) is not None:
        lines.append(asked.last(call, Answer(reason=reason)))
    return lines


def ndjson(line: msgspec.Struct) -> bytes:
    """One line of a stream."""
    return msgspec.json.encode(line) + b"\n"


# ---------------------------------------------------------------- vectors


_TEXT_OPTIONS = frozenset({"num_ctx"})


@post("/api/embed", opt=needs("embed") | exchanges(OllamaEmbedRequest), status_code=200)
async def embed(request: HttpRequest, state: State) -> Response[Embeddings]:
    """Make a vector of each text."""
    started, content = time.perf_counter(), await request.body()
    body, warnings = parse_body(content, OllamaEmbedRequest)
    warnings += option_warnings(content, known=_TEXT_OPTIONS)
    truncate = body.truncate is not False
    line = Embeddings(model=body.model, embeddings=[], warnings=warnings)
    texts = body.texts()
    await _vectors(request, body, texts, line, started, dimensions=body.dimensions or 0, truncate=truncate)
    return Response(line, headers=warning_headers(line.warnings))


@post("/api/embeddings", opt=needs("embed") | exchanges(OllamaEmbeddingsRequest), status_code=200)
async def embeddings(request: HttpRequest, state: State) -> Response[OneEmbedding]:
    """Make a vector of one text, the older way."""
    started, content = time.perf_counter(), await request.body()
    body, warnings = parse_body(content, OllamaEmbeddingsRequest)
    warnings += option_warnings(content, known=_TEXT_OPTIONS)
    line = Embeddings(model=body.model, embeddings=[], warnings=warnings)
    await _vectors(request, body, [body.prompt] if body.prompt else [], line, started)
    found = line.embeddings[0] if line.embeddings else msgspec.Raw(b"[]")
    return Response(OneEmbedding(embedding=found), headers=warning_headers(line.warnings))


async def _vectors(
    http: HttpRequest, body: OllamaEmbedRequest | OllamaEmbeddingsRequest, texts: list[str], into: Embeddings,
    started: float, *, dimensions: int = 0, truncate: bool = True,
) -> None:  # fmt: skip
    """Fill in the vectors and what they took. Without a text the model is loaded, and nothing else."""
    into.warnings = [*into.warnings, *_keep_warnings(http, body.keep_alive)]
    name = ollama_name(body.model)
    if not texts:
        _keep(http, await _loaded(http, name, "embeddings"), body.keep_alive)
        return
    asked = EmbeddingRequest(model=name, input=[*texts], truncate=truncate)
    message = wire.Embed(0, asked.texts(), None, dimensions, asked.max_tokens, asked.cuts)
    call, rows, _ = await read_texts(http, http.app.state, asked, message)
    _keep(http, call.host, body.keep_alive)
    into.embeddings = [item.embedding for item in await written(rows, as_text=False)]
    _fill(into, call, started)
    into.eval_count = into.eval_duration = msgspec.UNSET


HANDLERS = [chat, generate, embed, embeddings]
