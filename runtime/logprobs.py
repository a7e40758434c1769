"""The model's own probabilities of the tokens of an answer, and of an echoed prompt, for who asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.request import Echo, TokenId, TokenLogprob
from runtime.tokenizer import Detokenizer, Tokenizer

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


class _Reporter:
    """What the model thought of tokens, in bytes and figures."""

    def __init__(self, num_top: int, tokenizer: Tokenizer) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer

    def report(self, logits: NDArray[np.float32], token: TokenId, *, offset: int) -> TokenLogprob:
        logprob, top = measure(logits, token, self._num_top)
        return TokenLogprob(self.named(token), logprob, tuple((self.named(t), value) for t, value in top), offset)

    def named(self, token: TokenId) -> bytes:
        return self._tokenizer.piece(token) or self._tokenizer.text(token).encode()


class Logprobs:
    """Holds a token's figures back for as long as its text may still be cut by a stop string."""

    def __init__(self, num_top: int, tokenizer: Tokenizer) -> None:
        self._reporter = _Reporter(num_top, tokenizer)
        self._held: list[TokenLogprob] = []

    def add(self, logits: NDArray[np.float32], token: TokenId, *, offset: int) -> None:
        """Take a token drawn from these scores, `offset` characters into the answer."""
        self._held.append(self._reporter.report(logits, token, offset=offset))

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


class PromptEcho:
    """A prompt that is given back, as soon as all is known of it.

    Args:
        num_top: Tokens reported beside each of the prompt's; None where its text is all that is wanted.
    """

    def __init__(self, text: str, prompt: Sequence[TokenId], num_top: int | None, tokenizer: Tokenizer) -> None:
        self._text = text
        self._prompt = prompt
        self._reporter = None if num_top is None else _Reporter(num_top, tokenizer)
        self._known: list[TokenLogprob] = []
        self._offsets = [] if num_top is None else list(_offsets(text, prompt, tokenizer))

    @property
    def is_complete(self) -> bool:
        """Whether the scores that are wanted are there."""
        return self._reporter is None or len(self._known) == len(self._prompt) - 1

    def add(self, logits: NDArray[np.float32], place: int) -> None:
        """Take the scores from which the token at this place would have been drawn. A prompt that gave way is computed
        again, and reported once."""
        if self._reporter is not None and place == len(self._known) + 1:
            token = self._prompt[place]
            self._known.append(self._reporter.report(logits, token, offset=self._offsets[place]))

    def echo(self) -> Echo:
        """The prompt."""
        if self._reporter is None:
            return Echo(self._text)
        return Echo(self._text, self._reporter.named(self._prompt[0]), tuple(self._known))


def _offsets(text: str, prompt: Sequence[TokenId], tokenizer: Tokenizer) -> Iterator[int]:
    """Where in the text each token begins. Some vocabularies put a space in front, which is no part of the text."""
    detokenizer = Detokenizer()
    ends = [0]
    for token in prompt:
        ends.append(ends[-1] + len(detokenizer.push(tokenizer.piece(token))))
    surplus = max(0, ends[-1] - len(text))
    return (max(0, end - surplus) for end in ends[:-1])
