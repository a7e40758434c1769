"""Messages to a prompt: the model's own template, sandboxed, with the texts of users kept text."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from edge.errors import InvalidRequest, UnsupportedFormat
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer

# A noncharacter (Unicode 16, section 23.7): never in interchanged text, so it can break up what spells a control token.
_BREAK = "\ufdd0"
MAX_PROMPT_CHARS = 64 << 20

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
            raise UnsupportedFormat(f"The model's chat template does not compile: {e or type(e).__name__}.") from e

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt's text, in which only the template's own markers spell control tokens.

        Raises:
            InvalidRequest: The template refuses these messages.
        """
        from jinja2.exceptions import TemplateError

        safe = [{k: self._defuse(v) for k, v in m.items()} for m in messages]
        try:
            text = self._template.render(messages=safe, add_generation_prompt=True, **self._tokens)
        except (
            TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
            MemoryError,
        ) as e:  # fmt: skip
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {e or type(e).__name__}.",
                field="messages",
                hint="Check the roles and their order.",
            ) from e
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidRequest("The model's chat template makes too long a text.", field="messages")
        return text

    def _defuse(self, text: str) -> str:
        text = text.replace(_BREAK, "\ufffd")
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + _BREAK + marker[1:])
        return text


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[TokenId]:
    """Tokens of a rendered prompt. A text of the user that spells a control token becomes plain text."""
    first, *rest = text.split(_BREAK)
    tokens = tokenizer.encode(first, add_special=True, parse_special=True)
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
