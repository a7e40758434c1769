"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import State

from edge.errors import EdgeError, InvalidRequest
from edge.store.details import Sampling
from edge.telemetry.span import Operation, RequestRecord
from runtime import wire
from runtime.api import sse
from runtime.api.appliance import Appliance, appliance_of
from runtime.api.errors import fault_of
from runtime.api.responses import EventStream, until_disconnect
from runtime.pool import Generation, ModelHost
from runtime.request import SamplingParams

HttpRequest = Request[object, object, State]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
StopList = Annotated[list[StopString], msgspec.Meta(max_length=16)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
T = TypeVar("T")


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    """A content part. Only text is read by the models of this version."""

    text: str


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(p.text for p in self.content)
        return self.content or ""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class _Sampling(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    stop: StopString | StopList | None = None
    seed: Seed | None = None
    n: int | None = None
    user: str | None = None
    ignore_eos: bool = False
    """Go on past the model's own end, up to the token limit; for benchmarks."""
    return_token_ids: bool = False
    """Give the token ids of prompt and answer, as vLLM does."""

    def params(self, makers: Sampling) -> SamplingParams:
        """The sampling parameters: the request's, else what the model's makers advise, else OpenAI's defaults."""
        return SamplingParams(
            temperature=_first(self.temperature, makers.temperature, 1.0),
            top_k=_first(self.top_k, makers.top_k, 0),
            top_p=_first(self.top_p, makers.top_p, 1.0),
            min_p=_first(self.min_p, makers.min_p, 0.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else self.seed % (1 << 63),
            logit_bias=tuple((_token_id(k), v) for k, v in (self.logit_bias or {}).items()),
        )

    def stops(self) -> list[str]:
        """The stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(_Sampling, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None


class CompletionRequest(_Sampling, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[int]


class TokenDetails(msgspec.Struct, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str = ""
    refusal: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """A whole chat completion."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A whole text completion."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    """One model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class Models(msgspec.Struct, kw_only=True):
    """The models of the store."""

    object: str = "list"
    data: list[Model]


# A field that asks for something this version does not do, and the values with which it asks for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "grammar": (None, ""),
    "structured_outputs": (None,),
    "truncation": (None, "disabled"),
}
# Fields without effect on the answer: taken without a word.
_HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"})


def _first(asked: T | None, advised: T | None, default: T) -> T:
    return next(v for v in (asked, advised, default) if v is not None)


def _token_id(key: str) -> int:
    if not key.isdecimal() or len(key) > 9:
        raise InvalidRequest(f"logit_bias has the key {key!r}.", field="logit_bias", hint="Keys are token ids.")
    return int(key)


def parse_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """A request, and a warning for each field that was left out of account.

    Raises:
        InvalidRequest: Not JSON, a value of the wrong type or outside its range, or a field that asks for what this
            version does not do.
    """
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        parsed = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        message, _, path = str(e).partition(" - at `$")
        field = path.strip("`.") or _missing_field(message)
        where = f"'{field}': " if field else ""
        raise InvalidRequest(f"{where}{message}.", field=field) from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidRequest(f"The body is not valid JSON: {e}.", hint="Send one JSON object.") from e
    known = {f.encode_name for f in msgspec.structs.fields(kind)}  # pyright: ignore[reportArgumentType]  # kind is a Struct
    return parsed, _check_others({k: v for k, v in raw.items() if k not in known})


def _missing_field(message: str) -> str | None:
    return message.split("`")[1] if "missing required field `" in message else None


def _check_others(others: Mapping[str, msgspec.Raw]) -> list[str]:
    warnings: list[str] = []
    for name, raw in others.items():
        if name in _REFUSED:
            value: object = msgspec.json.decode(raw)
            if value not in _REFUSED[name]:
                raise InvalidRequest(
                    f"'{name}' is not supported by this version.", field=name, hint="Leave the field out."
                )
        elif name not in _HARMLESS and bytes(raw) != b"null":
            warnings.append(f"unknown field '{name[:64]}' was ignored")
    return warnings[:20]


class Call:
    """One request through the appliance: its identity, its way into the engine, and its telemetry record."""

    def __init__(
        self, appliance: Appliance, http: HttpRequest, body: _Sampling, *, operation: Operation, max_tokens: int
    ) -> None:
        if body.stream and body.return_token_ids:
            raise InvalidRequest("'return_token_ids' is not supported in streams.", field="return_token_ids")
        if body.n not in (None, 1):
            raise InvalidRequest("'n' can only be 1 in this version.", field="n", hint="Send the request n times.")
        self.appliance = appliance
        self.body = body
        self.operation: Operation = operation
        self.max_tokens = max_tokens
        self.stream = bool(body.stream)
        prefix = "chatcmpl" if operation == "chat" else "cmpl"
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = body.model
        self.fingerprint = ""
        self._trace_parent = http.headers.get("traceparent")
        self._started_ns = time.time_ns()
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._last: wire.Piece | None = None
        self._generation: Generation | None = None
        self._finished = False

    async def start(self, make: Callable[[int, SamplingParams], wire.Generate]) -> AsyncGenerator[list[wire.Piece]]:
        """Hand the request to the engine and wait until it is accepted.

        Args:
            make: The request under an id, with these sampling parameters.

        Returns:
            What each step gives, to be read to its end or closed.

        Raises:
            EdgeError: The model cannot be had, or the engine refuses the request.
        """
        try:
            host = await self.appliance.pool.ready(self.body.model)
            self._adopt(host)
            params = self.body.params(host.model.details.sampling)
            self._generation = host.submit(lambda request_id: make(request_id, params))
            steps = self._steps(self._generation)
            await anext(steps)  # the first step says that the engine accepted the request
        except BaseException as e:
            self.finish(e)
            raise
        return steps

    def _adopt(self, host: ModelHost) -> None:
        self.model = host.ref
        self.fingerprint = f"fp_{host.model.digest.hex[:12]}"

    async def _steps(self, generation: Generation) -> AsyncGenerator[list[wire.Piece]]:
        async for pieces in generation.steps():
            self._last = pieces[-1]
            if self._first_token is None and pieces[-1].num_output:
                self._first_token = time.perf_counter()
            yield pieces

    def usage(self) -> Usage:
        """Tokens so far."""
        p = self._last
        prompt, output, cached = (p.num_prompt, p.num_output, p.num_cached) if p else (0, 0, 0)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=output,
            total_tokens=prompt + output,
            prompt_tokens_details=TokenDetails(cached_tokens=cached),
        )

    def prompt_ids(self) -> list[int] | msgspec.UnsetType:
        """Token ids of the prompt, once the answer is over and if they were asked for."""
        p = self._last
        return list(p.tokens[: p.num_prompt]) if p and p.tokens is not None else msgspec.UNSET

    def answer_ids(self) -> list[int] | msgspec.UnsetType:
        """Token ids of the answer, likewise."""
        p = self._last
        return list(p.tokens[p.num_prompt :]) if p and p.tokens is not None else msgspec.UNSET

    def finish(self, error: BaseException | None) -> None:
        """End the request in the engine if it is still there, and record it. Only the first call does anything."""
        if self._finished:
            return
        self._finished = True
        if self._generation is not None:
            self._generation.cancel()
        p = self._last
        ended = time.perf_counter()
        self.appliance.record(
            RequestRecord(
                operation=self.operation,
                request_model=self.body.model,
                response_model=self.model,
                started_unix_ns=self._started_ns,
                duration_s=ended - self._started,
                queue_s=p.queue_s if p else 0.0,
                prefill_s=p.prefill_s if p else 0.0,
                ttft_s=self._first_token - self._started if self._first_token else None,
                input_tokens=p.num_prompt if p else 0,
                output_tokens=p.num_output if p else 0,
                cached_tokens=p.num_cached if p else 0,
                finish_reasons=(p.finish_reason,) if p and p.finish_reason else (),
                response_id=self.id,
                stream=self.stream,
                error_type=_error_type(error, finished=bool(p and p.finish_reason)),
                temperature=self.body.temperature,
                top_p=self.body.top_p,
                max_tokens=self.max_tokens or None,
                seed=self.body.seed,
                trace_parent=self._trace_parent,
            )
        )


def _error_type(error: BaseException | None, *, finished: bool) -> str | None:
    if isinstance(error, EdgeError):
        return error.code
    if error is not None:
        return "cancelled" if not isinstance(error, Exception) or isinstance(error, GeneratorExit) else "internal_error"
    return None if finished else "cancelled"


async def _collect(call: Call, steps: AsyncGenerator[list[wire.Piece]]) -> tuple[str, str]:
    """The whole answer and why it ended."""
    texts: list[str] = []
    reason = "stop"
    async for pieces in steps:
        texts += [p.text for p in pieces]
        reason = pieces[-1].finish_reason or reason
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
    return EventStream(sse.with_pings(events), on_close=lambda: call.finish(None), headers=warning_headers(warnings))


def warning_headers(warnings: list[str]) -> dict[str, str]:
    """The header that lists what was left out of account."""
    text = "; ".join(warnings).encode("ascii", "replace").decode("ascii")
    return {"x-edge-warnings": "".join(c if c.isprintable() else "?" for c in text)} if warnings else {}


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: HttpRequest, state: State) -> Response[ChatCompletion] | EventStream:
    """Answer a conversation."""
    body, warnings = parse_body(await request.body(), ChatRequest)
    max_tokens = body.max_completion_tokens or body.max_tokens or 0
    call = Call(appliance_of(state), request, body, operation="chat", max_tokens=max_tokens)
    messages = [_wire_message(m) for m in body.messages]
    steps = await call.start(
        lambda i, params: wire.Generate(
            i, messages, None, params, max_tokens, body.stops(), body.ignore_eos, body.return_token_ids
        )
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
        lambda i, params: wire.Generate(
            i, None, body.prompt, params, max_tokens, body.stops(), body.ignore_eos, body.return_token_ids
        )
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
    """The models of the store. Listing loads nothing."""
    models = await appliance_of(state).stored_models()
    return Models(data=[Model(id=str(m.ref), created=int(m.created), owned_by="slm-edge") for m in models])


@get("/v1/models/{model_id:path}")
async def get_model(state: State, model_id: str) -> Model:
    """One model of the store."""
    model = await appliance_of(state).stored_model(model_id.lstrip("/"))
    return Model(id=str(model.ref), created=int(model.created), owned_by="slm-edge")


HANDLERS = [chat_completions, completions, list_models, get_model]
