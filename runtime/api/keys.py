"""API keys over the admin API. A key for some models manages none: it could give itself the others."""

from __future__ import annotations

import asyncio

from litestar import Response, delete, get, post
from litestar.datastructures import State

from edge.access.keys import ROLES, SCOPES, Key, Keys, Limits, parse_scopes, read_keys
from edge.errors import InvalidRequest, KeyNotFound, StoreError
from runtime.api.access import needs
from runtime.api.appliance import appliance_of
from runtime.api.call import HttpRequest
from runtime.api.describe import exchanges
from runtime.api.guard import caller_of
from runtime.api.parsing import parse_body
from runtime.api.schema import KeyInfo, KeyList, KeyRequest, NewKey


@get("/edge/v1/keys", opt=needs("admin") | exchanges(errors=(StoreError,)))
async def list_keys(request: HttpRequest, state: State) -> KeyList:
    """Every key that holds. Their secrets are nowhere."""
    caller_of(request.scope).check_all_models()
    keys = await asyncio.to_thread(read_keys, appliance_of(state).settings.state_db)
    return KeyList(keys=[_info(key) for key in keys if key.revoked_s is None])


@post("/edge/v1/keys", opt=needs("admin") | exchanges(KeyRequest), status_code=201)
async def create_key(request: HttpRequest, state: State) -> Response[NewKey]:
    """Make a key; this answer is the only one that has it."""
    body, warnings = parse_body(await request.body(), KeyRequest)
    if warnings:  # a limit that is misspelt would be none
        raise InvalidRequest(f"The key is not made: {warnings[0]}.", hint="See /docs for the fields.")
    made, secret = await asyncio.to_thread(_keys(request, state).create, _limits(body), name=body.name)
    return Response(NewKey(key=secret, info=_info(made)), headers={"cache-control": "no-store"})


@delete("/edge/v1/keys/{name:str}", opt=needs("admin") | exchanges(errors=(KeyNotFound,)), status_code=204)
async def revoke_key(request: HttpRequest, state: State, name: str) -> None:
    """End a key, by its name or id: its next request is refused."""
    await asyncio.to_thread(_keys(request, state).revoke, name)


def _keys(request: HttpRequest, state: State) -> Keys:
    """What changes them; each change is a line of the audit log in the same commit."""
    caller = caller_of(request.scope)
    caller.check_all_models()
    return Keys(appliance_of(state).settings.state_db, actor=str(caller))


def _limits(body: KeyRequest) -> Limits:
    if body.role and body.scopes:
        raise InvalidRequest("Give 'role' or 'scopes', not both.", field="scopes")
    return Limits(
        scopes=parse_scopes(",".join(body.scopes)) if body.scopes is not None else ROLES[body.role or "user"],
        models=tuple(body.models), rpm=body.rpm, tokens_per_day=body.tokens_per_day, priority=body.priority,
    )  # fmt: skip


def _info(key: Key) -> KeyInfo:
    limits = key.limits
    return KeyInfo(
        id=key.id, name=key.name, scopes=[s for s in SCOPES if s in limits.scopes], models=list(limits.models),
        rpm=limits.rpm, tokens_per_day=limits.tokens_per_day, priority=limits.priority, created=key.created_s,
    )  # fmt: skip


HANDLERS = [list_keys, create_key, revoke_key]
