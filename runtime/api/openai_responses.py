"""OpenAI's `/v1/responses`: answers of typed items, kept on the device so that they can be gone on from."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from litestar import Response, delete, get, post
from litestar.datastructures import State
from litestar.params import Parameter

from edge.errors import EdgeError, InvalidRequest, ResponseNotFound, StoreError
from runtime import wire
from runtime.api import sse
from runtime.api.access import needs
from runtime.api.appliance import appliance_of
from runtime.api.call import Call, HttpRequest, Steps, merged, usage_of
from runtime.api.describe import EVENTS, Errors, exchanges
from runtime.api.errors import fault_of
from runtime.api.guard import meter_of
from runtime.api.openai import start_chat, warning_headers, whole_answers
from runtime.api.parsing import MAX_WARNINGS, check_items, parse_body
from runtime.api.responses import EventStream
from runtime.api.responses_chat import begun, chat_request, fill_in, named_as_sent
from runtime.api.responses_events import Composer
from runtime.api.responses_items import Messages, named
from runtime.api.responses_kept import Kept
from runtime.api.responses_schema import (
    DeletedResponse,
    FunctionTool,
    Item,
    ItemList,
    ResponseObject,
    ResponsesRequest,
)
from runtime.api.tools import unused_options

_KEPT: Errors = (ResponseNotFound, StoreError)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request for a response.

    Attributes:
        items: What it brought, references resolved.
        warnings: What was left out of account, whatever the model.
    """

    kept: Kept
    body: ResponsesRequest
    items: list[Item]
    warnings: list[str]

    async def messages(self) -> Messages:
        """All that the model is to read."""
        found, body = Messages(), self.body
        if body.instructions is not None:
            found.add([Item(role="system", content=body.instructions)], "instructions")
        if (previous := body.previous_response_id) is not None:
            field = "previous_response_id"
            found.add(await self.kept.conversation(previous, field=field, with_answer=True), field)
        found.add(self.items, "input")
        return found

    def warnings_of(self, call: Call) -> list[str]:
        """Those, and what its model leaves out of account, once that is loaded."""
        effort = self.body.reasoning.effort if self.body.reasoning is not None else None
        unused = unused_options(None, effort, call.host.ready if call.host is not None else None)
        return [*self.warnings, *(w.replace("reasoning_effort", "reasoning.effort") for w in unused)]

    async def end(self, composer: Composer, reason: str, calls: Sequence[Call]) -> list[str]:
        """End the answer, and keep it before anybody is told; all that is to be warned of."""
        composer.end(reason, usage_of(calls), completed_at=int(time.time()))
        response, warnings = composer.response, self.warnings_of(calls[0])
        fill_in(response, calls[0], warnings)
        if response.store and (problem := await self.kept.keep(response, named(self.items, response.id))) is not None:
            response.store = False
            warnings.append(f"the response was not stored: {problem}")
            response.warnings = warnings
        composer.tell_end()
        return warnings


@post("/v1/responses", opt=needs("chat") | exchanges(ResponsesRequest, streams=EVENTS, errors=_KEPT), status_code=200)
async def create_response(request: HttpRequest, state: State) -> Response[ResponseObject] | EventStream:
    """Answer a conversation, and keep the answer."""
    asked = await _read(request, state)
    messages = await asked.messages()
    with named_as_sent(messages.sources):
        chat = chat_request(asked.body, messages.messages)
        calls, streams = await start_chat(request, state, chat)
    calls[0].id = f"resp_{secrets.token_hex(16)}"
    warnings = asked.warnings_of(calls[0])
    composer = Composer(begun(asked.body, calls[0], warnings))
    if asked.body.stream:
        events = _events(asked, composer, calls, streams)
        headers = warning_headers(warnings)
        return EventStream(events, on_close=lambda: calls[0].finish(None), headers=headers)
    (answer,) = await whole_answers(request, calls, streams)
    calls_made = [wire.CallDelta(i, c.id, c.name, c.arguments) for i, c in enumerate(answer.calls)]
    composer.add(answer.text, answer.logprobs, reasoning=answer.reasoning, calls=calls_made)
    warnings = await asked.end(composer, answer.reason, calls)
    return Response(composer.response, headers=warning_headers(warnings))


