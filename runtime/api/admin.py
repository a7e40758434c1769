"""The admin API under /edge/v1, on which the terminal lives."""

from __future__ import annotations

import asyncio
from typing import Annotated

from litestar import Response, delete, get, post
from litestar.datastructures import State
from litestar.params import Parameter

from runtime.api.appliance import appliance_of
from runtime.api.call import HttpRequest
from runtime.api.parsing import parse_body
from runtime.api.responses import EventStream
from runtime.api.schema import (
    DeviceStatus,
    Job,
    JobList,
    LogLines,
    ModelInfo,
    ModelList,
    ModelRequest,
    OutboxStatus,
    PinnedPrefix,
    PinnedPrefixList,
    PullRequest,
    WarmRequest,
)


@get("/edge/v1/status")
async def status(state: State) -> DeviceStatus:
    """How the device is now."""
    return await appliance_of(state).status()


@get("/edge/v1/models")
async def models(state: State) -> ModelList:
    """Every model of the store and its state."""
    return ModelList(models=await appliance_of(state).model_infos())


@post("/edge/v1/models/load", status_code=200)
async def load_model(request: HttpRequest, state: State) -> ModelInfo:
    """Load a model; answers when it is ready."""
    body, _ = parse_body(await request.body(), ModelRequest)
    appliance = appliance_of(state)
    await appliance.pool.ready(body.model, timeout_s=600)
    return await appliance.model_info(body.model)


@post("/edge/v1/models/unload", status_code=200)
async def unload_model(request: HttpRequest, state: State) -> ModelInfo:
    """Unload a model; requests that it still answers end with an error."""
    body, _ = parse_body(await request.body(), ModelRequest)
    appliance = appliance_of(state)
    host = await appliance.pool.host(body.model)
    await host.unload()
    return await appliance.model_info(body.model)


@delete("/edge/v1/models/{ref:path}", status_code=204)
async def delete_model(state: State, ref: str) -> None:
    """Unload a model and remove it from the store."""
    await appliance_of(state).remove(ref.lstrip("/"))


@post("/edge/v1/prefixes", status_code=200)
async def warm(request: HttpRequest, state: State) -> PinnedPrefix:
    """Compute what conversations with a system prompt share, and pin it; loads the model."""
    body, _ = parse_body(await request.body(), WarmRequest)
    return await appliance_of(state).warm(body)


@get("/edge/v1/prefixes")
async def prefixes(state: State, model: Annotated[str, Parameter(max_length=400)] | None = None) -> PinnedPrefixList:
    """What is pinned for a model, which is loaded for it; else for the models that are loaded."""
    return PinnedPrefixList(prefixes=await appliance_of(state).prefixes(model))


@delete("/edge/v1/prefixes/{name:str}", status_code=204)
async def delete_prefix(state: State, name: str, model: Annotated[str, Parameter(max_length=400)]) -> None:
    """Unpin a prefix and forget it; loads the model."""
    await appliance_of(state).remove_prefix(model, name)


@post("/edge/v1/models/pull", status_code=202)
async def pull_model(request: HttpRequest, state: State) -> Job:
    """Begin to fetch a model; the job tells how far it is."""
    body, _ = parse_body(await request.body(), PullRequest)
    return appliance_of(state).pull(body)


@get("/edge/v1/jobs")
async def jobs(state: State) -> JobList:
    """Jobs, the newest first."""
    return JobList(jobs=appliance_of(state).jobs.list())


@get("/edge/v1/jobs/{job_id:str}")
async def job(state: State, job_id: str) -> Job:
    """One job."""
    return appliance_of(state).jobs.get(job_id)


@post("/edge/v1/jobs/{job_id:str}/cancel", status_code=200)
async def cancel_job(state: State, job_id: str) -> Job:
    """Ask a job to stop."""
    return appliance_of(state).jobs.cancel(job_id)


@get("/edge/v1/telemetry")
async def telemetry(state: State) -> OutboxStatus:
    """The telemetry spool."""
    return appliance_of(state).outbox()


@post("/edge/v1/telemetry/flush", status_code=200)
async def flush_telemetry(state: State) -> OutboxStatus:
    """Send now what waits; answers after the attempt."""
    appliance = appliance_of(state)
    await asyncio.to_thread(appliance.telemetry.flush)
    return appliance.outbox()


@get("/edge/v1/logs")
async def logs(state: State, lines: Annotated[int, Parameter(ge=1, le=5000)] = 200) -> LogLines:
    """The last lines of the log."""
    return LogLines(lines=appliance_of(state).logs.last(lines))


@get("/edge/v1/events")
async def events(state: State) -> Response[bytes]:
    """Server-sent events: `status` each second, `job` at each change of one."""
    return EventStream(appliance_of(state).events(), on_close=lambda: None)


HANDLERS = [
    status, models, load_model, unload_model, delete_model, warm, prefixes, delete_prefix, pull_model,
    jobs, job, cancel_job, telemetry, flush_telemetry, logs, events,
]  # fmt: skip
