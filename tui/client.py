"""The appliance's API as typed calls. The only HTTP of the terminal; the command line uses it too.

Importing this module imports no textual. Every reply is decoded into a struct of `runtime.api.schema` and bounded in
size; every failure is an `EdgeError`.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NoReturn, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from typing_extensions import override

from edge.errors import (
    BackendError,
    ConfigError,
    EdgeError,
    Forbidden,
    GatewayUnavailable,
    InvalidReference,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    ServerStopping,
    ServerUnavailable,
    SourceUnavailable,
    StoreError,
    Unauthorized,
    UnsupportedFormat,
)
from edge.kinds import Role
from runtime.api.batches.schema import Batch, BatchList, FileObject
from runtime.api.schema import (
    DeviceStatus,
    Explanation,
    Job,
    JobList,
    KeyInfo,
    KeyList,
    LogLines,
    ModelInfo,
    ModelList,
    NewKey,
    OutboxStatus,
    PinnedPrefix,
    PinnedPrefixList,
    Problem,
    Setting,
    SettingList,
    SlotInfo,
    SlotList,
)

from .sse import Event, EventParser, InvalidReply

T = TypeVar("T")
Method = Literal["GET", "POST", "DELETE"]
Body = Mapping[str, object] | None

MAX_REPLY_BYTES = 8 << 20
MAX_ERROR_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 3.0
REPLY_TIMEOUT_S = 15.0
UPLOAD_TIMEOUT_S = 60.0
"""In which nothing of a file moves; and for the disk at its end."""
LOAD_TIMEOUT_S = 600.0
"""A load answers when the model is ready: a large file on a slow card takes minutes."""
TOKEN_TIMEOUT_S = 600.0
"""Between two tokens; the first waits for the queue and the whole prompt."""
SILENCE_TIMEOUT_S = 10.0
"""A status comes each second; a stream that is silent for this long is dead."""

# Errors that need no fact but their message. The others come as ApplianceError, with their code.
_PLAIN_ERRORS: dict[str, type[EdgeError]] = {
    kind.code: kind
    for kind in (
        BackendError, ConfigError, Forbidden, GatewayUnavailable, InvalidReference, ServerStopping, ServerUnavailable,
        SourceUnavailable, StoreError, UnsupportedFormat,
    )
}  # fmt: skip


class ApplianceError(EdgeError):
    """The appliance refused or failed.

    Attributes:
        remote_code: The code of the error at its origin (``does_not_fit``, ``worker_died``, …).
        status: The HTTP status, or 0 when the error came inside a stream.
    """

    code = "appliance_error"

    def __init__(self, message: str, *, hint: str | None = None, remote_code: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.remote_code = remote_code
        self.status = status


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class ChatParams:
    """How to sample; None leaves the choice to the appliance."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class PromptTokens(msgspec.Struct):
    """What part of the prompt was not computed again."""

    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """What an answer cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokens | None = None


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """One step of an answer: some text, or why it ended, or its cost."""

    content: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None


class _OpenAIErrorBody(msgspec.Struct):
    message: str
    code: str | int | None = None
    param: str | None = None
    hint: str | None = None


class _OpenAIError(msgspec.Struct):
    error: _OpenAIErrorBody


class _Name(msgspec.Struct):
    id: str


class _Names(msgspec.Struct):
    data: list[_Name]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: Usage | None = None
    error: _OpenAIErrorBody | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """Where the appliance answers: its socket while that exists, else its URL. Each request looks again."""

    url: str
    socket: Path | None = None
    socket_only: bool = field(default=False, kw_only=True)

    def uses_socket(self) -> bool:
        """Whether a request made now goes over the Unix socket."""
        return self.socket is not None and (self.socket_only or self.socket.exists())

    @override
    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.uses_socket() else self.url


class _AddressTransport(httpx.AsyncBaseTransport):
    """Sends each request over the socket or over TCP, as the address is at that moment."""

    def __init__(self, address: Address, ca_file: Path | None) -> None:
        self._address = address
        self._tcp = httpx.AsyncHTTPTransport(verify=_trusting(ca_file) if ca_file else True)
        self._unix = httpx.AsyncHTTPTransport(uds=str(address.socket)) if address.socket else self._tcp

    @override
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport = self._unix if self._address.uses_socket() else self._tcp
        return await transport.handle_async_request(request)

    @override
    async def aclose(self) -> None:
        await self._tcp.aclose()
        await self._unix.aclose()


class RuntimeClient:
    """Typed calls to one appliance. Used by one event loop; `close` or ``async with`` ends its connections.

    Args:
        address: Where it answers. A wrong URL is a `ConfigError`.
        transport: Takes the place of the network, for tests.
        key: The API key to present.
        ca_file: Certificates (PEM) to believe instead of the usual ones. A file that cannot be read is a `ConfigError`.
        read_only: Refuse, with `InvalidRequest` and before anything is sent, whatever is not a question.

    Every call raises `ServerUnavailable` when nobody answers, `InvalidReply` when the answer is not the API's, and the
    appliance's own error otherwise (`ModelNotFound`, `QueueFull`, `InvalidRequest`, …, else `ApplianceError`).
    """

    def __init__(
        self, address: Address, *, transport: httpx.AsyncBaseTransport | None = None, key: str | None = None,
        ca_file: Path | None = None, read_only: bool = False,
    ) -> None:  # fmt: skip
        self.address = address
        self._read_only = read_only
        # Without the environment: a proxy for the world must not see requests to this device.
        self._http = httpx.AsyncClient(
            base_url=_parse_url(address.url), transport=transport or _AddressTransport(address, ca_file),
            headers={"authorization": f"Bearer {key}"} if key else None, trust_env=False,
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop every connection. A second call does nothing."""
        await self._http.aclose()

    async def status(self) -> DeviceStatus:
        """How the device is now."""
        return await self._call("GET", "/edge/v1/status", DeviceStatus)

    async def models(self) -> list[ModelInfo]:
        """The models of the store."""
        return (await self._call("GET", "/edge/v1/models", ModelList)).models

    async def names(self) -> list[str]:
        """The models that may be asked, without their adapters; any key may know these."""
        found = await self._call("GET", "/v1/models", _Names)
        return [model.id for model in found.data if "+" not in model.id]

    async def load(self, ref: str) -> ModelInfo:
        """Load a model; returns when it is ready."""
        return await self._call("POST", "/edge/v1/models/load", ModelInfo, {"model": ref}, LOAD_TIMEOUT_S)

    async def unload(self, ref: str) -> ModelInfo:
        """Unload a model; its requests end first."""
        return await self._call("POST", "/edge/v1/models/unload", ModelInfo, {"model": ref}, LOAD_TIMEOUT_S)

    async def delete(self, ref: str) -> None:
        """Remove a model from the store."""
        await self._reply("DELETE", f"/edge/v1/models/{quote(ref, safe=':/@')}")

    async def pin(self, ref: str) -> ModelInfo:
        """Keep a model in memory once it is loaded."""
        return await self._call("POST", "/edge/v1/models/pin", ModelInfo, {"model": ref})

    async def unpin(self, ref: str) -> ModelInfo:
        """Let a model go again."""
        return await self._call("POST", "/edge/v1/models/unpin", ModelInfo, {"model": ref})

    async def slots(self) -> list[SlotInfo]:
        """The slots and the versions in them."""
        return (await self._call("GET", "/edge/v1/slots", SlotList)).slots

    async def activate(
        self, slot: str, ref: str, *, trial_s: float, within_s: float | None = None, force: bool = False
    ) -> SlotInfo:
        """Put a model into a slot; returns when it serves."""
        body = {"model": ref, "trial_s": trial_s, "within_s": within_s, "force": force}
        path = f"/edge/v1/slots/{quote(slot, safe='')}/activate"
        return await self._call("POST", path, SlotInfo, body, LOAD_TIMEOUT_S)

    async def roll_back(self, slot: str, *, force: bool = False) -> SlotInfo:
        """Have the version of a slot that was before serve again."""
        path = f"/edge/v1/slots/{quote(slot, safe='')}/rollback{'?force=true' if force else ''}"
        return await self._call("POST", path, SlotInfo, None, LOAD_TIMEOUT_S)

    async def remove_slot(self, slot: str) -> None:
        """Forget a slot."""
        await self._reply("DELETE", f"/edge/v1/slots/{quote(slot, safe='')}")

    async def explain(self, ref: str) -> Explanation:
        """Why a model is served as it is."""
        return await self._call("GET", f"/edge/v1/explain/{quote(ref, safe=':/@')}", Explanation)

    async def config(self) -> list[Setting]:
        """Every setting of the appliance and where its value came from."""
        return (await self._call("GET", "/edge/v1/config", SettingList)).settings

    async def keys(self) -> list[KeyInfo]:
        """The API keys that hold."""
        return (await self._call("GET", "/edge/v1/keys", KeyList)).keys

    async def create_key(
        self, name: str, *, role: Role = "user", models: Sequence[str] = (), rpm: int | None = None,
        tokens_per_day: int | None = None, priority: int = 0,
    ) -> NewKey:  # fmt: skip
        """Make an API key; the reply is the only one that has it."""
        body = {
            "name": name, "role": role, "models": list(models), "rpm": rpm, "tokens_per_day": tokens_per_day,
            "priority": priority,
        }  # fmt: skip
        return await self._call("POST", "/edge/v1/keys", NewKey, body)

    async def revoke_key(self, name: str) -> None:
        """End an API key, by its name or id."""
        await self._reply("DELETE", f"/edge/v1/keys/{quote(name, safe='')}")

    async def warm(self, model: str, system: str, *, name: str | None = None) -> PinnedPrefix:
        """Compute what conversations with a system prompt share, and pin it; returns when that is done."""
        body = {"model": model, "system": system, "name": name}
        return await self._call("POST", "/edge/v1/prefixes", PinnedPrefix, body, LOAD_TIMEOUT_S)

    async def prefixes(self, model: str | None = None) -> list[PinnedPrefix]:
        """What is pinned: for a model, which is loaded for it, or for the models that are loaded."""
        query = f"?model={quote(model, safe='')}" if model is not None else ""
        reply = await self._call("GET", f"/edge/v1/prefixes{query}", PinnedPrefixList, None, LOAD_TIMEOUT_S)
        return reply.prefixes

    async def remove_prefix(self, model: str, name: str) -> None:
        """Unpin a prefix."""
        path = f"/edge/v1/prefixes/{quote(name, safe='')}?model={quote(model, safe='')}"
        await self._reply("DELETE", path, None, LOAD_TIMEOUT_S)

    async def pull(self, source: str, *, name: str | None = None) -> Job:
        """Start to fetch a model; the job tells how far it is."""
        return await self._call("POST", "/edge/v1/models/pull", Job, {"source": source, "name": name})

    async def jobs(self) -> list[Job]:
        """Running jobs and the last finished ones."""
        return (await self._call("GET", "/edge/v1/jobs", JobList)).jobs

    async def job(self, job_id: str) -> Job:
        """One job."""
        return await self._call("GET", f"/edge/v1/jobs/{quote(job_id, safe='')}", Job)

    async def cancel_job(self, job_id: str) -> Job:
        """Stop a job. One that has ended stays as it is."""
        return await self._call("POST", f"/edge/v1/jobs/{quote(job_id, safe='')}/cancel", Job)

    async def telemetry(self) -> OutboxStatus:
        """The telemetry spool."""
        return await self._call("GET", "/edge/v1/telemetry", OutboxStatus)

    async def flush(self) -> OutboxStatus:
        """Try now to send what waits in the spool."""
        return await self._call("POST", "/edge/v1/telemetry/flush", OutboxStatus)

    async def logs(self, *, num_lines: int = 200) -> list[str]:
        """The last lines of the appliance's log, oldest first."""
        return (await self._call("GET", f"/edge/v1/logs?lines={num_lines}", LogLines)).lines

    async def send_file(self, file: BinaryIO) -> FileObject:
        """Send a file of requests, for a batch."""
        async with self._open("POST", "/v1/files", None, UPLOAD_TIMEOUT_S, file=file) as response:
            return self._decode(await self._read(response, MAX_REPLY_BYTES), FileObject)

    async def create_batch(self, file_id: str, endpoint: str) -> Batch:
        """Have the requests of a file answered."""
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        return await self._call("POST", "/v1/batches", Batch, body)

    async def batches(self) -> list[Batch]:
        """The last hundred batches, the newest first."""
        return (await self._call("GET", "/v1/batches?limit=100", BatchList)).data

    async def batch(self, batch_id: str) -> Batch:
        """One batch."""
        return await self._call("GET", f"/v1/batches/{quote(batch_id, safe='')}", Batch)

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Have a batch end with what it has."""
        return await self._call("POST", f"/v1/batches/{quote(batch_id, safe='')}/cancel", Batch)

    async def file_content(self, file_id: str) -> AsyncGenerator[bytes]:
        """What is in a file, as it arrives."""
        path = f"/v1/files/{quote(file_id, safe='')}/content"
        async with self._open("GET", path, None, UPLOAD_TIMEOUT_S) as response:
            async for chunk in response.aiter_bytes():
                yield chunk

    async def events(self) -> AsyncGenerator[DeviceStatus | Job | LogLines]:
        """What the appliance tells, as it happens; it ends only by an error. The caller connects again.

        An event of another name is passed over, so that a newer appliance may send more.
        """
        async with contextlib.aclosing(self._stream("GET", "/edge/v1/events", None, SILENCE_TIMEOUT_S)) as stream:
            async for event in stream:
                if event.name == "status":
                    yield self._decode(event.data, DeviceStatus)
                elif event.name == "job":
                    yield self._decode(event.data, Job)
                elif event.name == "log":
                    yield self._decode(event.data, LogLines)
        raise ServerUnavailable(f"The appliance at {self.address} ended the stream of events.")

    async def chat(
        self, model: str, messages: Sequence[ChatMessage], params: ChatParams | None = None
    ) -> AsyncGenerator[ChatDelta]:
        """Ask, and get the answer as it is made. Closing the iterator stops the answer.

        Raises:
            ServerUnavailable: Also when the answer was cut off before its end.
        """
        body = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **_sampling(params or ChatParams()),
        }
        async with contextlib.aclosing(self._stream("POST", "/v1/chat/completions", body, TOKEN_TIMEOUT_S)) as stream:
            async for event in stream:
                if event.data == b"[DONE]":
                    return
                for delta in self._deltas(event, model):
                    yield delta
        raise ServerUnavailable("The answer was cut off before its end.", hint="Send the request again.")

    def _deltas(self, event: Event, model: str) -> list[ChatDelta]:
        chunk = self._decode(event.data, _Chunk)
        if chunk.error is not None:
            raise _error_of(chunk.error, status=0, subject=model)
        choice = chunk.choices[0] if chunk.choices else _Choice()
        delta = ChatDelta(choice.delta.content or "", choice.finish_reason, chunk.usage)
        return [delta] if delta != ChatDelta() else []

    async def _call(
        self, method: Method, path: str, kind: type[T], body: Body = None, timeout_s: float = REPLY_TIMEOUT_S
    ) -> T:
        return self._decode(await self._reply(method, path, body, timeout_s), kind)

    async def _reply(self, method: Method, path: str, body: Body = None, timeout_s: float = REPLY_TIMEOUT_S) -> bytes:
        async with self._open(method, path, body, timeout_s) as response:
            return await self._read(response, MAX_REPLY_BYTES)

    async def _stream(self, method: Method, path: str, body: Body, timeout_s: float) -> AsyncGenerator[Event]:
        parser = EventParser()
        async with self._open(method, path, body, timeout_s) as response:
            media_type = response.headers.get("content-type", "")
            if not media_type.startswith("text/event-stream"):
                raise self._invalid(f"a stream of events was due, '{media_type}' came")
            async for chunk in response.aiter_bytes():
                for event in parser.feed(chunk):
                    yield event

    @contextlib.asynccontextmanager
    async def _open(
        self, method: Method, path: str, body: Body, timeout_s: float, *, file: BinaryIO | None = None
    ) -> AsyncGenerator[httpx.Response]:
        """Send, and hand out the response if it is a success. Errors of httpx end here."""
        if self._read_only and method != "GET":
            raise InvalidRequest("This terminal is read only.", hint="Start it without --readonly to change things.")
        content = None if body is None else msgspec.json.encode(body)
        # No compression: a bound on what arrives is then a bound on what it becomes.
        headers = {"accept-encoding": "identity", **({} if file else {"content-type": "application/json"})}
        form = (None, None) if file is None else ({"file": file}, {"purpose": "batch"})
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            async with self._http.stream(
                method, path, content=content, files=form[0], data=form[1], headers=headers, timeout=timeout
            ) as response:
                if not response.is_success:
                    await self._fail(response, body)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise self._invalid("the reply is compressed, which nobody asked for")
                yield response
        except httpx.TransportError as e:
            raise self._unavailable(e) from e
        except (httpx.HTTPError, httpx.StreamError) as e:
            raise self._invalid(f"{type(e).__name__}: {e}") from e

    async def _read(self, response: httpx.Response, limit_bytes: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for chunk in response.aiter_bytes():
            size += len(chunk)
            if size > limit_bytes:
                raise self._invalid(f"the reply is longer than {limit_bytes:,} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def _fail(self, response: httpx.Response, body: Body) -> NoReturn:
        subject = str(body.get("model", "")) if body else response.request.url.path.rpartition("/models/")[2]
        content = await self._read(response, MAX_ERROR_BYTES)
        found = _error_body(content)
        if found is None:
            raise ApplianceError(
                f"{self.address} answered {response.status_code} to {response.request.url.path}.",
                hint="Is it an edge appliance, and of this version? Compare: edge --version.",
                status=response.status_code,
            )
        raise _error_of(
            found,
            status=response.status_code,
            subject=subject,
            retry_after=response.headers.get("retry-after"),
        )

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise self._invalid(str(e)) from e

    def _invalid(self, reason: str) -> InvalidReply:
        return InvalidReply(
            f"What answers at {self.address} is not this appliance's API: {reason}.",
            hint="Check the address, and that `edge --version` is the same on both sides.",
        )

    def _unavailable(self, error: httpx.TransportError) -> ServerUnavailable:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
            return ServerUnavailable(f"No appliance answers at {self.address}.", hint="Start it with: edge serve")
        if isinstance(error, httpx.TimeoutException):
            return ServerUnavailable(
                f"The appliance at {self.address} did not answer in time.", hint="Look at its log: edge tui, key 4."
            )
        return ServerUnavailable(
            f"The connection to {self.address} broke: {error or type(error).__name__}.", hint="Send the request again."
        )


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as e:
        raise ConfigError(f"The certificates of {ca_file} cannot be used: {e.strerror or e}.") from e


def _parse_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ConfigError(f"{url!r} is not a URL: {e}.") from e
    # httpx quotes what cannot stand in a host and then looks for a host of that name.
    is_host = bool(parsed.host) and "%" not in parsed.host
    if parsed.scheme not in ("http", "https") or not is_host or (parsed.port or 0) > 65535:
        raise ConfigError(f"The appliance's URL must be like http://HOST:PORT, got {url!r}.")
    return parsed


def _sampling(params: ChatParams) -> dict[str, object]:
    given: dict[str, object] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "stop": list(params.stop) or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _error_body(content: bytes) -> _OpenAIErrorBody | None:
    """The error in a reply, of whichever of the API's two forms it has."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(content, type=_OpenAIError).error
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = msgspec.json.decode(content, type=Problem)
        return _OpenAIErrorBody(problem.detail or problem.title, code=problem.code, hint=problem.hint)
    return None


