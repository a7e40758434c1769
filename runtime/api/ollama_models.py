"""Ollama's endpoints about models: what is there, what is loaded, and how others come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import ExitStack

from litestar import Response, delete, get, head, post
from litestar.datastructures import State

from edge import __version__
from edge.access.keys import Limits
from edge.errors import Cancelled, DeadlineExceeded, EdgeError, InvalidReference, InvalidRequest, ModelNotFound
from edge.store.catalog import catalog
from edge.store.derived import Changes, derive, parts_of
from edge.store.details import ModelDetails
from edge.store.digest import Digest
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.store.sources import FileSource, parse_source, without_query
from edge.store.uploads import MAX_UPLOAD_BYTES, receiving
from runtime.api.access import needs
from runtime.api.admin import act
from runtime.api.appliance import Appliance, appliance_of
from runtime.api.call import HttpRequest
from runtime.api.describe import exchanges
from runtime.api.errors import fault_of
from runtime.api.guard import caller_of
from runtime.api.ollama import NDJSON, ndjson
from runtime.api.ollama_facts import details, listed, shown
from runtime.api.ollama_schema import (
    Listed,
    ListedModels,
    OllamaCopyRequest,
    OllamaCreateRequest,
    OllamaPullRequest,
    OllamaShowRequest,
    OllamaVersion,
    Options,
    Progressed,
    Shown,
    after,
    ollama_name,
    option_warnings,
)
from runtime.api.openai import warning_headers
from runtime.api.parsing import parse_body, passed_over
from runtime.api.responses import EventStream
from runtime.api.schema import Job, OllamaError, PullRequest
from runtime.host import ModelHost
from runtime.template_check import check_template

API_VERSION = "0.12.11"
"""The version of Ollama whose API this follows: clients ask for it to know what they may use."""
POLL_S = 0.1
UPLOAD_SILENCE_S = 60.0
WRITE_BYTES = 1 << 20
_HUBS = ("hf.co/", "huggingface.co/")


@get("/", opt=needs("nothing"), media_type="text/plain", sync_to_thread=False)
def root() -> str:
    """What Ollama says there: clients look for it before they ask for anything."""
    return "Ollama is running"


@head("/", opt=needs("nothing"), sync_to_thread=False)
def root_head() -> None:
    """Likewise."""


@get("/api/version", opt=needs("key"), sync_to_thread=False)
def version() -> OllamaVersion:
    """The version of Ollama whose API this is."""
    return OllamaVersion(version=API_VERSION, slm_edge=__version__)


@head("/api/version", opt=needs("key"), sync_to_thread=False)
def version_head() -> None:
    """Likewise."""


@get("/api/tags", opt=needs("key"))
async def tags(request: HttpRequest, state: State) -> ListedModels:
    """The models of the store that the key may use, the newest first. Listing loads nothing."""
    limits, stored = caller_of(request.scope).limits, await appliance_of(state).stored_models()
    usable = (m for m in stored if not m.is_adapter and limits.may_use(str(m.ref)))
    models = sorted(usable, key=lambda m: -m.created)
    return ListedModels(models=await asyncio.to_thread(lambda: [listed(m) for m in models]))


@head("/api/tags", opt=needs("key"), sync_to_thread=False)
def tags_head() -> None:
    """Whether models can be listed."""


@post("/api/show", opt=needs("key") | exchanges(OllamaShowRequest), status_code=200)
async def show(request: HttpRequest, state: State) -> Response[Shown]:
    """All about one model. Loads nothing."""
    body, warnings = parse_body(await request.body(), OllamaShowRequest)
    if body.verbose:
        warnings.append(passed_over("verbose", "verbose has no effect: lists such as the vocabulary are left out"))
    appliance = appliance_of(state)
    await appliance.check_allowed(caller_of(request.scope).limits, body.wanted)
    answer = await asyncio.to_thread(shown, await _stored(appliance, body.wanted))
    answer.warnings = warnings
    return Response(answer, headers=warning_headers(warnings))


async def _stored(appliance: Appliance, name: str) -> StoredModel:
    """A model of the store by the name people type, perhaps with adapters."""
    return await appliance.stored_model((await appliance.pool.select(name, ())).model)


@get("/api/ps", opt=needs("key"))
async def ps(request: HttpRequest, state: State) -> ListedModels:
    """The models in memory that the key may use."""
    appliance, limits = appliance_of(state), caller_of(request.scope).limits
    hosts = [h for h in appliance.pool.hosts() if h.state == "ready" and limits.may_use(h.ref)]
    return ListedModels(models=[_running(appliance, h) for h in hosts])


def _running(appliance: Appliance, host: ModelHost) -> Listed:
    keep_s = appliance.pool.keep_alive_s(host)
    unused_s = 0.0 if host.num_active else time.monotonic() - host.last_used
    return Listed(
        name=host.ref, model=host.ref, digest=host.model.digest.hex, details=details(host.model),
        size=host.heartbeat.memory_bytes if host.heartbeat else host.model.size_bytes, size_vram=0,
        expires_at=after(max(0.0, keep_s - unused_s) if keep_s >= 0 else keep_s),
        context_length=host.ready.context_tokens if host.ready else 0,
    )  # fmt: skip


# ---------------------------------------------------------------- coming and going


@delete("/api/delete", opt=needs("admin") | exchanges(OllamaShowRequest), status_code=200)
async def delete_model(request: HttpRequest, state: State) -> None:
    """Unload a model and remove it from the store."""
    body, _ = parse_body(await request.body(), OllamaShowRequest)
    appliance = appliance_of(state)
    async with act(request, "model.delete", body.wanted, on=body.wanted):
        await appliance.remove(body.wanted)


@post("/api/copy", opt=needs("operate") | exchanges(OllamaCopyRequest), status_code=200)
async def copy(request: HttpRequest, state: State) -> None:
    """Give a model a second name; what had it before loses it."""
    body, _ = parse_body(await request.body(), OllamaCopyRequest)
    appliance, limits = appliance_of(state), caller_of(request.scope).limits
    source, target = ollama_name(body.source), ollama_name(body.destination)
    async with act(request, "model.copy", f"{source} {target}", on=source):
        appliance.check_target(limits, target)
        model = await asyncio.to_thread(appliance.store.copy, source, target)
        await appliance.pool.forget(str(model.ref))


@post("/api/push", opt=needs("operate") | exchanges(OllamaPullRequest), status_code=501)
async def push(request: HttpRequest) -> OllamaError:
    """Models are not pushed to Ollama's registry."""
    parse_body(await request.body(), OllamaPullRequest)
    return OllamaError(error="Models are not pushed over the API. On the device: edge push NAME oci://HOST/NAME.")


