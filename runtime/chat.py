"""Messages to a prompt: the model's own template, sandboxed, with the texts of users kept text."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from edge.errors import InvalidRequest, UnsupportedFormat
from runtime.json_values import is_list, is_object
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer
from runtime.tool_syntax import SHORT_ID_CHARS
from runtime.wire import ChatMessage, Tool, ToolCall

# A noncharacter (Unicode 16, section 23.7): never in interchanged text, so it can break up what spells a control token.
_BREAK = "\ufdd0"
_IMAGE = "\ufdd1"
"""Around the number of an image in a rendered prompt; another noncharacter."""
MAX_PROMPT_CHARS = 64 << 20

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
"""Marks for training what the assistant says (transformers); nothing else."""
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""What templates call what a message's author thought before it."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template wants the calls of a conversation.

    Attributes:
        arguments_as_text: As JSON text, not as an object.
        short_ids: With ids of nine letters and digits, as Mistral's want them.
    """

    arguments_as_text: bool = False
    short_ids: bool = False

    def id(self, call_id: str) -> str:
        """An id as the template wants it; the same for the same."""
        return (
            hashlib.blake2b(call_id.encode(), digest_size=8).hexdigest()[:SHORT_ID_CHARS] if self.short_ids else call_id
        )


_PLAIN = CallStyle()


