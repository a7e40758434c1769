"""The sampler against references written plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import BackendError
from runtime.request import SamplingParams
from runtime.sampler import make_rng, sample

SIZE = 50


def scores(seed: int, size: int = SIZE) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def reference_probabilities(
    logits: np.ndarray[tuple[int], np.dtype[np.float32]], p: SamplingParams
) -> dict[int, float]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if p.top_k:
        order = order[: p.top_k]
    weights = [float(np.exp((float(logits[i]) - float(logits[order[0]])) / p.temperature)) for i in order]
    probs = [w / sum(weights) for w in weights]
    kept = [i for i, q in enumerate(probs) if q >= p.min_p * probs[0]]
    total, cut = 0.0, len(probs)
    for i, q in enumerate(probs):
        total += q
        if total >= p.top_p:
            cut = i + 1
            break
    kept = [i for i in kept if i < cut] or [0]
    mass = sum(probs[i] for i in kept)
    return {order[i]: probs[i] / mass for i in kept}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.0, min_p=0.1, top_p=0.95),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits, rng, draws = scores(3), make_rng(11), 20_000
    expected = reference_probabilities(logits, params)
    counts = np.zeros(SIZE)
    for _ in range(draws):
        counts[sample(logits, params, rng, generated=[])] += 1
    assert set(np.flatnonzero(counts)) <= set(expected)
    likely = {i: q for i, q in expected.items() if q * draws >= 20}
    chi2 = sum((counts[i] - q * draws) ** 2 / (q * draws) for i, q in likely.items())
    assert chi2 < len(likely) + 5 * np.sqrt(2 * len(likely)), "five sigma of a chi-squared variable"


def test_large_vocabulary_takes_the_same_head() -> None:
    logits = scores(5, 60_000)
    params = SamplingParams(temperature=0.6, top_p=0.5)
    expected = reference_probabilities(logits, params)
    drawn = {sample(logits, params, make_rng(i), generated=[]) for i in range(300)}
    assert drawn <= set(expected)


@given(st.integers(0, 1000))
def test_temperature_zero_is_argmax_and_leaves_the_generator(seed: int) -> None:
    rng = make_rng(1)
    before = rng.bit_generator.state
    assert sample(scores(seed), SamplingParams(temperature=0), rng, generated=[]) == int(scores(seed).argmax())
    assert rng.bit_generator.state == before


def test_a_seed_repeats() -> None:
    params = SamplingParams(temperature=1.3)
    runs = [[sample(scores(i), params, rng, generated=[]) for i in range(30)] for rng in (make_rng(7), make_rng(7))]
    assert runs[0] == runs[1]


def test_penalties_and_bias_change_the_scores_only_of_their_tokens() -> None:
    logits = np.zeros(4, np.float32)
    greedy = SamplingParams(temperature=0, frequency_penalty=1.0, presence_penalty=0.5, logit_bias=((3, -5.0),))
    assert sample(logits, greedy, make_rng(0), generated=[0, 1]) == 2
    assert not logits.any(), "the model's scores are not modified"


def test_scores_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(BackendError):
        sample(np.full(5, np.nan, np.float32), SamplingParams(), make_rng(0), generated=[])