@post("/api/pull", opt=needs("operate") | exchanges(OllamaPullRequest, streams=NDJSON), status_code=200)
async def pull(request: HttpRequest, state: State) -> Response[Progressed] | EventStream:
    """Fetch a model; the lines tell how far it is. Who goes away stops it, and another pull goes on from there."""
    body, warnings = parse_body(await request.body(), OllamaPullRequest)
    appliance = appliance_of(state)
    source, name = source_of(body.given)
    if body.insecure:
        warnings.append(passed_over("insecure", "insecure has no effect: certificates are always checked"))
    async with act(request, "model.pull", f"{without_query(source)} {name or ''}".strip()):
        job = appliance.pull(PullRequest(source=source, name=name), caller_of(request.scope))
    lines, headers = _pulling(appliance, job, source, warnings), warning_headers(warnings)

    def stop() -> None:
        if job.finished is None:
            appliance.jobs.cancel(job.id)

    if body.stream is not False:
        return EventStream(_ending_well(lines), on_close=stop, headers=headers, media_type=NDJSON)
    try:
        (*_, last) = [line async for line in lines]
    finally:
        stop()
    return Response(last, headers=headers)


def source_of(name: str) -> tuple[str, str | None]:
    """What a name to pull means: a source, and the name that the model shall get, if it is another than the source's.

    Raises:
        ModelNotFound: It is neither in the catalog nor a source on the network.
        InvalidReference: It is a source that cannot be read.
    """
    from edge.store.fetch import in_catalog  # brings an HTTP client, which few appliances ever need

    for hub in _HUBS:
        if name.startswith(hub):
            return _of_hub(name, name.removeprefix(hub))
    if in_catalog(name) is None and isinstance(parse_source(name), FileSource):
        names = ", ".join(str(known) for known in catalog())
        hint = f"To be had: {names}; hf://OWNER/REPO/FILE.gguf, oci://HOST/NAME:TAG, https://HOST/FILE.gguf."
        raise ModelNotFound(name, message=f"There is no model '{name[:200]}' to pull.", hint=hint)
    return name, None


