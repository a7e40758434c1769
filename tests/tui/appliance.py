"""A scripted appliance: the admin API and chat over real HTTP, its state set by the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, delete, get, post
from litestar.config.app import AppConfig
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.response import Stream
from typing_extensions import override

from runtime.api.schema import (
    Alert,
    DeviceStatus,
    Job,
    JobList,
    LogLines,
    ModelInfo,
    ModelList,
    ModelRequest,
    OutboxStatus,
    Problem,
    PullRequest,
)

NOW = 1_790_000_000.0


def a_model(ref: str = "smollm2:135m-instruct", **changes: object) -> ModelInfo:
    """A model as the store lists it, not loaded."""
    model = ModelInfo(
        ref=ref, digest="sha256:" + "3f" * 32, size_bytes=98_000_000, state="unloaded", architecture="llama",
        quantization="Q4_1", num_parameters=134_515_008, context_tokens=8192, license="apache-2.0", created=NOW,
    )  # fmt: skip
    return msgspec.structs.replace(model, **changes)


def a_loaded_model(ref: str = "smollm2:135m-instruct", **changes: object) -> ModelInfo:
    """A model that is ready and busy."""
    return a_model(
        ref,
        **{
            "state": "ready", "memory_bytes": 312_000_000, "kv_cells": 8192, "kv_cells_used": 1204,
            "requests_active": 2, "requests_waiting": 1, "decode_tok_s": 38.4, "prefill_tok_s": 412.0,
            "loaded_s": 754.0,
        } | changes,
    )  # fmt: skip


def a_device(**changes: object) -> DeviceStatus:
    """A busy device with one loaded model, a spool that waits and one alert."""
    device = DeviceStatus(
        version="0.1.0", device_id="dev-0007", hostname="edge-07", time=NOW, uptime_s=273_900.0, cpu_percent=42.0,
        cpu_count=4, load_1m=1.7, memory_total_bytes=7_700_000_000, memory_available_bytes=4_600_000_000,
        memory_used_bytes=431_000_000, disk_free_bytes=12_400_000_000, temperature_c=52.1, accelerator="cpu",
        requests_active=2, requests_waiting=1, requests_total=1204, requests_failed=3, decode_tok_s=38.4,
        prefill_tok_s=412.0, ttft_p50_s=0.21,
        models=[a_loaded_model(), a_model("stories:15m", size_bytes=16_600_000, quantization="Q8_0")],
        outbox=OutboxStatus(
            enabled=True, gateway_url="http://gateway.plant:4318", rows=37, size_bytes=412_000, limit_bytes=64 << 20,
            oldest_age_s=192.0, sent_batches=5210, last_success_age_s=201.0, last_error="connection refused",
            next_attempt_s=12.0,
        ),
        jobs=[], alerts=[Alert(level="warning", what="The gateway does not answer.", fix="edge telemetry flush")],
    )  # fmt: skip
    return msgspec.structs.replace(device, **changes)


def an_idle_device(**changes: object) -> DeviceStatus:
    """A device with nothing loaded, nothing waiting and no alert, whose temperature cannot be read."""
    idle: dict[str, object] = {
        "cpu_percent": 1.0, "temperature_c": None, "load_1m": None, "requests_active": 0, "requests_waiting": 0,
        "requests_total": 0, "requests_failed": 0, "decode_tok_s": 0.0, "prefill_tok_s": 0.0, "ttft_p50_s": None,
        "models": [a_model()], "outbox": OutboxStatus(enabled=False, limit_bytes=64 << 20), "alerts": [],
    }  # fmt: skip
    return a_device(**(idle | changes))


class Refusal(Exception):
    """A problem that a handler answers with."""

    def __init__(self, status: int, code: str, detail: str, hint: str | None = None) -> None:
        self.problem = Problem(
            type=f"urn:slm-edge:error:{code}", title="Refused", status=status, detail=detail, code=code, hint=hint
        )


def _answer_refusal(_request: Request[Any, Any, Any], refusal: Refusal) -> Response[bytes]:
    return Response(
        msgspec.json.encode(refusal.problem), status_code=refusal.problem.status, media_type="application/problem+json"
    )


def _sse(name: str, struct: msgspec.Struct) -> bytes:
    return f"event: {name}\ndata: {msgspec.json.encode(struct).decode()}\n\n".encode()


@dataclass
class ScriptedAppliance:
    """What the server says. Set fields before it is asked; `tell` and `release` work from any thread."""

    status: DeviceStatus = field(default_factory=a_device)
    log_lines: list[str] = field(default_factory=list[str])
    answer: list[str] = field(default_factory=lambda: ["Hello", " from", " the", " **edge**", "."])
    answer_end: bytes = b"data: [DONE]\n\n"
    hold_after: int | None = None
    """Number of chunks after which an answer waits for `release`."""
    refusals: dict[str, Refusal] = field(default_factory=dict[str, Refusal])
    """Path -> what it answers instead."""
    calls: list[tuple[str, object]] = field(default_factory=list[tuple[str, object]])
    """Every changing call: path and body."""
    asked: list[str] = field(default_factory=list[str])
    """The path of every request."""
    num_streams_cut: int = 0
    """Answers whose reader went away."""

    def __post_init__(self) -> None:
        self._subscribers: set[asyncio.Queue[bytes]] = set()
        self._released = asyncio.Event()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where it answers; the same after a restart."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Begin to answer, on the port of last time if there was one."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(_application(self), log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        self._server = _QuietServer(config)
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(listener, started)), daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def _run(self, listener: socket.socket, started: threading.Event) -> None:
        assert self._server
        self._loop = asyncio.get_running_loop()
        self._released = asyncio.Event()
        self._subscribers.clear()
        self._loop.call_soon(started.set)
        await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        """Drop every connection and answer no more."""
        if self._server and self._thread:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(10)
            assert not self._thread.is_alive()
        self._server = self._thread = self._loop = None

    @contextlib.contextmanager
    def running(self) -> Generator[ScriptedAppliance]:
        """Answer for as long as the block lasts."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def tell(self, event: DeviceStatus | Job | bytes) -> None:
        """Send an event to everyone who listens; a status is also what the API answers from now on."""
        if isinstance(event, DeviceStatus):
            self.status = event
        data = (
            event if isinstance(event, bytes) else _sse("status" if isinstance(event, DeviceStatus) else "job", event)
        )
        assert self._loop
        self._loop.call_soon_threadsafe(lambda: [queue.put_nowait(data) for queue in self._subscribers])

    def release(self) -> None:
        """Let answers that are held go on."""
        assert self._loop
        self._loop.call_soon_threadsafe(self._released.set)

    def change(self, ref: str, **changes: object) -> ModelInfo:
        """Change one model and tell it."""
        models = [msgspec.structs.replace(m, **changes) if m.ref == ref else m for m in self.status.models]
        found = next((m for m in models if m.ref == ref), None)
        if found is None:
            raise Refusal(404, "model_not_found", f"The model '{ref}' is not in the store.", "Models here: none yet.")
        self.tell(msgspec.structs.replace(self.status, models=models))
        return found

    async def events(self) -> AsyncGenerator[bytes]:
        """One listener's stream."""
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            yield _sse("status", self.status)
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    async def answers(self, model: str) -> AsyncGenerator[bytes]:
        """One answer of `model`, in chunks as OpenAI's API streams them."""
        is_whole = False
        try:
            for i, text in enumerate(self.answer):
                if i == self.hold_after:
                    await self._released.wait()
                yield _chunk(model, choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])
            nothing: dict[str, str] = {}
            yield _chunk(model, choices=[{"index": 0, "delta": nothing, "finish_reason": "stop"}])
            usage = {"prompt_tokens": 31, "completion_tokens": len(self.answer), "total_tokens": 31 + len(self.answer)}
            yield _chunk(model, choices=[], usage=usage)
            yield self.answer_end
            is_whole = True
        finally:
            self.num_streams_cut += not is_whole


