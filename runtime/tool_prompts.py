"""Conversations with tools and thinking, for any chat template: what it knows is left to it, the rest is told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import msgspec

from edge.errors import InvalidRequest
from runtime.chat import CallStyle, ChatTemplate
from runtime.tool_grammar import can_be_tagged
from runtime.tool_parser import Thinking
from runtime.tool_syntax import LONG_IDS, OURS, SampleCall, ToolSyntax, find_syntax
from runtime.wire import ChatMessage, Tool, ToolCall

_THINKING = (
    Thinking("[THINK]", "[/THINK]"),
    Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
    Thinking("<|channel>thought", "<channel|>"),
    Thinking("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""Markers that are no pair of tags, as the templates of llama.cpp have them."""
_THINKING_TAG = re.compile(r"</((?:[a-z]+:)?think(?:ing)?(?::[\w-]+)?)>")
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_RESPONSE_TAG = re.compile(r"<(/?tool_response>)")
_ASKED, _SAID, _RESULT, _THOUGHT = "lighthouse", "harbour", "seagull", "driftwood"
_SAMPLE = Tool(
    "otter_swim", "Swims.", '{"type":"object","properties":{"pace":{"type":"string","description":"Pace."}}}'
)

_CALLING = """You may call tools. Here they are, one in a line:
{tools}

To call a tool, answer in this form and no other, once for each call:
<tool_call>
{{"name": "its name", "arguments": {{its arguments, an object that obeys its parameters}}}}
</tool_call>
What a tool gives comes back between <tool_response> and </tool_response>. When no tool is of use, answer in words."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation as the model gets it, and how to read what it says next.

    Attributes:
        syntax: How it calls; None where it has no tools to call.
        thinking: How it marks what it thinks; None where it does not.
        is_thinking: Whether the prompt begins that for it.
        may_think: Whether it may begin it itself.
    """

    text: str
    syntax: ToolSyntax | None
    thinking: Thinking | None
    is_thinking: bool
    may_think: bool


@dataclass(frozen=True, slots=True)
class _Native:
    syntax: ToolSyntax
    style: CallStyle


