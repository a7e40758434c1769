"""The admin API under /edge/v1, on which the terminal lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from litestar import Response, delete, get, post
from litestar.datastructures import State
from litestar.params import Parameter

from edge.config import shown
from edge.errors import EdgeError, GatewayUnavailable, JobNotFound, NoRoomToPin, PinNotFound
from edge.store.sources import without_query
from runtime.api.access import needs
from runtime.api.appliance import appliance_of
from runtime.api.call import HttpRequest
from runtime.api.describe import EVENTS, NAMING, OPERATING, exchanges
from runtime.api.guard import caller_of
from runtime.api.parsing import parse_body
from runtime.api.responses import EventStream
from runtime.api.schema import (
    DeviceStatus,
    Explanation,
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
    Setting,
    SettingList,
    WarmRequest,
)


@asynccontextmanager
async def act(request: HttpRequest, what: str, target: str, *, on: str | None = None) -> AsyncGenerator[None]:
    """Note what is done inside, and what came of it, in the audit log, where it is before the answer leaves.

    Args:
        on: The model that it is done to, which the key has to be allowed to use.

    Raises:
        ModelNotFound: The key may not, or there is none.
    """
    appliance, caller = appliance_of(request.app.state), caller_of(request.scope)
    outcome = "ok"
    try:
        if on is not None:
            await appliance.check_allowed(caller.limits, on)
        yield
    except EdgeError as e:
        outcome = e.code
        raise
    except BaseException as e:
        outcome = "cancelled" if not isinstance(e, Exception) else "internal_error"
        raise
    finally:
        await appliance.access.note(caller, what, target, outcome)


@get("/edge/v1/status", opt=needs("view"))
async def status(request: HttpRequest, state: State) -> DeviceStatus:
    """How the device is now."""
    return await appliance_of(state).status(caller_of(request.scope))


@get("/edge/v1/models", opt=needs("view"))
async def models(request: HttpRequest, state: State) -> ModelList:
    """Every model of the store that the key may use, and its state."""
    return ModelList(models=await appliance_of(state).model_infos(caller_of(request.scope).limits))


@post("/edge/v1/models/load", opt=needs("operate") | exchanges(ModelRequest), status_code=200)
async def load_model(request: HttpRequest, state: State) -> ModelInfo:
    """Load a model; answers when it is ready."""
    body, _ = parse_body(await request.body(), ModelRequest)
    appliance = appliance_of(state)
    async with act(request, "model.load", body.model, on=body.model):
        await appliance.pool.ready(body.model, timeout_s=600)
    return await appliance.model_info(body.model)


@post("/edge/v1/models/unload", opt=needs("operate") | exchanges(ModelRequest), status_code=200)
async def unload_model(request: HttpRequest, state: State) -> ModelInfo:
    """Unload a model; requests that it still answers end with an error."""
    body, _ = parse_body(await request.body(), ModelRequest)
    appliance = appliance_of(state)
    async with act(request, "model.unload", body.model, on=body.model):
        host = await appliance.pool.host(body.model)
        await host.unload()
    return await appliance.model_info(body.model)


@post("/edge/v1/models/pin", opt=needs("operate") | exchanges(ModelRequest), status_code=200)
async def pin_model(request: HttpRequest, state: State) -> ModelInfo:
    """Keep a model loaded once it is: not unloaded when idle, nor to make room."""
    body, _ = parse_body(await request.body(), ModelRequest)
    async with act(request, "model.pin", body.model, on=body.model):
        return await appliance_of(state).pin(body.model, is_pinned=True)


@post("/edge/v1/models/unpin", opt=needs("operate") | exchanges(ModelRequest), status_code=200)
async def unpin_model(request: HttpRequest, state: State) -> ModelInfo:
    """Let a model go again when it is idle or room is needed."""
    body, _ = parse_body(await request.body(), ModelRequest)
    async with act(request, "model.unpin", body.model, on=body.model):
        return await appliance_of(state).pin(body.model, is_pinned=False)


@get("/edge/v1/explain/{ref:path}", opt=needs("view") | exchanges(errors=NAMING))
async def explain_model(request: HttpRequest, state: State, ref: str) -> Explanation:
    """Why a model is served as it is: engine, threads, context, draft model, memory, each with its reason."""
    appliance, ref = appliance_of(state), ref.lstrip("/")
    await appliance.check_allowed(caller_of(request.scope).limits, ref)
    return await appliance.explain(ref)


@get("/edge/v1/config", opt=needs("view"))
async def config(request: HttpRequest, state: State) -> SettingList:
    """Every setting in force and where its value came from; passwords are masked."""
    caller_of(request.scope).check_all_models()
    settings = shown(appliance_of(state).settings)
    return SettingList(settings=[Setting(name=s.name, value=s.value, origin=s.origin) for s in settings])


@delete("/edge/v1/models/{ref:path}", opt=needs("admin"), status_code=204)
async def delete_model(request: HttpRequest, state: State, ref: str) -> None:
    """Unload a model and remove it from the store."""
    appliance, ref = appliance_of(state), ref.lstrip("/")
    async with act(request, "model.delete", ref, on=ref):
        await appliance.remove(ref)


@post("/edge/v1/prefixes", opt=needs("operate") | exchanges(WarmRequest, errors=(NoRoomToPin,)), status_code=200)
async def warm(request: HttpRequest, state: State) -> PinnedPrefix:
    """Compute what conversations with a system prompt share, and pin it; loads the model."""
    body, _ = parse_body(await request.body(), WarmRequest)
    appliance = appliance_of(state)
    async with act(request, "prefix.pin", f"{body.model} {body.name or ''}".strip(), on=body.model):
        return await appliance.warm(body)


@get("/edge/v1/prefixes", opt=needs("view") | exchanges(errors=OPERATING))
async def prefixes(
    request: HttpRequest, state: State, model: Annotated[str, Parameter(max_length=400)] | None = None
) -> PinnedPrefixList:
    """What is pinned for a model, which is loaded for it (that takes the scope `operate`); else for the models that are
    loaded."""
    caller, appliance = caller_of(request.scope), appliance_of(state)
    if model is not None:
        caller.check("operate")
        await appliance.check_allowed(caller.limits, model)
    return PinnedPrefixList(prefixes=await appliance.prefixes(model, caller.limits))


@delete("/edge/v1/prefixes/{name:str}", opt=needs("operate") | exchanges(errors=(PinNotFound,)), status_code=204)
async def delete_prefix(
    request: HttpRequest, state: State, name: str, model: Annotated[str, Parameter(max_length=400)]
) -> None:
    """Unpin a prefix and forget it; loads the model."""
    appliance = appliance_of(state)
    async with act(request, "prefix.unpin", f"{model} {name}", on=model):
        await appliance.remove_prefix(model, name)


@post("/edge/v1/models/pull", opt=needs("operate") | exchanges(PullRequest), status_code=202)
async def pull_model(request: HttpRequest, state: State) -> Job:
    """Begin to fetch a model; the job tells how far it is."""
    body, _ = parse_body(await request.body(), PullRequest)
    async with act(request, "model.pull", f"{without_query(body.source)} {body.name or ''}".strip()):
        return appliance_of(state).pull(body, caller_of(request.scope))


@get("/edge/v1/jobs", opt=needs("view"))
async def jobs(request: HttpRequest, state: State) -> JobList:
    """Jobs, the newest first; a key for some models sees its own."""
    return JobList(jobs=appliance_of(state).jobs.list(caller_of(request.scope).jobs_of))


@get("/edge/v1/jobs/{job_id:str}", opt=needs("view") | exchanges(errors=(JobNotFound,)))
async def job(request: HttpRequest, state: State, job_id: str) -> Job:
    """One job."""
    return appliance_of(state).jobs.get(job_id, caller_of(request.scope).jobs_of)


@post("/edge/v1/jobs/{job_id:str}/cancel", opt=needs("operate") | exchanges(errors=(JobNotFound,)), status_code=200)
async def cancel_job(request: HttpRequest, state: State, job_id: str) -> Job:
    """Ask a job to stop."""
    async with act(request, "job.cancel", job_id):
        return appliance_of(state).jobs.cancel(job_id, caller_of(request.scope).jobs_of)


@get("/edge/v1/telemetry", opt=needs("view"))
async def telemetry(state: State) -> OutboxStatus:
    """The telemetry spool."""
    return appliance_of(state).outbox()


@post("/edge/v1/telemetry/flush", opt=needs("operate") | exchanges(errors=(GatewayUnavailable,)), status_code=200)
async def flush_telemetry(request: HttpRequest, state: State) -> OutboxStatus:
    """Send now what waits; answers after the attempt."""
    appliance = appliance_of(state)
    async with act(request, "telemetry.flush", ""):
        await asyncio.to_thread(appliance.telemetry.flush)
    return appliance.outbox()


@get("/edge/v1/logs", opt=needs("view"))
async def logs(request: HttpRequest, state: State, lines: Annotated[int, Parameter(ge=1, le=5000)] = 200) -> LogLines:
    """The last lines of the log; of all models, so not for a key that is for some."""
    caller_of(request.scope).check_all_models()
    return LogLines(lines=appliance_of(state).logs.last(lines))


@get("/edge/v1/events", opt=needs("view") | exchanges(streams=EVENTS))
async def events(request: HttpRequest, state: State) -> Response[bytes]:
    """Server-sent events: `status` each second, `job` at each change of one, `log` as lines are written to it (not for
    a key that is for some models)."""
    return EventStream(appliance_of(state).events(caller_of(request.scope)), on_close=lambda: None)


HANDLERS = [
    status, models, load_model, unload_model, pin_model, unpin_model, explain_model, config, delete_model, warm,
    prefixes, delete_prefix, pull_model,
    jobs, job, cancel_job, telemetry, flush_telemetry, logs, events,
]  # fmt: skip
