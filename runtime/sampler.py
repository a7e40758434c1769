"""Scores to token, in numpy, seeded per sequence so that a batch does not change an answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.request import SamplingParams, TokenId

TOP_P_CANDIDATES = 4096
"""Tokens looked at for top-p before the whole vocabulary is sorted."""

Logits = NDArray[np.float32]


def penalize(logits: Logits, params: SamplingParams, generated: list[TokenId]) -> Logits:
    """The scores with bias and penalties applied, shape ``(vocab,)``; a copy only where there are any.

    Source: OpenAI API reference, "Frequency and presence penalties".
    """
    if not (params.presence_penalty or params.frequency_penalty or params.logit_bias):
        return logits
    logits = logits.copy()
    for token, bias in params.logit_bias:
        if 0 <= token < logits.size:
            logits[token] += bias
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.asarray(generated), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)
    return logits


def _candidates(logits: Logits, params: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Token ids from best to worst and their probabilities, cut by top-k, min-p and top-p, in that order."""
    limit = params.top_k if 0 < params.top_k < logits.size else logits.size
    if limit > TOP_P_CANDIDATES and (params.top_p < 1 or params.min_p > 0):
        ids, probs = _head(logits, params, TOP_P_CANDIDATES)
        if ids is not None:
            return ids, probs
    ids = np.argpartition(logits, -limit)[-limit:] if limit < logits.size else np.arange(logits.size)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return _cut(ids, _softmax(logits[ids], params.temperature), params)


def _head(logits: Logits, params: SamplingParams, size: int) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """The cut over the best `size` tokens, exact if it ends within them; else ids are None."""
    ids = np.argpartition(logits, -size)[-size:]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = (logits.astype(np.float64) - float(logits[ids[0]])) / params.temperature
    probs = np.exp(scaled[ids]) / np.exp(scaled).sum()
    kept, cut = _cut(ids, probs, params)
    return (kept if len(kept) < size else None), cut


def _softmax(scores: Logits, temperature: float) -> NDArray[np.float64]:
    """Probabilities of scores sorted from best to worst."""
    e = np.exp((scores.astype(np.float64) - float(scores[0])) / temperature)
    return e / e.sum()


def _cut(
    ids: NDArray[np.intp], probs: NDArray[np.float64], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    keep = len(ids)
    if params.min_p > 0:
        keep = int((probs >= params.min_p * probs[0]).sum())
    if params.top_p < 1:
        reached = int(np.searchsorted(np.cumsum(probs), params.top_p)) + 1
        keep = min(keep, reached)
    return ids[: max(keep, 1)], probs[: max(keep, 1)]


def sample(logits: Logits, params: SamplingParams, rng: np.random.Generator, *, generated: list[TokenId]) -> TokenId:
    """Draw the next token.

    Args:
        logits: Unnormalised scores, shape ``(vocab,)``. Not modified.
        params: ``temperature == 0`` means argmax and leaves `rng` untouched.
        rng: The sequence's own generator.
        generated: What the sequence generated so far, for the penalties.

    Raises:
        BackendError: No score is finite.

    Source: nucleus sampling after Holtzman et al. 2020 (arXiv:1904.09751); min-p after Nguyen et al. 2024
    (arXiv:2407.01082), applied before top-p.
    """
    logits = penalize(logits, params, generated)
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise BackendError("The model gave no usable score.", hint="The weights may be damaged: edge verify.")
    if params.temperature == 0:
        return best
    ids, probs = _candidates(logits, params)
    drawn = int(np.searchsorted(np.cumsum(probs), rng.random() * float(probs.sum()), side="right"))
    return int(ids[min(drawn, len(ids) - 1)])


def make_rng(seed: int | None) -> np.random.Generator:
    """The generator of one sequence; without a seed it differs each time."""
    return np.random.default_rng(seed)
