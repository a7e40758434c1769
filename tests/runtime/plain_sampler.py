"""The samplers as slow loops, to hold the fast ones against. Written from the papers' and llama.cpp's definitions."""

from __future__ import annotations

import math

from runtime.request import Breakers, SamplingParams

Scores = dict[int, float]
"""What is left, by token."""


def probabilities(scores: Scores) -> Scores:
    """The softmax."""
    best = max(scores.values())
    weights = {t: math.exp(s - best) for t, s in scores.items()}
    return {t: w / sum(weights.values()) for t, w in weights.items()}


def penalized(scores: list[float], p: SamplingParams, tokens: list[int], num_prompt: int, breakers: Breakers) -> Scores:
    """Bias, repetition, presence and frequency penalties, DRY."""
    out = dict(enumerate(scores))
    for token, bias in p.logit_bias:
        out[token] += bias
    for token in set(window(tokens, p.repeat_last_n)):
        out[token] = out[token] / p.repeat_penalty if out[token] > 0 else out[token] * p.repeat_penalty
    for token in tokens[num_prompt:]:
        out[token] -= p.frequency_penalty
    for token in set(tokens[num_prompt:]):
        out[token] -= p.presence_penalty
    if p.dry_multiplier:
        for token, length in repetitions(window(tokens, p.dry_penalty_last_n), p, breakers).items():
            out[token] -= p.dry_multiplier * p.dry_base ** (length - p.dry_allowed_length)
    return out


def window(tokens: list[int], last_n: int) -> list[int]:
    return tokens if last_n < 0 else tokens[len(tokens) - min(last_n, len(tokens)) :]


def repetitions(tokens: list[int], p: SamplingParams, breakers: Breakers) -> dict[int, int]:
    """By token: how long a repetition, up to the end, it would prolong."""
    limit = len(tokens)
    for i in range(len(tokens) - 1, -1, -1):
        tails = [t for t in breakers.get(tokens[i], ()) if tuple(tokens[i + 1 : i + 1 + len(t)]) == t]
        if tails:
            limit = len(tokens) - 1 - i - max(map(len, tails))
            break
    found: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length < limit and length <= end and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        follower = tokens[end + 1]
        if length >= p.dry_allowed_length and () not in breakers.get(follower, ()):
            found[follower] = max(length, found.get(follower, 0))
    return found


def cut(scores: Scores, p: SamplingParams, *, excludes: bool) -> Scores:
    """Probabilities of what top-k, typical, top-p, min-p and XTC (if its lot fell so) leave, after temperature."""
    best_first = sorted(scores, key=lambda t: -scores[t])
    left = {t: scores[t] for t in (best_first[: p.top_k] if p.top_k else best_first)}
    if p.typical_p < 1:
        probs = probabilities(left)
        entropy = -sum(q * math.log(q) for q in probs.values() if q > 0)
        left = until(
            left,
            probs,
            sorted((t for t in left if probs[t] > 0), key=lambda t: abs(-math.log(probs[t]) - entropy)),
            p.typical_p,
        )
    if p.top_p < 1:
        left = until(left, probabilities(left), sorted(left, key=lambda t: -left[t]), p.top_p)
    if p.min_p > 0:
        least = max(left.values()) + math.log(p.min_p)
        left = {t: s for t, s in left.items() if s >= least}
    if excludes and p.xtc_threshold <= 0.5:
        probs = probabilities(left)
        top = sorted((t for t in left if probs[t] >= p.xtc_threshold), key=lambda t: -probs[t])
        left = {t: s for t, s in left.items() if t not in top[:-1]}
    return probabilities({t: s / p.temperature for t, s in left.items()})


def until(left: Scores, probs: Scores, order: list[int], mass: float) -> Scores:
    """The first in this order that reach a probability together."""
    kept: Scores = {}
    total = 0.0
    for token in order:
        kept[token] = left[token]
        total += probs[token]
        if total >= mass:
            break
    return kept


def distribution(scores: Scores, p: SamplingParams) -> Scores:
    """What a token is drawn from."""
    plain = cut(scores, p, excludes=False)
    if not p.xtc_probability:
        return plain
    excluded = cut(scores, p, excludes=True)
    c = p.xtc_probability
    return {t: (1 - c) * plain.get(t, 0.0) + c * excluded.get(t, 0.0) for t in plain}
