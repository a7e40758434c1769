"""Items of `/v1/responses` as messages of a conversation, and the names that items are kept under."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from edge.errors import InvalidRequest
from runtime.api.openai_schema import ChatMessage, ImagePart, TextPart
from runtime.api.responses_schema import (
    InputImage,
    InputText,
    Item,
    OutputText,
    Part,
    ReasoningText,
    Refusal,
)
from runtime.api.tools import CalledFunction, ToolCallField

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_RESPONSE_ID = re.compile(r"resp_([0-9a-f]{32})")
_ITEM_ID = re.compile(r"(?:msg|fc|fco|rs)_([0-9a-f]{32})_[io][0-9]{1,6}")


def is_response_id(text: str) -> bool:
    """Whether responses are named like this."""
    return _RESPONSE_ID.fullmatch(text) is not None


def item_id(response_id: str, kind: str, number: int, *, is_input: bool) -> str:
    """The name of an item, which tells its response."""
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}_{'i' if is_input else 'o'}{number}"


def response_of(item: str) -> str | None:
    """The response that an item belongs to; None where no item is named like this."""
    found = _ITEM_ID.fullmatch(item)
    return f"resp_{found[1]}" if found else None


def is_reference(item: Item) -> bool:
    """Whether it stands for an item that was kept."""
    is_bare = item.type is None and item.role is None and item.id is not None
    return item.type == "item_reference" or is_bare


def named(items: Sequence[Item], response_id: str) -> list[Item]:
    """What a request brought, as it is kept: under names of ours, contents as lists of parts."""
    kept: list[Item] = []
    for i, item in enumerate(items):
        kind = item.type or "message"
        content = item.content
        if isinstance(content, str):
            content = [OutputText(content) if item.role == "assistant" else InputText(content)]
        name = item_id(response_id, kind, i, is_input=True)
        status = item.status or "completed"
        kept.append(msgspec.structs.replace(item, type=kind, id=name, content=content, status=status))
    return kept


@dataclass(slots=True)
class Messages:
    """A conversation, and where in the request its parts stand: `messages[1]` in `input[4]`."""

    messages: list[ChatMessage] = field(default_factory=list[ChatMessage])
    sources: dict[str, str] = field(default_factory=dict[str, str])
    _called: dict[str, str] = field(default_factory=dict[str, str])
    """The functions that were called, by the calls' names."""

    def add(self, items: Iterable[Item], path: str) -> None:
        """Add what items say.

        Args:
            path: Of the list, as a JSON path.

        Raises:
            InvalidRequest: One of them says nothing that a model here could read.
        """
        for i, item in enumerate(items):
            self._add(item, f"{path}[{i}]")

    def _add(self, item: Item, path: str) -> None:
        match item.type or "message":
            case "message" if item.role == "assistant":
                self._say(item, path)
            case "message":
                self._append(_message(item, path), path)
            case "reasoning":
                self._think(item, path)
            case "function_call" if item.status == "incomplete":
                pass  # it was cut, so it called nothing
            case "function_call":
                self._call(item, path)
            case "function_call_output":
                self._append(self._output(item, path), path)
            case kind:
                raise _not_done(kind, f"{path}.type")

    def _append(self, message: ChatMessage, path: str) -> ChatMessage:
        self.sources[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)
        return message

    def _turn(self, path: str) -> ChatMessage:
        """The model's turn that goes on: what it thought, said and called is one message to it. Else a new one."""
        if self.messages and (last := self.messages[-1]).role == "assistant":
            return last
        return self._append(ChatMessage(role="assistant"), path)

    def _say(self, item: Item, path: str) -> None:
        message = self._turn(path)
        if message.content is not None or message.tool_calls:
            message = self._append(ChatMessage(role="assistant"), path)
        message.content = _content(item.content, f"{path}.content")
        self.sources[f"messages[{len(self.messages) - 1}]"] = path

    def _think(self, item: Item, path: str) -> None:
        """Only what it thought right before the rest of its turn; others' encrypted thoughts are not read."""
        text = "".join(part.text for part in item.content or () if isinstance(part, ReasoningText))
        if not text:
            return
        message = self._turn(path)
        if message.content is not None or message.tool_calls:
            message = self._append(ChatMessage(role="assistant"), path)
        message.reasoning_content = (message.reasoning_content or "") + text

    def _call(self, item: Item, path: str) -> None:
        name, call_id = _needed(item.name, f"{path}.name"), _needed(item.call_id, f"{path}.call_id")
        message = self._turn(path)
        calls = message.tool_calls = message.tool_calls or []
        place = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}].function"
        self.sources[place] = path
        self._called[call_id] = name
        function = CalledFunction(name=name, arguments=item.arguments or "")
        calls.append(ToolCallField(id=call_id, function=function))

    def _output(self, item: Item, path: str) -> ChatMessage:
        call_id = _needed(item.call_id, f"{path}.call_id")
        if call_id not in self._called:
            field = f"{path}.call_id"
            raise InvalidRequest(f"'{field}': no function call '{call_id}' comes before its output.", field=field)
        content = _content(item.output, f"{path}.output")
        return ChatMessage(role="tool", content=content, tool_call_id=call_id, name=self._called[call_id])


def _needed(value: str | None, path: str) -> str:
    if not value:
        raise InvalidRequest(f"'{path}' is missing.", field=path)
    return value


def _message(item: Item, path: str) -> ChatMessage:
    if item.role is None:
        hint = "Roles: system, developer, user, assistant."
        raise InvalidRequest(f"'{path}.role' is missing.", field=f"{path}.role", hint=hint)
    return ChatMessage(role=item.role, content=_content(item.content, f"{path}.content"))


def _content(content: str | list[Part] | None, path: str) -> str | list[TextPart | ImagePart]:
    if isinstance(content, list):
        return [_part(part, f"{path}[{i}]") for i, part in enumerate(content)]
    if content is None:
        raise InvalidRequest(f"'{path}' is missing.", field=path)
    return content


def _part(part: Part, path: str) -> TextPart | ImagePart:
    match part:
        case InputText() | OutputText() | ReasoningText():
            return TextPart(part.text)
        case Refusal():
            return TextPart(part.refusal)
        case InputImage(image_url=str(url)):
            return ImagePart(url)
        case InputImage():
            hint = 'Send the image itself: "image_url": "data:image/png;base64,…".'
            raise InvalidRequest(f"'{path}' has no image_url.", field=f"{path}.image_url", hint=hint)
        case _:
            raise _not_done("input_file", f"{path}.type")


def _not_done(kind: str, path: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{path}': '{kind[:64]}' is not supported by this version.", field=path,
        hint="Items are messages, function calls, their outputs, reasoning, and references to items.",
    )  # fmt: skip
