"""Texts to tokens and back, for who asks for no answer. The engine takes no step for it."""

from __future__ import annotations

from edge.errors import ContextOverflow, InvalidRequest
from runtime import wire
from runtime.lengths import MAX_CHARS_PER_TOKEN
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer


class Speller:
    """Tells how one model's vocabulary spells.

    Args:
        context_tokens: What the model reads at most: it bounds what is tokenized, as it does for prompts.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens

    def spell(self, message: wire.Spell) -> wire.Piece:
        """The tokens, and what spells each.

        Raises:
            InvalidRequest: A token id is unknown.
            ContextOverflow: It is longer than what the model could read.
        """
        self._check(message)
        tokens: list[TokenId] = []
        for i, part in enumerate(message.content):
            if isinstance(part, str):
                is_first = not i and message.add_special
                tokens += self._tokenizer.encode(part, add_special=is_first, parse_special=message.parse_special)
            else:
                tokens.append(part)
        spelled = {token: self._spelling(token) for token in set(tokens)}
        return wire.Piece(
            message.id, "", 0, 0, 0, "stop", tokens=tuple(tokens), spellings=tuple(spelled[t] for t in tokens)
        )

    def _check(self, message: wire.Spell) -> None:
        num_chars = sum(len(part) if isinstance(part, str) else 1 for part in message.content)
        if num_chars > self._context_tokens * MAX_CHARS_PER_TOKEN:
            raise ContextOverflow.of_text(
                message.field,
                num_tokens=num_chars // MAX_CHARS_PER_TOKEN,
                limit_tokens=self._context_tokens,
                can_cut=False,
            )
        if bad := [part for part in message.content if isinstance(part, int) and not 0 <= part < self._vocab_size]:
            raise InvalidRequest(f"There is no token {bad[0]}.", field=message.field)

    def _spelling(self, token: TokenId) -> bytes:
        return self._tokenizer.piece(token) or self._tokenizer.text(token).encode()