class ToolPrompts:
    """Makes prompts by one chat template.

    Args:
        ends: Texts of the tokens that end an answer.
    """

    def __init__(self, template: ChatTemplate, *, ends: Sequence[str]) -> None:
        self.template = template
        self._ends = [e for e in ends if e]
        if self.thinking is not None:
            template.guard((self.thinking.start, self.thinking.end))

    @property
    def syntax(self) -> ToolSyntax:
        """How the model calls tools: as its template has it, or as we tell it."""
        return self._native.syntax if self._native is not None else OURS

    @property
    def style(self) -> CallStyle:
        """How the template wants calls."""
        return self._native.style if self._native is not None else CallStyle()

    @property
    def knows_tools(self) -> bool:
        """Whether the template itself does."""
        return self._native is not None

    def dialogue(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], *, options: Mapping[str, object],
        or_schema: bool = False,
    ) -> Dialogue:  # fmt: skip
        """A conversation.

        Args:
            tools: What the model is told it may call.
            or_schema: The answer is to obey a schema where it calls nothing.

        Raises:
            InvalidRequest: The template refuses it.
        """
        messages = [self._apart(m) for m in paired(messages)]
        has_calls = bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
        native = self._native if has_calls else None
        if native is not None and not _suits(native.syntax, tools, or_schema=or_schema):
            native = None
        if native is not None:
            text = self.template.render(messages, tools=tools, options=options, style=native.style)
        else:
            text = self.template.render(self._told(messages, tools) if has_calls else messages, options=options)
        return self._dialogue(text, (native.syntax if native else OURS) if tools else None)

    def _dialogue(self, text: str, syntax: ToolSyntax | None) -> Dialogue:
        thinking = self.thinking
        if thinking is None:
            return Dialogue(text, syntax, None, is_thinking=False, may_think=False)
        tail = text.rstrip()
        return Dialogue(
            text, syntax, thinking, is_thinking=tail.endswith(thinking.start), may_think=not tail.endswith(thinking.end)
        )

    def _apart(self, message: ChatMessage) -> ChatMessage:
        """An answer of before with what was thought in it put apart, as templates want it."""
        content, thinking = message.content, self.thinking
        if message.role != "assistant" or message.reasoning or thinking is None or not isinstance(content, str):
            return message
        head, end, rest = content.partition(thinking.end)
        if not end or not head.lstrip().startswith(thinking.start):
            return message
        thought = head.lstrip().removeprefix(thinking.start).strip()
        return msgspec.structs.replace(message, content=rest.lstrip(), reasoning=thought)

    # ------------------------------------------------------------------ what the template knows

    @cached_property
    def thinking(self) -> Thinking | None:
        """How the model marks what it thinks; None where its template knows nothing of it."""
        source = self.template.source
        if (found := next((t for t in _THINKING if t.end in source), None)) is not None:
            return found
        thought = ChatMessage("assistant", _SAID, reasoning=_THOUGHT)
        if tag := _THINKING_TAG.search(source + self._try([_user(), thought])):
            return Thinking(f"<{tag[1]}>", f"</{tag[1]}>")
        return None

    def _try(self, messages: Sequence[ChatMessage], *, prompts: bool = False) -> str:
        """A conversation as the template has it; empty where it refuses it."""
        try:
            return self.template.render(messages, add_generation_prompt=prompts)
        except InvalidRequest:
            return ""

    @cached_property
    def _native(self) -> _Native | None:
        if _SAMPLE.name not in self._try_sample():
            return None
        styles = [CallStyle(t, short_ids=s) for s in (False, True) for t in (False, True)]
        for takes_tagged in (False, True):
            for style in styles:
                found = self._find(style)
                if found is not None and bool(found.tagged) == takes_tagged:
                    shown = [*found.texts(), self._with_result(style), self._try_sample()]
                    self.template.guard(m for text in shown for m in _MARKER.findall(text))
                    return _Native(found, style)
        return None

    def _try_sample(self) -> str:
        try:
            return self.template.render([_user()], tools=[_SAMPLE])
        except InvalidRequest:
            return ""

    def _find(self, style: CallStyle) -> ToolSyntax | None:
        """The template's own syntax where it takes calls in this style, and results of them."""
        ids = [style.id(i) for i in LONG_IDS]

        def render(calls: Sequence[SampleCall]) -> str:
            given = tuple(ToolCall(LONG_IDS[ids.index(c.id)], c.name, json.dumps(c.arguments)) for c in calls)
            return self._behind_user([ChatMessage("assistant", "", tool_calls=given)], style)

        thinking_end = self.thinking.end if self.thinking is not None else ""
        try:
            plain = self._behind_user([ChatMessage("assistant", _SAID)], style)
            end = plain.partition(_SAID)[2].strip()
            syntax = find_syntax(
                render, header=self._behind_user([], style, prompts=True), plain=plain, ids=ids,
                ends=[*self._ends, end] if end else self._ends, thinking_end=thinking_end,
            )  # fmt: skip
            return syntax if syntax is not None and _RESULT in self._with_result(style) else None
        except InvalidRequest:
            return None

    def _behind_user(self, messages: Sequence[ChatMessage], style: CallStyle, *, prompts: bool = False) -> str:
        text = self.template.render(
            [_user(), *messages], tools=[_SAMPLE], style=style, add_generation_prompt=prompts
        )  # fmt: skip
        return text.rpartition(_ASKED)[2]

    def _with_result(self, style: CallStyle) -> str:
        """A call and its result, with what the template puts around them."""
        call = ToolCall(LONG_IDS[0], _SAMPLE.name, '{"pace": "slow"}')
        result = ChatMessage("tool", _RESULT, tool_call_id=call.id, name=call.name)
        return self._behind_user([ChatMessage("assistant", "", tool_calls=(call,)), result], style, prompts=True)

    @cached_property
    def _takes_system(self) -> bool:
        return _SAID in self._try([ChatMessage("system", _SAID), _user()], prompts=True)

    # ------------------------------------------------------------------ what it does not know

    def _told(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
        """A conversation with tools in words that every template knows."""
        told = list[ChatMessage]()
        for message in messages:
            one = _in_words(message)
            if told and one.role == "user" and told[-1].role == "user":  # some templates want users to take turns
                one = msgspec.structs.replace(one, content=_joined(told.pop().content, one.content))
            told.append(one)
        return self._with_tools(told, tools) if tools else told

    def _with_tools(self, messages: list[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
        text = _CALLING.format(tools="\n".join(map(_line_of, tools)))
        role = "system" if self._takes_system else "user"
        first = next((i for i, m in enumerate(messages) if m.role == role), None)
        if first is None or (role == "system" and first):
            return [ChatMessage(role, text), *messages]
        content = messages[first].content
        both = _joined(content, text) if role == "system" else _joined(text, content)
        messages[first] = msgspec.structs.replace(messages[first], content=both)
        return messages


def paired(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Results of tools with the id and the name of the call they answer: by the id, else by the name, else in order."""
    open_calls, found = list[ToolCall](), list[ChatMessage]()
    for message in messages:
        if message.tool_calls:
            open_calls = list(message.tool_calls)
        if message.role == "tool" and (call := _answered(message, open_calls)) is not None:
            open_calls.remove(call)
            message = msgspec.structs.replace(message, tool_call_id=call.id, name=call.name)  # the paired one
        found.append(message)
    return found


def _answered(message: ChatMessage, calls: Sequence[ToolCall]) -> ToolCall | None:
    if message.tool_call_id:
        return next((c for c in calls if c.id == message.tool_call_id), None)
    return next((c for c in calls if not message.name or c.name == message.name), None)


def _suits(syntax: ToolSyntax, tools: Sequence[Tool], *, or_schema: bool) -> bool:
    """Whether these tools can be called in a syntax."""
    if syntax.at_start and or_schema:
        return False  # both would begin alike
    return syntax.tagged is None or all(map(can_be_tagged, tools))


def _in_words(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", _joined("<tool_response>", _within(message.content), "</tool_response>"))
    if not message.tool_calls:
        return message
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(c.name)}, "arguments": {c.arguments or "{}"}}}\n</tool_call>'
        for c in message.tool_calls
    ]
    content = [message.content] if message.content else []
    return ChatMessage("assistant", _joined(*content, *calls), reasoning=message.reasoning)


def _within(content: str | list[str | int]) -> str | list[str | int]:
    """What a tool gave, in which nothing ends or begins a result. Between its parts there is no marker either."""
    if isinstance(content, str):
        return _RESPONSE_TAG.sub(r"< \1", content)
    runs = groupby(content, key=lambda part: isinstance(part, str))
    parts = ([_RESPONSE_TAG.sub(r"< \1", "".join(map(str, run)))] if is_text else list(run) for is_text, run in runs)
    return [part for run in parts for part in run]


def _joined(*contents: str | list[str | int]) -> str | list[str | int]:
    """Contents one in a line."""
    parts: list[str | int] = []
    for content in contents:
        parts += ["\n"] if parts else []
        parts += [content] if isinstance(content, str) else content
    texts = [p for p in parts if isinstance(p, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _line_of(tool: Tool) -> str:
    function: dict[str, object] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    return json.dumps(function | {"parameters": json.loads(tool.parameters or "{}")}, ensure_ascii=False)


def _user() -> ChatMessage:
    return ChatMessage("user", _ASKED)
