"""Tools in requests and calls in answers, in OpenAI's shapes; thinking, where a request steers it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from edge.errors import ConstraintFailed, InvalidRequest
from runtime import wire
from runtime.api.json_schema import check_answer, parse_schema
from runtime.api.structured import Structure

MAX_TOOLS = 128
MAX_ARGUMENTS_CHARS = 256 << 10
MAX_ARGUMENTS_DEPTH = 64
MAX_ARGUMENTS_PARTS = 20_000
"""Values in the arguments of all calls of a conversation, which are read while nobody else is answered: some 20 ms."""
_TEXT_OR_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
MAX_OPTIONS_CHARS = 4096
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
_THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that turns thinking on and off."""

ToolName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Id = Annotated[str, msgspec.Meta(max_length=128)]
Arguments = Annotated[str, msgspec.Meta(max_length=MAX_ARGUMENTS_CHARS)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class FunctionField(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: ToolName
    description: Annotated[str, msgspec.Meta(max_length=64 << 10)] | None = None
    parameters: dict[str, object] | None = None
    """The JSON schema of its arguments, an object; without one it takes none."""
    strict: bool | None = None
    """Arguments always obey the schema."""


class ToolField(msgspec.Struct, kw_only=True):
    """One of OpenAI's `tools`."""

    type: Literal["function"] = "function"
    function: FunctionField


class ChosenFunction(msgspec.Struct, kw_only=True):
    """A function by its name."""

    name: ToolName


class ChosenTool(msgspec.Struct, kw_only=True):
    """The function that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | ChosenTool
Tools = Annotated[list[ToolField], msgspec.Meta(max_length=MAX_TOOLS)]


class CalledFunction(msgspec.Struct, kw_only=True):
    """A function and the arguments it was called with, JSON text."""

    name: ToolName
    arguments: Arguments


class ToolCallField(msgspec.Struct, kw_only=True):
    """A call in a message."""

    id: Id = ""
    type: Literal["function"] = "function"
    function: CalledFunction


ToolCalls = Annotated[list[ToolCallField], msgspec.Meta(max_length=MAX_TOOLS)]


def wire_tools(tools: Sequence[ToolField], path: str = "tools") -> tuple[wire.Tool, ...]:
    """Tools as the engine takes them.

    Raises:
        InvalidRequest: A schema is not one that is held, or two tools have one name.
    """
    found = list[wire.Tool]()
    for i, tool in enumerate(tools):
        function = tool.function
        if any(t.name == function.name for t in found):
            field = f"{path}[{i}].function.name"
            raise InvalidRequest(f"'{field}': there are two tools '{function.name}'.", field=field)
        where = f"{path}[{i}].function.parameters"
        found.append(wire.Tool(function.name, function.description or "", _parameters(function.parameters, where)))
    return tuple(found)


def _parameters(schema: Mapping[str, object] | None, path: str) -> str:
    if not schema:
        return ""
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"'{path}.type' has to be \"object\".", field=f"{path}.type")
    return parse_schema(schema, path)


def wire_choice(choice: ToolChoice | None, tools: Sequence[wire.Tool]) -> str:
    """Which tool is to be called, as the engine takes it.

    Raises:
        InvalidRequest: There is no such tool.
    """
    if isinstance(choice, ChosenTool):
        name = choice.function.name
        if all(t.name != name for t in tools):
            path = "tool_choice.function.name"
            raise InvalidRequest(f"'{path}': there is no tool '{name}'.", field=path, hint="Name one of 'tools'.")
        return f"={name}"
    if choice == "required" and not tools:
        raise InvalidRequest("'tool_choice' wants a call, and there are no tools.", field="tool_choice")
    return choice or "auto"


class CallHistory:
    """Takes the calls of one conversation, message by message."""

    def __init__(self) -> None:
        self._num_parts = 0

    def read(self, calls: Sequence[ToolCallField], path: str) -> tuple[wire.ToolCall, ...]:
        """The calls of a message as the engine takes them.

        Raises:
            InvalidRequest: Arguments are no JSON object, or of too many parts with those before.
        """
        for i, call in enumerate(calls):
            self._check(call.function.arguments, f"{path}[{i}].function.arguments")
        return tuple(wire.ToolCall(c.id, c.function.name, c.function.arguments) for c in calls)

    def _check(self, arguments: str, path: str) -> None:
        self._measure(arguments, path)
        try:
            if arguments:
                msgspec.json.decode(arguments, type=dict[str, object])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
            raise InvalidRequest(f"'{path}' is no JSON object: {e}.", field=path) from e

    def _measure(self, arguments: str, path: str) -> None:
        """Count parts and depth before anything is made of them."""
        self._num_parts += 1
        depth = 0
        for found in _TEXT_OR_MARK.finditer(arguments):
            mark = arguments[found.start()]
            self._num_parts += mark in ",[{"
            depth += (mark in "[{") - (mark in "]}")
            if self._num_parts > MAX_ARGUMENTS_PARTS:
                most = f"{MAX_ARGUMENTS_PARTS:,}"
                raise InvalidRequest(f"'{path}': the calls have more than {most} values.", field=path)
            if depth > MAX_ARGUMENTS_DEPTH:
                raise InvalidRequest(f"'{path}' is nested deeper than {MAX_ARGUMENTS_DEPTH}.", field=path)


# ---------------------------------------------------------------- templates and thinking


def template_options(kwargs: Mapping[str, object] | None, effort: ReasoningEffort | None) -> str:
    """Variables for the chat template, as JSON text.

    Raises:
        InvalidRequest: One is none of the template's to set, is no plain value, or they are too many.
    """
    given = dict(kwargs or {})
    path = "chat_template_kwargs"
    for name, value in given.items():
        if name in _RESERVED or not (value is None or isinstance(value, bool | int | float | str)):
            raise InvalidRequest(
                f"'{path}.{name[:64]}' cannot be set.", field=f"{path}.{name[:64]}",
                hint="Texts, numbers, true and false are taken, by the names that the model's template has for them.",
            )  # fmt: skip
    if effort is not None:
        given = dict.fromkeys(_THINKING_SWITCHES, effort != "none") | {"reasoning_effort": effort} | given
    text = json.dumps(given, ensure_ascii=False) if given else ""
    if len(text) > MAX_OPTIONS_CHARS:
        raise InvalidRequest(f"'{path}' has more than {MAX_OPTIONS_CHARS:,} characters.", field=path)
    return text


def unused_options(
    kwargs: Mapping[str, object] | None, effort: ReasoningEffort | None, ready: wire.Ready | None
) -> list[str]:  # fmt: skip
    """What the model's template does not look for, once it is loaded."""
    if ready is None:
        return []
    known = frozenset(ready.template_variables)
    missing = [f"chat_template_kwargs.{name[:64]}" for name in kwargs or () if name not in known]
    if effort is not None and not known & {*_THINKING_SWITCHES, "reasoning_effort"}:
        missing.append("reasoning_effort")
    return [f"{name} has no effect: the model's chat template does not use it" for name in missing]


# ---------------------------------------------------------------- answers


@dataclass(slots=True)
class CallCollector:
    """Puts calls together from their bits."""

    calls: list[wire.ToolCall] = field(default_factory=list[wire.ToolCall])

    def push(self, deltas: Sequence[wire.CallDelta]) -> None:
        """Take what a step gave."""
        for d in deltas:
            if d.index == len(self.calls):
                self.calls.append(wire.ToolCall(d.id, d.name, ""))
            call = self.calls[d.index]
            self.calls[d.index] = wire.ToolCall(call.id, call.name, call.arguments + d.arguments)


@dataclass(frozen=True, slots=True)
class Promise:
    """What is said of an answer, and checked before its end is passed on: its form, and the arguments of its calls."""

    structure: Structure | None = None
    tools: Mapping[str, str] = field(default_factory=dict[str, str])
    """The schemas of arguments, by the tool's name."""

    def check(self, text: str, calls: Sequence[wire.ToolCall], *, is_calling: bool) -> None:
        """Hold a whole answer against it.

        Raises:
            ConstraintFailed: It is not what was said.
        """
        if is_calling and not calls:
            raise ConstraintFailed("The answer ends in the middle of a call.", hint="Leave 'stop' out.")
        for call in calls:
            if call.name not in self.tools:
                raise ConstraintFailed(f"The answer calls a tool that does not exist: '{call.name}'.")
            check_answer(call.arguments, self.tools[call.name] or '{"type":"object"}')
        if self.structure is not None and not calls:
            self.structure.check(text)


async def kept(steps: AsyncGenerator[list[wire.Piece]], promise: Promise) -> AsyncGenerator[list[wire.Piece]]:
    """An answer's steps, of which the last is passed on once the whole is what was promised.

    Raises:
        ConstraintFailed: It ended by itself and is not.
    """
    texts: list[str] = []
    collector = CallCollector()
    async with aclosing(steps):
        async for pieces in steps:
            for p in pieces:
                texts.append(p.text)
                collector.push(p.calls)
            reason = pieces[-1].finish_reason if pieces else None
            if reason in ("stop", "tool_calls"):
                text, is_calling = "".join(texts), reason == "tool_calls"
                await asyncio.to_thread(promise.check, text, collector.calls, is_calling=is_calling)
            yield pieces