def _of_hub(name: str, path: str) -> tuple[str, str | None]:
    """Ollama's way to name a repository: ``hf.co/owner/repo``, perhaps with a file after a colon."""
    repo, _, tag = path.partition(":")
    if tag in ("", "latest"):
        return f"hf://{repo}", name.lower()
    if not tag.lower().endswith(".gguf"):
        raise InvalidRequest(
            f"'{name[:200]}' names no file.", field="model", hint=f"Name one: hf.co/{repo[:150]}:FILE.gguf."
        )
    return f"hf://{repo}/{tag}", ollama_name(name)


async def _pulling(appliance: Appliance, job: Job, source: str, warnings: list[str]) -> AsyncGenerator[Progressed]:
    """What a pull does, until it is done.

    Raises:
        EdgeError: It failed.
    """
    from edge.store.fetch import in_catalog  # as above

    known = in_catalog(source)
    digest = str(known[1].digest) if known else ""
    yield (last := Progressed(status="pulling manifest"))
    while job.finished is None:
        line = _progress(job, digest)
        if line != last:
            yield line
        last = line
        await asyncio.sleep(POLL_S)
    if job.state != "done":
        raise appliance.jobs.error(job.id) or Cancelled("The pull was cancelled.")
    yield Progressed(status=job.message)
    yield Progressed(status="success", warnings=warnings)


def _progress(job: Job, digest: str) -> Progressed:
    if job.total_bytes is None:
        return Progressed(status=job.message or "pulling manifest")
    return Progressed(
        status=f"pulling {digest[7:19]}" if digest else job.message, digest=digest, total=job.total_bytes,
        completed=job.done_bytes,
    )  # fmt: skip


async def _ending_well(lines: AsyncIterable[Progressed]) -> AsyncGenerator[bytes]:
    """The lines as they are sent. What goes wrong after the first byte is a line, since the status is spent."""
    try:
        async for line in lines:
            yield ndjson(line)
    except EdgeError as e:
        yield ndjson(fault_of(e).ollama())


# ---------------------------------------------------------------- making models


@post("/api/create", opt=needs("operate") | exchanges(OllamaCreateRequest, streams=NDJSON), status_code=200)
async def create(request: HttpRequest, state: State) -> Response[Progressed] | Response[bytes]:
    """Make a model of one that is here, or of a GGUF file that was sent, with a system prompt, a chat template or
    parameters of its own. One that had the name before is unloaded and replaced."""
    content = await request.body()
    body, warnings = parse_body(content, OllamaCreateRequest)
    body.check()
    warnings += _parameter_warnings(content, body.parameters)
    if body.template:
        await check_template(body.template)
    appliance = appliance_of(state)
    async with act(request, "model.create", f"{body.wanted} {body.base or ''}".strip()):
        await _check_material(appliance, caller_of(request.scope).limits, body)
        files, known = await asyncio.to_thread(_material, appliance, body)
        model = await asyncio.to_thread(derive, appliance.store, body.wanted, files, known, _changes(body, known))
        await appliance.pool.forget(str(model.ref))
    headers, last = warning_headers(warnings), Progressed(status="success", warnings=warnings)
    if body.stream is False:
        return Response(last, headers=headers)
    used = [Progressed(status=f"using existing layer {f.digest}") for f in model.files]
    lines = b"".join(map(ndjson, [*used, Progressed(status="writing manifest"), last]))
    return Response(lines, media_type=NDJSON, headers=headers)


