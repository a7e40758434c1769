"""The model's own probabilities of the tokens of an answer, for who asks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.request import TokenId, TokenLogprob
from runtime.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for what is less likely still, as OpenAI's does; JSON has no infinity."""


def measure(logits: NDArray[np.float32], token: TokenId, num_top: int) -> tuple[float, list[tuple[TokenId, float]]]:
    """Log-probability of a token, and of the likeliest `num_top`, best first."""
    peak = float(logits.max())
    log_total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    num_top = min(num_top, logits.size)
    top = np.argpartition(logits, -num_top)[-num_top:] if num_top else np.empty(0, np.intp)
    top = top[np.argsort(-logits[top], kind="stable")]
    return (
        max(float(logits[token]) - log_total, LEAST_LOGPROB),
        [(int(t), max(float(logits[t]) - log_total, LEAST_LOGPROB)) for t in top],
    )


class Logprobs:
    """Holds a token's figures back for as long as its text may still be cut by a stop string."""

    def __init__(self, num_top: int, tokenizer: Tokenizer) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._held: list[TokenLogprob] = []

    def add(self, logits: NDArray[np.float32], token: TokenId, *, offset: int) -> None:
        """Take a token drawn from these scores, `offset` characters into the answer."""
        logprob, top = measure(logits, token, self._num_top)
        named = tuple((self._bytes(t), value) for t, value in top)
        self._held.append(TokenLogprob(self._bytes(token), logprob, named, offset))

    def _bytes(self, token: TokenId) -> bytes:
        return self._tokenizer.piece(token) or self._tokenizer.text(token).encode()

    def take(self, *, num_known: int, num_certain: int) -> tuple[TokenLogprob, ...]:
        """Those whose text is certain to the end.

        Args:
            num_known: Characters of all tokens so far.
            num_certain: Characters of these that were passed on.
        """
        ends = [*(e.offset for e in self._held[1:]), num_known]
        number = next((i for i, end in enumerate(ends) if end > num_certain), len(self._held))
        return self._cut(number)

    def finish(self, *, num_certain: int) -> tuple[TokenLogprob, ...]:
        """Those of which any text is part of the answer, which is over."""
        return self._cut(sum(e.offset < num_certain for e in self._held))

    def _cut(self, number: int) -> tuple[TokenLogprob, ...]:
        taken, self._held = tuple(self._held[:number]), self._held[number:]
        return taken
