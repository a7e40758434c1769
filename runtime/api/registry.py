"""The store's manifests and blobs for other appliances, and for any tool that reads registries: read only, under /v2.

Source: OCI distribution specification 1.1 ("Pull", "Content Discovery", "Listing Referrers"); RFC 9110 §14 for ranges.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from litestar import Response, get, head
from litestar.datastructures import State

from edge.access.keys import Limits
from edge.errors import BlobNotFound, InvalidReference, ModelNotFound, QueueFull, StoreError
from edge.store.digest import Digest
from edge.store.manifest import INDEX_TYPE, MANIFEST_TYPE, Index, ModelRef, encode
from edge.store.models import ModelStore, StoredModel
from runtime.api.access import needs
from runtime.api.appliance import Appliance, SentBlobs, appliance_of
from runtime.api.call import HttpRequest
from runtime.api.describe import exchanges
from runtime.api.guard import caller_of
from runtime.api.responses import EventStream

BLOB_TYPE = "application/octet-stream"
READ_BYTES = 256 << 10
"""At once: what a slow reader keeps waiting in memory."""
MAX_STREAMS = 16
"""Blobs that are sent at the same time."""
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_ERRORS = (BlobNotFound, ModelNotFound, InvalidReference, QueueFull, StoreError)


class Repositories(msgspec.Struct, kw_only=True):
    """Names of models."""

    repositories: list[str]


class Tags(msgspec.Struct, kw_only=True):
    """Tags of one name."""

    name: str
    tags: list[str]


@dataclass(frozen=True, slots=True)
class Found:
    """What a path leads to: a file as it lies in the store, or a document that is made."""

    media_type: str
    digest: Digest | None = None
    path: Path | None = None
    size_bytes: int = 0
    body: bytes = b""


@get("/v2", opt=needs("fetch"), sync_to_thread=False)
def base() -> dict[str, str]:
    """That this is a registry."""
    return {}


@head("/v2", opt=needs("fetch"), sync_to_thread=False)
def base_head() -> None:
    """Likewise."""


@get(
    "/v2/{path:path}",
    opt=needs("fetch") | exchanges(also={206: bytes, 304: None, 416: None}, errors=_ERRORS),
    media_type="*/*",
)
async def fetch(request: HttpRequest, state: State, path: str) -> Response[bytes]:
    """A part of the store: `_catalog`, `NAME/tags/list`, `NAME/manifests/TAG` or `/DIGEST`, `NAME/blobs/DIGEST` (also
    in ranges), `NAME/referrers/DIGEST`."""
    appliance = appliance_of(state)
    found = await _find(request, appliance, path)
    if found.path is None:
        return Response(found.body, media_type=found.media_type, headers=_headers(found))
    return _file(request, appliance, found, found.path)


@head("/v2/{path:path}", opt=needs("fetch") | exchanges(errors=_ERRORS))
async def look(request: HttpRequest, state: State, path: str) -> Response[None]:
    """Whether it is there, and how large."""
    found = await _find(request, appliance_of(state), path)
    told = {"content-type": found.media_type, "content-length": str(found.size_bytes or len(found.body))}
    return Response(None, headers=_headers(found) | told)


def _headers(found: Found) -> dict[str, str]:
    headers: dict[str, str] = {}
    if found.digest is not None:
        headers |= {"docker-content-digest": found.digest, "etag": f'"{found.digest}"'}
    return headers | ({"accept-ranges": "bytes"} if found.path is not None else {})


async def _find(request: HttpRequest, appliance: Appliance, path: str) -> Found:
    limits = caller_of(request.scope).limits
    return await asyncio.to_thread(lookup, appliance.store, limits, path.strip("/"))


def lookup(store: ModelStore, limits: Limits, path: str) -> Found:
    """What a path means, as far as a key may use the models behind it. The bytes of what is quarantined are not given.

    Raises:
        ModelNotFound: There is no such name, tag or manifest.
        BlobNotFound: There is no such blob.
        InvalidReference: The path is none of a registry's.
    """
    models = [model for model in store.list() if limits.may_use(str(model.ref))]
    match path.rsplit("/", 2):
        case ["_catalog"]:
            return _document(Repositories(repositories=sorted({model.ref.name for model in models})))
        case [name, "tags", "list"]:
            return _document(Tags(name=name, tags=sorted(m.ref.tag for m in _named(models, name))))
        case [name, "manifests", reference]:
            return _manifest(store, models, name, reference)
        case [name, "blobs", digest]:
            ModelRef(name)  # by whatever name: who mends a model knows its digests, and may call it something else
            return _blob(store, models, Digest(digest))
        case [name, "referrers", digest]:
            return _referrers(store, _named(models, name), Digest(digest))
        case _:
            raise InvalidReference(
                f"{f'/v2/{path}'[:200]!r} is no path of a registry.",
                hint="There are /v2/_catalog, and after /v2/NAME: /tags/list, /manifests/TAG, /blobs/DIGEST.",
            )


def _named(models: list[StoredModel], name: str) -> list[StoredModel]:
    found = [model for model in models if model.ref.name == ModelRef(name).name]
    if not found:
        raise ModelNotFound(name, known=[str(model.ref) for model in models])
    return found


def _manifest(store: ModelStore, models: list[StoredModel], name: str, reference: str) -> Found:
    if reference.startswith("sha256:"):
        wanted = Digest(reference)
        known = {model.digest for model in models} | {d.digest for m in models for d in store.referrers(m.digest)}
        if wanted not in known:
            raise ModelNotFound(f"{name}@{reference}", known=[str(model.ref) for model in models])
    else:
        ref = ModelRef(name, reference)
        wanted = next((model.digest for model in models if model.ref == ref), None)
        if wanted is None:
            raise ModelNotFound(str(ref), known=[str(model.ref) for model in models])
    return _stored(store, wanted, MANIFEST_TYPE)


def _blob(store: ModelStore, models: list[StoredModel], digest: Digest) -> Found:
    if not any(digest in _digests_of(store, model) for model in models):
        raise BlobNotFound(digest)
    return _stored(store, digest, BLOB_TYPE)


def _digests_of(store: ModelStore, model: StoredModel) -> set[Digest]:
    found = {model.digest, model.manifest.config.digest, *(layer.digest for layer in model.manifest.layers)}
    for referrer in store.referrers(model.digest):
        manifest = store.read_referrer(referrer)
        found |= {referrer.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
    return found


def _stored(store: ModelStore, digest: Digest, media_type: str) -> Found:
    path = store.blobs.path(digest)
    try:
        return Found(media_type, digest, path, path.stat().st_size)
    except FileNotFoundError as e:
        raise BlobNotFound(digest) from e  # removed meanwhile


def _referrers(store: ModelStore, models: list[StoredModel], subject: Digest) -> Found:
    is_known = any(model.digest == subject for model in models)
    found = list(store.referrers(subject)) if is_known else []
    return Found(INDEX_TYPE, body=encode(Index(schema_version=2, media_type=INDEX_TYPE, manifests=found)))


def _document(content: msgspec.Struct) -> Found:
    return Found("application/json", body=encode(content))


# ---------------------------------------------------------------- files


def _file(request: HttpRequest, appliance: Appliance, found: Found, path: Path) -> Response[bytes]:
    headers, size = _headers(found), found.size_bytes
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(b"", status_code=304, headers=headers)
    span = part_of(request.headers.get("range", ""), size)
    if request.headers.get("if-range") not in (None, headers["etag"]):
        span = None
    if span is not None and span[0] >= span[1]:
        return Response(b"", status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    start, stop = span or (0, size)
    if span is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    if appliance.sent_blobs.num_open >= MAX_STREAMS:
        raise QueueFull(retry_after_s=5)
    headers["content-length"] = str(stop - start)
    return EventStream(
        _bytes_of(path, start, stop, appliance.sent_blobs), on_close=lambda: None, headers=headers,
        media_type=found.media_type, status_code=200 if span is None else 206,
    )  # fmt: skip


def part_of(header: str, size: int) -> tuple[int, int] | None:
    """The part that a `Range` header asks for, from its first byte to that behind its last; an empty one where there is
    none such. None where it asks for the whole, or for what is not understood (RFC 9110, §14.2)."""
    found = _RANGE.fullmatch(header.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found[1], found[2]
    if not first:
        return (max(0, size - int(last)), size) if int(last) else (size, size)
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


async def _bytes_of(path: Path, start: int, stop: int, sent: SentBlobs) -> AsyncGenerator[bytes]:
    file = await asyncio.to_thread(path.open, "rb", buffering=0)
    sent.num_open += 1
    try:
        while start < stop:
            data = await asyncio.to_thread(os.pread, file.fileno(), min(READ_BYTES, stop - start), start)
            if not data:
                return  # it became shorter: the client is told too few bytes
            start += len(data)
            sent.num_bytes += len(data)
            yield data
    finally:
        sent.num_open -= 1
        file.close()


HANDLERS = [base, base_head, fetch, look]
