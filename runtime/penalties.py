"""What the tokens so far take off the scores of those to come."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.request import NO_BREAKERS, Breakers, SamplingParams, TokenId
from runtime.tokenizer import Tokenizer

MAX_BREAKER_TOKENS = 20
"""Tokens of a sequence breaker that are compared after the first (llama.cpp, `MAX_SEQ_LEN`)."""
_MAX_EXPONENT = 88.7228391
"""Natural logarithm of the largest single-precision number: where DRY's growth ends."""
_MAX_PENALTY = 1e30
_SEPARATOR = b"\xff"
"""Never part of a text in UTF-8."""

Tokens = NDArray[np.int32]
T = TypeVar("T", Tokens, NDArray[np.int64], list[TokenId])


def suffix_lengths(tokens: Sequence[TokenId]) -> list[int]:
    """For each position, how many tokens up to it are the same as as many at the end; the last is the whole length.

    Source: the Z-algorithm (Gusfield 1997, "Algorithms on Strings, Trees, and Sequences", 1.4), from the end.
    """
    text, size = tokens[::-1], len(tokens)
    lengths = [size] * size
    left = right = 0
    for k in range(1, size):
        n = min(right - k, lengths[k - left]) if k < right else 0
        while k + n < size and text[n] == text[k + n]:
            n += 1
        lengths[k] = n
        if k + n > right:
            left, right = k, k + n
    return lengths[::-1]


class Penalties:
    """Logit bias, repetition, presence and frequency penalties and DRY of one sequence.

    The repetition penalty and DRY look at prompt and answer, as llama-server's do; presence and frequency count the
    answer, as OpenAI's and vLLM's do (llama-server's count the last 64 tokens, with the prompt).

    Source: OpenAI API reference, "Frequency and presence penalties"; Keskar et al. 2019 (arXiv:1909.05858, section 4.1)
    with llama.cpp's multiplication of negative scores; p-e-w, "DRY" (github.com/oobabooga/text-generation-webui/pull/
    5677), with its sequence breakers as llama.cpp's `llama_sampler_dry_apply` has them.
    """

    def __init__(self, params: SamplingParams, *, num_prompt: int, breakers: Breakers = NO_BREAKERS) -> None:
        p = self._params = params
        self._num_prompt = num_prompt
        self._breakers = breakers
        self._bias = np.array([token for token, _ in p.logit_bias], np.intp), np.array([b for _, b in p.logit_bias])
        self._counts = bool(p.presence_penalty or p.frequency_penalty)
        self._repeats = p.repeat_penalty != 1 and p.repeat_last_n != 0
        self._dry = p.dry_multiplier > 0 and p.dry_penalty_last_n != 0
        self._seen = 0
        self._counted: set[TokenId] = set()
        self._taken: NDArray[np.float32] | None = None
        """By token: what presence and frequency take off, once there is an answer."""
        self._history = np.empty(0, np.int32)
        self._lengths = np.empty(0, np.int64)
        """`suffix_lengths` of the history."""

    def apply(self, logits: NDArray[np.float32], tokens: list[TokenId]) -> None:
        """Write bias and penalties into the scores after `tokens`: prompt and answer, at least as long as last time."""
        if self._params.logit_bias:
            self._add_bias(logits)
        if not (self._counts or self._repeats or self._dry):
            return
        self._catch_up(tokens, logits.size)
        if self._repeats:
            self._apply_repetition(logits)
        if self._taken is not None:
            logits -= self._taken
        if self._dry:
            self._apply_dry(logits)

    def _add_bias(self, logits: NDArray[np.float32]) -> None:
        ids, bias = self._bias
        known = ids < logits.size
        np.add.at(logits, ids[known], bias[known].astype(np.float32))

    def _catch_up(self, tokens: list[TokenId], vocab_size: int) -> None:
        start, self._seen = self._seen, len(tokens)
        new = [t for t in tokens[start:] if t >= 0]  # an image is no text to repeat
        if self._counts:
            self._count(tokens[max(start, self._num_prompt) :], vocab_size)
        if not self._dry:
            self._history = np.append(self._history, np.asarray(new, np.int32))
            self._history = _last(self._history, self._params.repeat_last_n)
        elif not self._history.size:
            self._history = np.asarray(new, np.int32)
            self._lengths = np.asarray(suffix_lengths(_last(new, self._params.dry_penalty_last_n)), np.int64)
        else:
            for token in new:
                self._push(token)

    def _count(self, answer: Iterable[TokenId], vocab_size: int) -> None:
        for token in answer:
            if self._taken is None:
                self._taken = np.zeros(vocab_size, np.float32)
            first = token not in self._counted
            self._counted.add(token)
            self._taken[token] += self._params.frequency_penalty + self._params.presence_penalty * first

    def _push(self, token: TokenId) -> None:
        """One token more: where it stands, the match that ended before it grows; elsewhere none is left."""
        self._history = np.append(self._history, np.int32(token))
        grown = np.append(0, self._lengths) + 1
        lengths = np.where(self._history[-grown.size :] == token, grown, 0)
        self._lengths = _last(lengths, self._params.dry_penalty_last_n)

    def _apply_repetition(self, logits: NDArray[np.float32]) -> None:
        ids = _last(self._history, self._params.repeat_last_n)
        scores, penalty = logits[ids], np.float32(self._params.repeat_penalty)
        logits[ids] = np.where(scores > 0, scores / penalty, scores * penalty)

    def _apply_dry(self, logits: NDArray[np.float32]) -> None:
        p = self._params
        lengths = np.minimum(self._lengths[:-1], np.arange(1, self._lengths.size))  # a match lies within the window
        if lengths.size < p.dry_allowed_length or not lengths.size:
            return
        window = self._history[-self._lengths.size :]
        lengths = np.minimum(lengths, self._limit(window, int(lengths.max())))
        found = np.flatnonzero(lengths >= p.dry_allowed_length)
        found = found[np.argsort(lengths[found], kind="stable")]  # a token's longest repetition is written last
        found = found[[() not in self._breakers.get(t, ()) for t in window[found + 1].tolist()]]
        ids = window[found + 1]
        most = int(_MAX_EXPONENT / math.log(p.dry_base)) if p.dry_base > 1.000001 else lengths.size
        growth = np.minimum(lengths[found] - p.dry_allowed_length, most).astype(np.float64)
        penalty = np.minimum(p.dry_multiplier * p.dry_base**growth, _MAX_PENALTY)
        logits[ids] = logits[ids] - penalty.astype(np.float32)

    def _limit(self, window: Tokens, longest: int) -> int:
        """How many tokens stand after the last sequence breaker; looked for only where a match may reach it."""
        end = window[-(longest + MAX_BREAKER_TOKENS + 1) :].tolist()[::-1]
        for i, token in enumerate(end):
            tails = self._breakers.get(token)
            if tails is None:
                continue
            matched = [len(t) for t in tails if len(t) <= i and list(t) == end[i - len(t) : i][::-1]]
            if matched:
                return i - max(matched)
        return len(window)


