"""A text to continue: its tokens, what of it is left out, the middle that is to be filled in, and its echo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge.errors import InvalidRequest
from runtime import wire
from runtime.images import PlacedTile
from runtime.lengths import Ruler
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer

KEPT_CHARS_PER_TOKEN = 8
"""Of a text that is to be cut, no more than its last so many characters are read for each token of the context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a request, and what is known of how they came to be; see :class:`runtime.request.Request`."""

    tokens: list[TokenId]
    tiles: tuple[PlacedTile, ...] = ()
    echo: str | None = None
    num_dropped: int = 0


class Continuer:
    """Makes prompts of texts and tokens.

    Args:
        bos: What spells the token that begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: str, vocab_size: int, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens
        self._ruler = Ruler(tokenizer, limit_tokens=context_tokens, field="prompt")

    def prompt(self, message: wire.Generate, *, room: int) -> Prompt:
        """The prompt, without its beginning where `truncates` asks for that and it has more than `room` tokens.

        Raises:
            InvalidRequest: A token id is unknown, or the model cannot fill in a middle.
            ContextOverflow: It does not fit the context.
        """
        head, body, num_unread = self._read(message)
        tail: list[TokenId] = []
        if message.suffix is not None:
            head, tail = self._around(head, message.suffix)
        num_over = max(0, len(head) + len(body) + len(tail) - room) if message.truncates else 0
        if num_over and num_over >= len(body):
            raise self._ruler.overflow(len(head) + len(body) + len(tail), self._context_tokens - room)
        body = body[num_over:]
        num_dropped = num_over + num_unread
        return Prompt([*head, *body, *tail], echo=self._echo(message, body, num_dropped), num_dropped=num_dropped)

    def _read(self, message: wire.Generate) -> tuple[list[TokenId], list[TokenId], int]:
        """What begins every text, the tokens of this one, and about how many there are before them."""
        given = message.prompt or ""
        if not isinstance(given, str):
            if bad := [t for t in given if not 0 <= t < self._vocab_size]:
                raise InvalidRequest(f"There is no token {bad[0]}.", field="prompt")
            return [], given, 0
        begin = self._tokenizer.encode("", add_special=True, parse_special=False)
        text = given.removeprefix(self._bos) if message.is_raw and begin else given
        skipped = 0
        if message.truncates:
            skipped = max(0, len(text) - self._context_tokens * KEPT_CHARS_PER_TOKEN)
        else:
            self._ruler.check(text)
        tokens = self._tokenizer.encode(text[skipped:], add_special=True, parse_special=message.is_raw)
        body = tokens[len(begin) :] if tokens[: len(begin)] == begin else tokens
        num_unread = len(body) * skipped // max(1, len(text) - skipped)
        return tokens[: len(tokens) - len(body)], body, num_unread

    def _around(self, head: list[TokenId], suffix: str) -> tuple[list[TokenId], list[TokenId]]:
        """What stands before and behind a text whose continuation shall lead up to `suffix`.

        Source: the order prefix, suffix, middle of Bavarian et al. 2022 (arXiv:2207.14255), as llama.cpp's server has
        it (`format_prompt_infill`).
        """
        if (fim := self._tokenizer.fim_tokens) is None:
            raise InvalidRequest(
                "This model cannot fill in a middle: its vocabulary has no tokens that mark prefix, suffix and middle.",
                field="suffix",
                hint="Models for code often have them.",
            )
        self._ruler.check(suffix)
        before, behind, middle = fim
        tokens = self._tokenizer.encode(suffix, add_special=False, parse_special=False)
        return [*head, before], [behind, *tokens, middle]

    def _echo(self, message: wire.Generate, body: Sequence[TokenId], num_dropped: int) -> str | None:
        """What the prompt says, for who asked."""
        if not message.echoes:
            return None
        if isinstance(message.prompt, str) and not num_dropped:
            return message.prompt
        return b"".join(map(self._tokenizer.piece, body)).decode("utf-8", "replace")