def _error_of(body: _OpenAIErrorBody, *, status: int, subject: str, retry_after: str | None = None) -> EdgeError:
    """The local twin of an error that the appliance told, in the appliance's words."""
    code = str(body.code or "")
    error: EdgeError
    if code == Unauthorized.code:
        return Unauthorized(body.message, hint="Set EDGE_API_KEY to a key of that appliance.")
    if code == ModelNotFound.code:
        error = ModelNotFound(subject)
    elif code == QueueFull.code:
        error = QueueFull(retry_after_s=float(retry_after) if retry_after and retry_after.isdecimal() else 1.0)
    elif code == InvalidRequest.code:
        error = InvalidRequest(body.message, field=body.param)
    elif code in _PLAIN_ERRORS:
        error = _PLAIN_ERRORS[code](body.message)
    else:
        error = ApplianceError(body.message, remote_code=code, status=status)
    error.message, error.hint = body.message, body.hint
    return error


def find_address(*, url: str | None, socket: Path | None, default_url: str, default_socket: Path) -> Address:
    """Where to look: what was given, else the default socket while it exists, else the default URL.

    Raises:
        ConfigError: Both a URL and a socket were given.
    """
    if url and socket:
        raise ConfigError("Give --url or --socket, not both.")
    if socket:
        return Address("http://localhost", socket, socket_only=True)
    if url:
        return Address(url.rstrip("/"))
    return Address(default_url, default_socket)


__all__ = [
    "Address", "ApplianceError", "ChatDelta", "ChatMessage", "ChatParams", "InvalidReply", "RuntimeClient", "Usage",
    "find_address",
]  # fmt: skip