def find_breakers(texts: Sequence[str], tokenizer: Tokenizer, pieces: Sequence[bytes]) -> Breakers:
    """The tokens with which sequence breakers begin, and what has to follow each of them.

    Args:
        pieces: Every token's bytes, by id.
    """
    vocabulary, starts = _SEPARATOR.join(pieces) + _SEPARATOR, _starts(pieces)
    found: dict[TokenId, set[tuple[TokenId, ...]]] = {}
    for text in texts:
        whole = text.encode()
        for token in _tokens_at(vocabulary, starts, whole):
            found.setdefault(token, set()).add(())
        for i in range(1, len(whole)):
            heads = [t for t in _tokens_at(vocabulary, starts, whole[:i] + _SEPARATOR) if pieces[t].endswith(whole[:i])]
            rest = whole[i:].decode("utf-8", "ignore")
            tail = tokenizer.encode(rest, add_special=False, parse_special=False)[:MAX_BREAKER_TOKENS] if heads else []
            for token in heads:
                if whole not in pieces[token]:
                    found.setdefault(token, set()).add(tuple(tail))
    return {token: tuple(tails) for token, tails in found.items()}


def _starts(pieces: Sequence[bytes]) -> NDArray[np.int64]:
    """Where each token begins in their join."""
    return np.cumsum([0, *(len(p) + 1 for p in pieces[:-1])])


def _tokens_at(vocabulary: bytes, starts: NDArray[np.int64], part: bytes) -> list[TokenId]:
    """The tokens in which `part` begins, which one search through all is fast to find."""
    at = [m.start() for m in re.finditer(re.escape(part), vocabulary)]
    return np.unique(np.searchsorted(starts, at, side="right") - 1).tolist()


def _last(items: T, number: int) -> T:
    """The last `number` of them; all where it is negative."""
    return items[-number:] if number >= 0 else items
