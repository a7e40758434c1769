"""Scores to token, in numpy, seeded per sequence so that a batch does not change an answer.

The samplers and their order are llama-server's (llama.cpp, `common_params_sampling` and `src/llama-sampler.cpp`): bias,
penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature. Temperature comes last, so the cuts look at the model's
own probabilities. Between cuts nothing is kept but the scores: each computes the probabilities of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.penalties import Penalties
from runtime.request import NO_BREAKERS, Breakers, SamplingParams, TokenId

Logits = NDArray[np.float32]
Indices = NDArray[np.intp]
Cut = Callable[[Logits], Indices | None]
"""Which of these scores stay; None where all do."""

_BLOCK = 256
_MAX_SORTED = 1024
_BUCKET_SHIFT = 18
"""Leaves sign, exponent and five bits of the fraction."""
MIN_TEMPERATURE = 1e-30
"""What is colder is as cold as this: the division must not overflow."""


def softmax(scores: Logits) -> Logits:
    """Probabilities of scores, of which one at least is finite."""
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights


def _fewest(rank: Logits, probs: Logits, mass: float) -> Indices:
    """Indices of the fewest items that reach `mass` together, taken by rank, which begins at 0 and goes up.

    Of many, only those are sorted among whom the mass is reached: the leading bits of a number that is not negative
    have its order, so they make buckets.
    """
    sure, border = np.empty(0, np.intp), np.arange(rank.size)
    if rank.size > _MAX_SORTED:
        buckets = rank.view(np.int32) >> _BUCKET_SHIFT
        sums = np.cumsum(np.bincount(buckets, weights=probs))
        edge = min(int(np.searchsorted(sums, mass)), len(sums) - 1)
        sure, border = np.flatnonzero(buckets < edge), np.flatnonzero(buckets == edge)
        mass -= float(sums[edge - 1]) if edge else 0.0
    border = border[np.argsort(rank[border])]
    reach = int(np.searchsorted(np.cumsum(probs[border], dtype=np.float64), mass)) + 1
    return np.append(sure, border[:reach])


def top_k(scores: Logits, k: int) -> Indices | None:
    """The k best."""
    return np.argpartition(scores, -k)[-k:] if k < scores.size else None


def top_p(scores: Logits, p: float) -> Indices:
    """The fewest best tokens whose probabilities reach `p`.

    Those below ``(1 - p) / n`` sum up to less than ``1 - p``, so the answer lies among the others: few are sorted.

    Source: Holtzman et al. 2020 (arXiv:1904.09751).
    """
    probs = softmax(scores)
    likely = np.flatnonzero(probs >= (1 - p) / scores.size)
    return likely[_fewest(scores.max() - scores[likely], probs[likely], p)]


def min_p(scores: Logits, p: float) -> Indices:
    """Tokens at least `p` times as likely as the best.

    Source: Nguyen et al. 2024 (arXiv:2407.01082).
    """
    return np.flatnonzero(scores >= scores.max() + np.float32(np.log(p)))


def typical_p(scores: Logits, p: float) -> Indices:
    """The fewest tokens that reach `p`, beginning with those whose surprise is nearest to the expected one.

    Source: Meister et al. 2022 (arXiv:2202.00666).
    """
    surprise = scores.max() - scores
    weights = np.exp(-surprise)
    surprise += np.log(weights.sum())
    probs = np.exp(-surprise)
    possible = np.flatnonzero(probs)
    surprise, probs = surprise[possible], probs[possible]
    return possible[_fewest(np.abs(surprise - np.dot(probs, surprise)), probs, p)]


def xtc(scores: Logits, threshold: float, probability: float, rng: np.random.Generator) -> Indices | None:
    """With this probability, all without the tokens that reach `threshold`, but for the least likely of them.

    Source: p-e-w, "Exclude Top Choices" (github.com/oobabooga/text-generation-webui/pull/6335).
    """
    if scores.size < 2 or rng.random() > probability:
        return None
    probs = softmax(scores)
    top = np.flatnonzero(probs >= threshold)
    if len(top) < 2:
        return None
    kept = np.ones(scores.size, np.bool_)
    kept[top] = False
    kept[top[probs[top].argmin()]] = True
    return np.flatnonzero(kept)


def _chain(params: SamplingParams, rng: np.random.Generator) -> Iterator[Cut]:
    if params.top_k > 0:
        yield partial(top_k, k=params.top_k)
    if params.typical_p < 1:
        yield partial(typical_p, p=params.typical_p)
    if params.top_p < 1:
        yield partial(top_p, p=params.top_p)
    if params.min_p > 0:
        yield partial(min_p, p=params.min_p)
    if params.xtc_probability > 0 and params.xtc_threshold <= 0.5:
        yield partial(xtc, threshold=params.xtc_threshold, probability=params.xtc_probability, rng=rng)


def candidates(scores: Logits, params: SamplingParams, rng: np.random.Generator) -> tuple[Indices | None, Logits]:
    """What the cuts leave, and the weights with which it is drawn; the ids are None where that is every token."""
    ids: Indices | None = None
    for cut in _chain(params, rng):
        kept = cut(scores)
        if kept is not None:
            scores = scores[kept]
            ids = kept if ids is None else ids[kept]
    weights = scores - scores.max()
    if params.temperature != 1:
        weights /= np.float32(max(params.temperature, MIN_TEMPERATURE))
    return ids, np.exp(weights, out=weights)


def _pick(weights: Logits, draw: float) -> int:
    """The index at which the running sum of the weights passes this share, 0 to 1, of the whole.

    Sums of blocks come first: a running sum over a whole vocabulary takes longer than its exponentials.
    """
    if weights.size <= _BLOCK * 4:
        return _pass(weights, draw)[0]
    whole = weights.size // _BLOCK * _BLOCK
    sums = np.append(weights[:whole].reshape(-1, _BLOCK).sum(axis=1), weights[whole:].sum())
    block, rest = _pass(sums, draw)
    return block * _BLOCK + _pass(weights[block * _BLOCK : (block + 1) * _BLOCK], rest)[0]


def _pass(weights: Logits, draw: float) -> tuple[int, float]:
    """Where the running sum passes the share `draw`, and how far into that weight, 0 to 1."""
    sums = np.cumsum(weights, dtype=np.float64)
    target = draw * float(sums[-1])
    at = int(np.searchsorted(sums, target, side="right"))
    if at == len(sums):  # by rounding; what weighs nothing is never drawn
        at = int(np.flatnonzero(weights)[-1])
    return at, min(max(1 - (float(sums[at]) - target) / float(weights[at]), 0.0), 1.0)


class Sampler:
    """Draws the tokens of one sequence. One draw takes one random number, and one more where XTC may act."""

    def __init__(self, params: SamplingParams, *, num_prompt: int, breakers: Breakers = NO_BREAKERS) -> None:
        self._params = params
        self._rng = np.random.default_rng(params.seed)
        self._penalties = Penalties(params, num_prompt=num_prompt, breakers=breakers)

    def draw(self, logits: Logits, tokens: list[TokenId]) -> TokenId:
        """Draw the next token.

        Args:
            logits: Unnormalised scores, shape ``(vocab,)``; bias and penalties are written into it.
            tokens: Prompt and answer so far, at least what the last call had.

        Raises:
            BackendError: No score is finite.
        """
        self._penalties.apply(logits, tokens)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise BackendError("The model gave no usable score.", hint="The weights may be damaged: edge verify.")
        if self._params.temperature == 0:
            return best
        ids, weights = candidates(logits, self._params, self._rng)
        index = _pick(weights, self._rng.random())
        return index if ids is None else int(ids[index])