def _chunk(model: str, **body: object) -> bytes:
    data = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": int(NOW), "model": model, **body}
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class _QuietServer(uvicorn.Server):
    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals stay with the tests: this server runs on a thread."""
        yield


def _application(appliance: ScriptedAppliance) -> Litestar:
    def note(path: str, body: object) -> None:
        appliance.calls.append((path, body))
        if refusal := appliance.refusals.get(path):
            raise refusal

    @get("/edge/v1/status")
    async def status() -> DeviceStatus:
        return appliance.status

    @get("/edge/v1/models")
    async def models() -> ModelList:
        return ModelList(models=appliance.status.models)

    @post("/edge/v1/models/load", status_code=200)
    async def load(data: JSONBody[ModelRequest]) -> ModelInfo:
        note("models/load", data.model)
        return appliance.change(data.model, state="ready", memory_bytes=312_000_000, kv_cells=8192)

    @post("/edge/v1/models/unload", status_code=200)
    async def unload(data: JSONBody[ModelRequest]) -> ModelInfo:
        note("models/unload", data.model)
        return appliance.change(data.model, state="unloaded", memory_bytes=None, kv_cells=0, decode_tok_s=0.0)

    @delete("/edge/v1/models/{ref:path}")
    async def remove(ref: FromPath[str]) -> None:
        name = ref.removeprefix("/")
        note("models/delete", name)
        appliance.change(name)
        rest = [m for m in appliance.status.models if m.ref != name]
        appliance.tell(msgspec.structs.replace(appliance.status, models=rest))

    @post("/edge/v1/models/pull", status_code=202)
    async def pull(data: JSONBody[PullRequest]) -> Job:
        note("models/pull", data)
        job = Job(id="job-1", kind="pull", subject=data.source, state="running", total_bytes=98_000_000, created=NOW)
        appliance.tell(msgspec.structs.replace(appliance.status, jobs=[*appliance.status.jobs, job]))
        return job

    @get("/edge/v1/jobs")
    async def jobs() -> JobList:
        return JobList(jobs=appliance.status.jobs)

    def find_job(job_id: str) -> Job:
        for job in appliance.status.jobs:
            if job.id == job_id:
                return job
        raise Refusal(404, "invalid_request", f"There is no job '{job_id}'.")

    @get("/edge/v1/jobs/{job_id:str}")
    async def one_job(job_id: FromPath[str]) -> Job:
        return find_job(job_id)

    @post("/edge/v1/jobs/{job_id:str}/cancel", status_code=200)
    async def cancel(job_id: FromPath[str]) -> Job:
        note("jobs/cancel", job_id)
        job = msgspec.structs.replace(find_job(job_id), state="cancelled", finished=NOW)
        appliance.tell(msgspec.structs.replace(appliance.status, jobs=[job]))
        return job

    @get("/edge/v1/telemetry")
    async def telemetry() -> OutboxStatus:
        return appliance.status.outbox

    @post("/edge/v1/telemetry/flush", status_code=200)
    async def flush() -> OutboxStatus:
        note("telemetry/flush", None)
        outbox = msgspec.structs.replace(appliance.status.outbox, rows=0, size_bytes=0, last_error=None)
        appliance.tell(msgspec.structs.replace(appliance.status, outbox=outbox))
        return outbox

    @get("/edge/v1/logs")
    async def logs(lines: FromQuery[int] = 200) -> LogLines:
        return LogLines(lines=appliance.log_lines[-lines:])

    @get("/edge/v1/events")
    async def events() -> Stream:
        return Stream(appliance.events(), media_type="text/event-stream")

    @post("/v1/chat/completions", status_code=200)
    async def chat(data: JSONBody[dict[str, Any]]) -> Stream:
        note("chat/completions", data)
        return Stream(appliance.answers(str(data["model"])), media_type="text/event-stream")

    handlers: list[BaseRouteHandler] = [
        status, models, load, unload, remove, pull, jobs, one_job, cancel, telemetry, flush, logs, events, chat,
    ]  # fmt: skip

    def count(request: Request[Any, Any, Any]) -> None:
        appliance.asked.append(request.url.path)

    def install(config: AppConfig) -> AppConfig:
        config.route_handlers.extend(handlers)
        return config

    return Litestar(
        [], before_request=count, on_app_init=[install], exception_handlers={Refusal: _answer_refusal},
        openapi_config=None, logging_config=None,
    )  # fmt: skip