async def _read(request: HttpRequest, state: State) -> _Asked:
    content = await request.body()
    body, warnings = parse_body(content, ResponsesRequest)
    body.check()
    warnings += body.warnings()
    if body.tools:
        check_items(content, "tools", _TOOL_FIELDS, frozenset())
    kept = _kept(request, state)
    if isinstance(body.input, str):
        return _Asked(kept, body, [Item(role="user", content=body.input)], warnings)
    check_items(content, "input", _ITEM_FIELDS, frozenset())
    return _Asked(kept, body, await kept.resolved(body.input), warnings)


_ITEM_FIELDS = frozenset(f.encode_name for f in msgspec.structs.fields(Item))
_TOOL_FIELDS = frozenset(f.encode_name for f in msgspec.structs.fields(FunctionTool))


async def _events(
    asked: _Asked, composer: Composer, calls: Sequence[Call], streams: Sequence[Steps]
) -> AsyncGenerator[bytes]:
    """The stream of the answer. What goes wrong after the first byte is an event, since the status is spent."""
    error: BaseException | None = None
    try:
        composer.begin()
        yield composer.take()
        async for _, pieces in merged(streams):
            for p in pieces:
                composer.add(p.text, p.logprobs, reasoning=p.reasoning, calls=p.calls)
                if p.finish_reason:
                    await asked.end(composer, p.finish_reason, calls)
            if out := composer.take() if pieces else sse.PING:
                yield out
    except EdgeError as e:
        error = e
        fill_in(composer.response, calls[0], asked.warnings_of(calls[0]))
        composer.fail(fault_of(e))
        yield composer.take()
    except BaseException as e:
        error = e
        raise
    finally:
        calls[0].finish(error)


def _kept(request: HttpRequest, state: State) -> Kept:
    appliance = appliance_of(state)
    return Kept(appliance.responses, meter_of(request.scope), appliance.settings.max_body_bytes)


# ---------------------------------------------------------------- what was kept


@get("/v1/responses/{response_id:str}", opt=needs("chat") | exchanges(errors=_KEPT))
async def get_response(
    request: HttpRequest, state: State, response_id: str, stream: bool = False
) -> Response[ResponseObject]:
    """A kept response."""
    if stream:
        raise InvalidRequest("A kept response is not streamed again.", field="stream", hint="Get it whole.")
    response = await _kept(request, state).get(response_id)
    return Response(response, headers=_query_warnings(request, "stream"))


@delete("/v1/responses/{response_id:str}", opt=needs("chat") | exchanges(errors=_KEPT), status_code=200)
async def delete_response(request: HttpRequest, state: State, response_id: str) -> DeletedResponse:
    """Forget a response. What was gone on from it can still be read, and no longer gone on from."""
    await _kept(request, state).delete(response_id)
    return DeletedResponse(id=response_id)


@post("/v1/responses/{response_id:str}/cancel", opt=needs("chat") | exchanges(errors=_KEPT), status_code=200)
async def cancel_response(request: HttpRequest, state: State, response_id: str) -> ResponseObject:
    """Refuse: only what runs in the background is cancelled, and nothing does. Who goes away cancels his request."""
    await _kept(request, state).get(response_id)
    raise InvalidRequest(
        f"The response '{response_id}' was not made in the background, and is over.", hint="Nothing is left to cancel."
    )


@get("/v1/responses/{response_id:str}/input_items", opt=needs("chat") | exchanges(errors=_KEPT))
async def input_items(
    request: HttpRequest,
    state: State,
    response_id: str,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str, Parameter(max_length=128)] | None = None,
    limit: Annotated[int, Parameter(ge=1, le=100)] = 20,
) -> Response[ItemList]:
    """What a response answered: the whole conversation before it, also that of earlier responses."""
    items = await _kept(request, state).conversation(response_id, with_answer=False)
    if order == "desc":
        items.reverse()
    first = 0
    if after is not None:
        first = next((i for i, item in enumerate(items, 1) if item.id == after), 0)
        if not first:
            raise InvalidRequest(f"There is no item '{after}' among them.", field="after")
    page = items[first : first + limit]
    found = ItemList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=first + limit < len(items),
    )
    return Response(found, headers=_query_warnings(request, "order", "after", "limit"))


def _query_warnings(request: HttpRequest, *known: str) -> dict[str, str]:
    """The header that lists parameters that were left out of account."""
    names = {name.removesuffix("[]") for name in request.query_params} - set(known)
    return warning_headers([f"the parameter '{name[:64]}' has no effect" for name in sorted(names)][:MAX_WARNINGS])


HANDLERS = [create_response, get_response, delete_response, cancel_response, input_items]
