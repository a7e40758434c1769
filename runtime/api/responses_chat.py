"""A request of `/v1/responses` as the chat that it asks for, and as the response that it begins."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import msgspec

from edge.errors import InvalidRequest
from runtime.api.call import Call
from runtime.api.openai_schema import ChatMessage, ChatRequest
from runtime.api.responses_schema import (
    FunctionTool,
    ReasoningField,
    ResponseObject,
    ResponsesRequest,
    TextField,
    TextFormat,
    ToolChoice,
)
from runtime.api.structured import JsonSchema, ResponseFormat
from runtime.api.tools import ChosenFunction, ChosenTool, FunctionField, ToolField
from runtime.api.tools import ToolChoice as ChatToolChoice

_NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "tool_choice.function": "tool_choice",
}
"""What chat completions call a field, and what it is called here."""
_MESSAGE = re.compile(r"messages\[[0-9]+\](?:\.tool_calls\[[0-9]+\]\.function)?")
_TOOL = re.compile(r"(tools\[[0-9]+\])\.function")


def chat_request(body: ResponsesRequest, messages: list[ChatMessage]) -> ChatRequest:
    """The chat.

    Raises:
        InvalidRequest: There is nothing to answer, or a form without its schema.
    """
    if not messages:
        raise InvalidRequest("'input' has nothing to answer.", field="input", hint="Send a message.")
    tools, choice = _tools(body)
    return ChatRequest(
        model=body.model,
        messages=messages,
        stream=body.stream,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stop,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        priority=body.priority,
        timeout_s=body.timeout_s,
        lora=body.lora,
        prompt_cache_key=body.prompt_cache_key,
        response_format=_format((body.text or TextField()).format),
        logprobs=body.wants_logprobs or None,
        top_logprobs=body.top_logprobs if body.wants_logprobs else None,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


def _tools(body: ResponsesRequest) -> tuple[list[ToolField] | None, ChatToolChoice | None]:
    """The functions that may be called, and whether one has to be."""
    tools = [_tool(tool) for tool in body.tools or ()]
    match body.tool_choice:
        case ToolChoice(type="function", name=str(name)):
            return tools, ChosenTool(type="function", function=ChosenFunction(name=name))
        case ToolChoice(type="allowed_tools", mode=mode, tools=[*allowed]):
            names = {tool.name for tool in allowed}
            if unknown := names - {tool.function.name for tool in tools}:
                field, name = "tool_choice.tools", unknown.pop()
                raise InvalidRequest(
                    f"'{field}': there is no tool {name!r}.", field=field, hint="Name those of 'tools'."
                )
            return [tool for tool in tools if tool.function.name in names], mode or "auto"
        case ToolChoice():
            hint = "Send none, auto, required, or a function's name."
            kind = body.tool_choice.type
            raise InvalidRequest(f"'tool_choice': {kind!r} is not done.", field="tool_choice", hint=hint)
        case choice:
            return tools or None, choice


def _tool(tool: FunctionTool) -> ToolField:
    assert tool.name is not None, "checked"
    function = FunctionField(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return ToolField(function=function)


def _format(asked: TextFormat) -> ResponseFormat:
    if asked.type != "json_schema":
        return ResponseFormat(type=asked.type)
    if asked.schema is msgspec.UNSET:
        raise InvalidRequest("'text.format.schema' is missing.", field="text.format.schema")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=asked.schema))


def begun(body: ResponsesRequest, call: Call, warnings: list[str]) -> ResponseObject:
    """The response as it is when the engine has accepted the request, or a stream begins that waits for that."""
    response = ResponseObject(
        id=call.id,
        created_at=call.created,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=call.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=body.reasoning or ReasoningField(),
        safety_identifier=body.safety_identifier,
        store=body.store is not False,
        temperature=body.temperature,
        text=body.text or TextField(),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
    fill_in(response, call, warnings)
    return response


def fill_in(response: ResponseObject, call: Call, warnings: list[str]) -> None:
    """Tell what the model's package says where the request does not, as far as the model is loaded yet."""
    response.model = call.model
    if call.host is not None:
        response.temperature, response.top_p = call.params.temperature, call.params.top_p
    response.warnings = warnings or msgspec.UNSET


@contextmanager
def named_as_sent(sources: Mapping[str, str]) -> Generator[None]:
    """Name fields in errors as this endpoint's requests name them.

    Args:
        sources: Where messages came from, by their paths.
    """
    try:
        yield
    except InvalidRequest as e:
        if e.field is not None and (name := _as_sent(e.field, sources)) != e.field:
            e.message = e.message.replace(f"'{e.field}'", f"'{name}'")
            e.field = name
        raise


def _as_sent(field: str, sources: Mapping[str, str]) -> str:
    if found := _MESSAGE.match(field):
        return sources.get(found[0], found[0]) + field[found.end() :]
    if found := _TOOL.match(field):
        return found[1] + field[found.end() :]
    old = next((n for n in _NAMES if field == n or field.startswith((f"{n}.", f"{n}["))), None)
    return field if old is None else _NAMES[old] + field[len(old) :]
