"""OpenAI's endpoints for files and batches."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Annotated, BinaryIO, Literal

from litestar import Response, delete, get, post
from litestar.datastructures import State
from litestar.params import Parameter

from edge.errors import (
    BatchNotFound,
    DeadlineExceeded,
    DiskFull,
    FileInUse,
    FileTooLarge,
    Forbidden,
    QueueFull,
    StorageFull,
    StoredFileNotFound,
    StoreError,
)
from edge.store.files import translated
from runtime.api.access import Caller, needs
from runtime.api.call import HttpRequest
from runtime.api.describe import Errors, exchanges
from runtime.api.guard import caller_of
from runtime.api.openai import warning_headers
from runtime.api.parsing import parse_body
from runtime.api.responses import EventStream

from .schema import Batch, BatchList, BatchRequest, Endpoint, FileDeleted, FileList, FileObject
from .service import batches_of

_SCOPES: dict[Endpoint, Literal["chat", "embed"]] = {
    "/v1/chat/completions": "chat", "/v1/completions": "chat", "/v1/responses": "chat", "/v1/embeddings": "embed",
    "/v1/moderations": "chat",
}  # fmt: skip
_SENDING: Errors = (FileTooLarge, StorageFull, DiskFull, StoreError, QueueFull, DeadlineExceeded)
_OF_FILE: Errors = (StoredFileNotFound, StoreError)
_OF_BATCH: Errors = (BatchNotFound, StoreError)
_BYTES = "application/octet-stream"
_CHUNK_BYTES = 1 << 18
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]")
Id = Annotated[str, Parameter(max_length=64)]


def _owner(request: HttpRequest) -> Caller:
    """Who asks: a key that may ask models something, since files are for that.

    Raises:
        Forbidden: It may not.
    """
    caller = caller_of(request.scope)
    if not (caller.limits.may("chat") or caller.limits.may("embed")):
        raise Forbidden("This key may not use files: it takes the scope 'chat' or 'embed'.")
    return caller


@post("/v1/files", opt=needs("key") | exchanges(sends="multipart/form-data", errors=_SENDING), status_code=200)
async def create_file(request: HttpRequest, state: State) -> FileObject:
    """Send a file of requests: a form with `purpose` and `file`."""
    return await batches_of(state).receive(request, _owner(request))


@get("/v1/files", opt=needs("key") | exchanges(errors=(StoreError,)))
async def list_files(
    request: HttpRequest,
    state: State,
    after: Id | None = None,
    limit: Annotated[int, Parameter(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Id | None = None,
) -> FileList:
    """The key's files."""
    key = _owner(request).id
    return await batches_of(state).store.run(
        lambda s: s.files.list(key, after=after, limit=limit, newest_first=order == "desc", purpose=purpose)
    )


@get("/v1/files/{file_id:str}", opt=needs("key") | exchanges(errors=_OF_FILE))
async def get_file(request: HttpRequest, state: State, file_id: str) -> FileObject:
    """One file."""
    key = _owner(request).id
    return await batches_of(state).store.run(lambda s: s.files.get(key, file_id))


@get("/v1/files/{file_id:str}/content", opt=needs("key") | exchanges(streams=_BYTES, errors=_OF_FILE))
async def file_content(request: HttpRequest, state: State, file_id: str) -> Response[bytes]:
    """What is in a file."""
    key, store = _owner(request).id, batches_of(state).store
    found = await store.run(lambda s: s.files.get(key, file_id))
    path = await store.run(lambda s: s.files.path(found.id))
    with translated(path, "Opening"):
        file = await asyncio.to_thread(path.open, "rb")
    headers = {
        "content-length": str(found.bytes),
        "content-disposition": f'attachment; filename="{_NOT_PLAIN.sub("_", found.filename)}"',
        "x-content-type-options": "nosniff",
    }
    return EventStream(_read(file), on_close=file.close, headers=headers, media_type=_BYTES)


async def _read(file: BinaryIO) -> AsyncGenerator[bytes]:
    while data := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield data


@delete("/v1/files/{file_id:str}", opt=needs("key") | exchanges(errors=(*_OF_FILE, FileInUse)), status_code=200)
async def delete_file(request: HttpRequest, state: State, file_id: str) -> FileDeleted:
    """Remove a file."""
    key = _owner(request).id
    await batches_of(state).store.run(lambda s: s.files.remove(key, file_id))
    return FileDeleted(id=file_id)


@post(
    "/v1/batches",
    opt=needs("key") | exchanges(BatchRequest, errors=(*_OF_FILE, StorageFull, QueueFull)),
    status_code=200,
)
async def create_batch(request: HttpRequest, state: State) -> Response[Batch]:
    """Have the requests of a file answered when nobody else wants the room."""
    caller = _owner(request)
    body, warnings = parse_body(await request.body(), BatchRequest)
    caller.check(_SCOPES[body.endpoint])
    return Response(await batches_of(state).create(caller, body), headers=warning_headers(warnings))


@get("/v1/batches", opt=needs("key") | exchanges(errors=(StoreError,)))
async def list_batches(
    request: HttpRequest,
    state: State,
    after: Id | None = None,
    limit: Annotated[int, Parameter(ge=1, le=100)] = 20,
) -> BatchList:
    """The key's batches, the newest first."""
    key = _owner(request).id
    return await batches_of(state).store.run(lambda s: s.batches.list(key, after=after, limit=limit))


@get("/v1/batches/{batch_id:str}", opt=needs("key") | exchanges(errors=_OF_BATCH))
async def get_batch(request: HttpRequest, state: State, batch_id: str) -> Batch:
    """One batch, and how far it is."""
    key = _owner(request).id
    return await batches_of(state).store.run(lambda s: s.batches.get(key, batch_id))


@post("/v1/batches/{batch_id:str}/cancel", opt=needs("key") | exchanges(errors=_OF_BATCH), status_code=200)
async def cancel_batch(request: HttpRequest, state: State, batch_id: str) -> Batch:
    """Have a batch end with the answers that it has."""
    return await batches_of(state).cancel(_owner(request), batch_id)


HANDLERS = [
    create_file, list_files, get_file, file_content, delete_file, create_batch, list_batches, get_batch, cancel_batch,
]  # fmt: skip