async def _check_material(appliance: Appliance, limits: Limits, body: OllamaCreateRequest) -> None:
    appliance.check_target(limits, body.wanted)
    if body.base:
        await appliance.check_allowed(limits, ollama_name(body.base))
    for digest in map(Digest.parse, (body.files or {}).values()):
        if not await appliance.may_use_blob(limits, digest):
            raise InvalidReference(f"There is no blob {digest}.", hint="Send it first: POST /api/blobs/DIGEST.")


def _material(appliance: Appliance, body: OllamaCreateRequest) -> tuple[list[PackageFile], ModelDetails]:
    from edge.store.fetch import package_of  # as above

    if body.base:
        return parts_of(appliance.store.get(ollama_name(body.base)))
    ((name, digest),) = (body.files or {}).items()
    file, known = package_of(appliance.store, Digest.parse(digest), name[-200:])
    return [file], known


def _changes(body: OllamaCreateRequest, known: ModelDetails) -> Changes:
    """What the new model shall have.

    Raises:
        InvalidRequest: It is for models that make text, and this one is none.
    """
    asked = {"system": body.system, "template": body.template, "parameters": body.parameters}
    for field, value in asked.items():
        if value and known.kind != "text":
            raise InvalidRequest(f"A model for {known.kind} has no '{field}'.", field=field)
    license = body.license if isinstance(body.license, str) else "\n".join(body.license or ())
    if len(license) > 500:
        raise InvalidRequest("'license' is too long.", field="license", hint="Give its SPDX expression.")
    sampling = (body.parameters or Options()).sampling()
    return Changes(system=body.system or "", template=body.template or "", license=license, sampling=sampling)


def _parameter_warnings(content: bytes, parameters: Options | None) -> list[str]:
    warnings = option_warnings(content, "parameters")
    if parameters is not None and parameters.num_ctx:
        text = "parameters.num_ctx has no effect: the whole context is there in any case"
        warnings.append(passed_over("parameters.num_ctx", text))
    return warnings


@head("/api/blobs/{digest:str}", opt=needs("operate") | exchanges(also={404: None}))
async def has_blob(request: HttpRequest, state: State, digest: str) -> Response[None]:
    """Whether the store has these bytes, and the key may use them."""
    has = await appliance_of(state).may_use_blob(caller_of(request.scope).limits, Digest.parse(digest))
    return Response(None, status_code=200 if has else 404)


@post(
    "/api/blobs/{digest:str}",
    opt=needs("operate") | exchanges(sends="application/octet-stream", also={200: None}),
    status_code=201,
    request_max_body_size=MAX_UPLOAD_BYTES,
)
async def send_blob(request: HttpRequest, state: State, digest: str) -> Response[None]:
    """Keep bytes for a model to be made of them; refused where they are others than the digest says."""
    wanted, store = Digest.parse(digest), appliance_of(state).store
    if await asyncio.to_thread(store.blobs.has, wanted):
        return Response(None, status_code=200)
    async with act(request, "blob.upload", str(wanted)):
        await _receive(request, store, wanted)
    return Response(None, status_code=201)


async def _receive(request: HttpRequest, store: ModelStore, wanted: Digest) -> None:
    stack = ExitStack()
    upload = await asyncio.to_thread(stack.enter_context, receiving(store, wanted))
    try:
        async for data in _chunks(request):
            await asyncio.to_thread(upload.write, data)
        await asyncio.to_thread(upload.finish)
    finally:
        await asyncio.to_thread(stack.close)


async def _chunks(request: HttpRequest) -> AsyncGenerator[bytes]:
    """The body in pieces worth a write.

    Raises:
        DeadlineExceeded: It stands still.
    """
    held = bytearray()
    arriving = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(UPLOAD_SILENCE_S):
                data = await anext(arriving, None)
        except TimeoutError as e:
            raise DeadlineExceeded(timeout_s=UPLOAD_SILENCE_S) from e
        held += data or b""
        if data is None or len(held) >= WRITE_BYTES:
            yield bytes(held)
            held.clear()
        if data is None:
            return


HANDLERS = [
    root, root_head, version, version_head, tags, tags_head, show, ps, delete_model, copy, push, pull, create, has_blob,
    send_blob,
]  # fmt: skip
