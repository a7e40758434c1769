"""Messages to a prompt: the model's own template, sandboxed, with the texts of users kept text."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from edge.errors import InvalidRequest, UnsupportedFormat
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer

# A noncharacter (Unicode 16, section 23.7): never in interchanged text, so it can break up what spells a control token.
_BREAK = "\ufdd0"
_IMAGE = "\ufdd1"
"""Around the number of an image in a rendered prompt; another noncharacter."""
MAX_PROMPT_CHARS = 64 << 20

Content = str | list[str | int]
"""Of a message: a text, or texts and the numbers of images, counted through the conversation."""
Messages = Sequence[tuple[str, Content]]
"""Roles and contents."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A model's chat template, compiled once.

    Templates come with models, from anywhere: they run in Jinja's immutable sandbox, which stops them from reaching
    Python (CVE-2024-34359), inside the worker, which is killed where one does not end.

    Raises:
        UnsupportedFormat: The template does not compile.
    """

    def __init__(self, source: str, *, markers: Sequence[str], bos: str = "", eos: str = "") -> None:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise  # pyright: ignore[reportArgumentType]  # jinja types globals too narrowly
        environment.globals["strftime_now"] = _now  # pyright: ignore[reportArgumentType]  # as above
        environment.filters["tojson"] = _tojson
        self._markers = tuple(m for m in markers if len(m) > 1)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError) as e:
            raise UnsupportedFormat(f"The model's chat template does not compile: {str(e) or type(e).__name__}.") from e

    def render(self, messages: Messages) -> str:
        """The prompt's text, in which only the template's own markers spell control tokens; see `split_images`.

        Raises:
            InvalidRequest: The template refuses these messages.
        """
        safe = [(self._defuse(role), self._content(content)) for role, content in messages]
        return self._render(safe, as_parts=self._wants_parts)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a content that is a text gets lost: some templates of models that see look for parts only."""
        try:
            return "lighthouse" not in self._render([("user", "lighthouse")], as_parts=False)
        except InvalidRequest:
            return False

    def _render(self, messages: Sequence[tuple[str, str]], *, as_parts: bool) -> str:
        from jinja2.exceptions import TemplateError

        given = [{"role": r, "content": [{"type": "text", "text": c}] if as_parts else c} for r, c in messages]
        try:
            text = self._template.render(messages=given, add_generation_prompt=True, **self._tokens)
        except (
            TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
            MemoryError,
        ) as e:  # fmt: skip
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(e) or type(e).__name__}.",
                field="messages",
                hint="Check the roles and their order.",
            ) from e
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidRequest("The model's chat template makes too long a text.", field="messages")
        return text

    def _content(self, content: Content) -> str:
        if isinstance(content, str):
            return self._defuse(content)
        return "".join(self._defuse(c) if isinstance(c, str) else f"{_IMAGE}{c}{_IMAGE}" for c in content)

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


def _tojson(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
