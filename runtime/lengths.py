"""How many tokens a text has, without tokenizing what cannot fit: that of megabytes takes seconds."""

from __future__ import annotations

from edge.errors import ContextOverflow
from runtime.tokenizer import Tokenizer

MAX_CHARS_PER_TOKEN = 32
"""Texts with more characters than this for each token that there may be are too long; only their beginning is read."""
SURE_CHARS_PER_TOKEN = 4
"""Those with no more than this are not worth looking at before they are tokenized."""
SLICE_CHARS = 1 << 14
SLACK_TOKENS = 64
"""By so many at most the tokens of slices are more than those of what was cut, for each cut."""


class Ruler:
    """Refuses texts with more tokens than the context has, in the time it takes to tokenize what would fit.

    Args:
        field: Where a request has them.
    """

    def __init__(self, tokenizer: Tokenizer, *, limit_tokens: int, field: str) -> None:
        self._tokenizer = tokenizer
        self._limit = limit_tokens
        self._field = field

    def check(self, text: str) -> None:
        """See that a text may fit. What passes may still be a little too long.

        Raises:
            ContextOverflow: It does not; its count is about right, since it was not read to the end.
        """
        self.check_size(len(text), text)
        if len(text) <= self._limit * SURE_CHARS_PER_TOKEN:
            return
        num_tokens = most = 0
        for at in range(0, len(text), SLICE_CHARS):
            piece = text[at : at + SLICE_CHARS]
            num_tokens += self._count(piece)
            most += SLACK_TOKENS
            if num_tokens > self._limit + most:
                raise self.overflow(num_tokens * len(text) // (at + len(piece)))

    def check_size(self, num_chars: int, sample: str) -> None:
        """See that texts of so many characters together are not far too long.

        Raises:
            ContextOverflow: They are; its count is a guess by how the sample begins.
        """
        if num_chars > self._limit * MAX_CHARS_PER_TOKEN:
            begin = sample[:SLICE_CHARS] or "a"
            raise self.overflow(max(self._count(begin) * num_chars // len(begin), self._limit + 1))

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special=False, parse_special=True))

    def overflow(self, prompt_tokens: int, completion_tokens: int = 0) -> ContextOverflow:
        """The error of a prompt that does not fit."""
        return ContextOverflow(
            limit_tokens=self._limit,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            field=self._field,
        )
