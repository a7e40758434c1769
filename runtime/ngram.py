"""Where a text repeats itself: what followed there last time is a guess at what follows now. Pure.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) that stays with the place it found,
also over a single token that differs.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import takewhile

from runtime.request import TokenId

NGRAM = 3
"""Tokens that have to repeat before a place is believed."""
MAX_NGRAMS = 16384
"""N-grams remembered of one text, about 2.5 MB; of a longer text the beginning is not looked up."""
MAX_MATCH = 63
"""Longer matches are all the same to whoever asks."""


class Lookup:
    """One text that grows at its end, and the earlier place that its end repeats. Each new token costs O(1)."""

    def __init__(self) -> None:
        self._index: dict[tuple[TokenId, ...], int] = {}
        self._seen = 0
        self._source: int | None = None
        self._misses = 0
        self.matched = 0
        """Tokens that the end has in common with the place; 0 just after one that differed."""

    def follow(self, tokens: list[TokenId], forced: Container[int] = ()) -> list[tuple[int, bool]]:
        """Take the tokens that came since the last call. The first call takes the prompt.

        Args:
            forced: Places of tokens that nobody had to guess.

        Returns:
            For each token that could have been guessed: `matched` before it, and whether the guess was right.
        """
        outcomes: list[tuple[int, bool]] = []
        if not self._seen:
            self._read_prompt(tokens)
        for at in range(self._seen, len(tokens)):
            outcome = self._take(tokens, at)
            if outcome is not None and at not in forced:
                outcomes.append(outcome)
        self._seen = len(tokens)
        return outcomes

    def guess(self, tokens: list[TokenId], limit: int) -> list[TokenId]:
        """At most `limit` tokens that may come next; where the place reaches the text's end, it goes round."""
        if self._source is None or limit <= 0:
            return []
        found = tokens[self._source : self._source + limit]
        while 0 < len(found) < limit:
            found += found[: limit - len(found)]
        return list(takewhile(lambda t: t >= 0, found))  # an image is no text to say again

    def _read_prompt(self, tokens: list[TokenId]) -> None:
        start = max(0, len(tokens) - MAX_NGRAMS)
        recent = tokens[start:-1]
        ends = range(start + NGRAM, len(tokens))
        self._index = dict(zip(zip(*(recent[i:] for i in range(NGRAM)), strict=False), ends, strict=False))
        self._seen = max(0, len(tokens) - 1)

    def _take(self, tokens: list[TokenId], at: int) -> tuple[int, bool] | None:
        """Go on by one token; what came of the guess at it, if there was one."""
        outcome = self._compare(tokens, at)
        found = self._remember(tokens, at)
        if self.matched >= NGRAM:
            return outcome
        if found is not None:
            self._source, self._misses = found, 0
            self.matched = _common_end(tokens, found, at + 1)
        elif self._misses > 1:
            self._source = None
        return outcome

    def _compare(self, tokens: list[TokenId], at: int) -> tuple[int, bool] | None:
        if self._source is None:
            return None
        before, hit = self.matched, tokens[self._source] == tokens[at]
        self._source += 1
        self.matched = min(self.matched + 1, MAX_MATCH) if hit else 0
        self._misses = 0 if hit else self._misses + 1
        return before, hit

    def _remember(self, tokens: list[TokenId], at: int) -> int | None:
        """Where the last n-gram stood before; from now on, it stands here."""
        key = tuple(tokens[max(0, at + 1 - NGRAM) : at + 1])
        found = self._index.get(key)
        if found is not None or len(self._index) < MAX_NGRAMS:
            self._index[key] = at + 1
        return found


def _common_end(tokens: list[TokenId], a: int, b: int) -> int:
    """How many tokens before `a` equal those before `b`, up to `MAX_MATCH`."""
    n = 0
    while n < min(a, MAX_MATCH) and tokens[a - 1 - n] == tokens[b - 1 - n]:
        n += 1
    return n