class ChatTemplate:
    """A model's chat template, compiled once.

    Templates come with models, from anywhere: they run in Jinja's immutable sandbox, which stops them from reaching
    Python (CVE-2024-34359), inside the worker, which is killed where one does not end.

    Attributes:
        variables: What it looks for beside messages and tools.

    Raises:
        UnsupportedFormat: The template does not compile.
    """

    def __init__(self, source: str, *, markers: Sequence[str], bos: str = "", eos: str = "") -> None:
        from jinja2.exceptions import TemplateError
        from jinja2.meta import find_undeclared_variables
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        source = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", source)
        environment.globals["raise_exception"] = _raise  # pyright: ignore[reportArgumentType]  # jinja types globals too narrowly
        environment.globals["strftime_now"] = _now  # pyright: ignore[reportArgumentType]  # as above
        environment.filters["tojson"] = _tojson
        environment.filters["from_json"] = json.loads
        self.source = source
        self._markers = tuple(m for m in markers if len(m) > 1)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._reasoning_names = [n for n in _REASONING_NAMES if re.search(rf"\.{n}\b|['\"]{n}['\"]", source)]
        try:
            parsed = environment.parse(source)
            self.variables = sorted(find_undeclared_variables(parsed) - _GIVEN)
            self._template = environment.from_string(parsed)
        except (TemplateError, RecursionError, MemoryError, SyntaxError) as e:
            raise UnsupportedFormat(f"The model's chat template does not compile: {str(e) or type(e).__name__}.") from e

    def render(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] = (),
        options: Mapping[str, object] | None = None, style: CallStyle = _PLAIN, add_generation_prompt: bool = True,
    ) -> str:  # fmt: skip
        """The prompt's text, in which only the template's own markers spell control tokens; see `split_images`.

        Args:
            options: Further variables for it.

        Raises:
            InvalidRequest: The template refuses these messages.
        """
        given = {k: self._defused(v) for k, v in (options or {}).items()}
        given["add_generation_prompt"] = add_generation_prompt
        if tools:
            given["tools"] = [self._tool(tool) for tool in tools]
        return self._render([self._turn(m, style, as_parts=self._wants_parts) for m in messages], given)

    def guard(self, markers: Iterable[str]) -> None:
        """Keep texts from spelling these markers, too."""
        self._markers = tuple(dict.fromkeys([*self._markers, *(m for m in markers if len(m) > 1)]))

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a content that is a text gets lost: some templates of models that see look for parts only."""
        said = self._turn(ChatMessage("user", "lighthouse"), _PLAIN, as_parts=False)
        try:
            return "lighthouse" not in self._render([said], {"add_generation_prompt": True})
        except InvalidRequest:
            return False

    def _render(self, turns: Sequence[Mapping[str, object]], given: Mapping[str, object]) -> str:
        try:
            text = self._template.render({**given, **self._tokens, "messages": turns})
        except InvalidRequest:  # its own, by `raise_exception`
            raise
        except Exception as e:  # a template is a program of others: it may raise anything, as its helpers do
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(e) or type(e).__name__}.",
                field="messages",
                hint="Check the roles and their order.",
            ) from e
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidRequest("The model's chat template makes too long a text.", field="messages")
        return text

    def _turn(self, message: ChatMessage, style: CallStyle, *, as_parts: bool) -> dict[str, object]:
        """A message as templates read it. What a message has not is not there: some ask for no more than that."""
        text = self._content(message.content)
        turn: dict[str, object] = {
            "role": self._defuse(message.role), "content": [{"type": "text", "text": text}] if as_parts else text
        }  # fmt: skip
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call, style) for call in message.tool_calls]
        if message.tool_call_id:
            turn["tool_call_id"] = style.id(self._defuse(message.tool_call_id))
        if message.name:
            turn["name"] = self._defuse(message.name)
        if message.reasoning:
            turn |= dict.fromkeys(self._reasoning_names, self._defuse(message.reasoning))
        return turn

    def _call(self, call: ToolCall, style: CallStyle) -> dict[str, object]:
        arguments = self._defused(json.loads(call.arguments or "{}"))
        written = _tojson(arguments) if style.arguments_as_text else arguments
        function = {"name": self._defuse(call.name), "arguments": written}
        return {"type": "function", "id": style.id(self._defuse(call.id)), "function": function}

    def _tool(self, tool: Tool) -> dict[str, object]:
        schema: dict[str, object] = {"type": "object", "properties": {}}
        schema |= json.loads(tool.parameters or "{}")
        function = {
            "name": tool.name,
            "description": self._defuse(tool.description),
            "parameters": self._defused(schema),
        }
        return {"type": "function", "function": function}

    def _content(self, content: str | list[str | int]) -> str:
        if isinstance(content, str):
            return self._defuse(content)
        runs = groupby(content, key=lambda part: isinstance(part, str))  # no marker is spelled across parts
        return "".join(
            self._defuse("".join(map(str, run))) if is_text else "".join(f"{_IMAGE}{c}{_IMAGE}" for c in run)
            for is_text, run in runs
        )

    def _defused(self, value: object) -> object:
        """A value of JSON with all texts in it."""
        if isinstance(value, str):
            return self._defuse(value)
        if is_object(value):
            return {self._defuse(k): self._defused(v) for k, v in value.items()}
        return [self._defused(v) for v in value] if is_list(value) else value

    def _defuse(self, text: str) -> str:
        text = text.replace(_BREAK, "\ufffd").replace(_IMAGE, "\ufffd")
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + _BREAK + marker[1:])
        return text


def split_images(text: str, *, num_images: int) -> list[str]:
    """The texts before, between and behind the images of a rendered prompt.

    Raises:
        InvalidRequest: The template lost an image, or turned their order.
    """
    texts = re.split(f"{_IMAGE}([0-9]+){_IMAGE}", text)
    if texts[1::2] != [str(i) for i in range(num_images)]:
        raise InvalidRequest("The model's chat template does not leave the images in their places.", field="messages")
    return texts[::2]


def without_breaks(text: str) -> str:
    """A rendered prompt for people: what the user wrote is as he wrote it, and an image is llama-server's marker."""
    return re.sub(f"{_IMAGE}[0-9]+{_IMAGE}", "<__media__>", text).replace(_BREAK, "")


def encode_prompt(tokenizer: Tokenizer, text: str, *, is_first: bool = True) -> list[TokenId]:
    """Tokens of a rendered prompt, or of what follows an image in it. A text of the user that spells a control token
    becomes plain text."""
    first, *rest = text.split(_BREAK)
    tokens = tokenizer.encode(first, add_special=is_first, parse_special=True)
    for part in rest:
        tokens += tokenizer.encode(part, add_special=False, parse_special=True)
    return tokens


def _raise(message: str) -> None:
    raise InvalidRequest(f"The model's chat template refuses these messages: {message}.", field="messages")


def _now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers' templates have it. What keeps a marker apart stays what it is, and is no escape."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace("\\ufdd0", _BREAK).replace("\\ufdd1", _IMAGE) if ensure_ascii else text
