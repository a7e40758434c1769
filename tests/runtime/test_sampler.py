"""The sampler against references written plainly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.penalties import Penalties, suffix_lengths
from runtime.request import Breakers, SamplingParams
from runtime.sampler import Sampler, candidates
from tests.runtime import plain_sampler

SIZE = 50
Scores = NDArray[np.float32]


def scores(seed: int, size: int = SIZE) -> Scores:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def by_token(logits: Scores) -> dict[int, float]:
    return {i: float(s) for i, s in enumerate(logits)}


CHAINS = [
    SamplingParams(),
    SamplingParams(temperature=0.2, top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.5, top_k=5),
    SamplingParams(min_p=0.1, top_p=0.95),
    SamplingParams(typical_p=0.6),
    SamplingParams(typical_p=0.9, top_p=0.8, temperature=2.0),
    SamplingParams(xtc_probability=0.5, xtc_threshold=0.05),
    SamplingParams(top_k=20, typical_p=0.95, top_p=0.9, min_p=0.02, xtc_probability=0.7, temperature=1.2),
]


@pytest.mark.parametrize("params", CHAINS, ids=str)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits, draws = scores(3), 20_000
    sampler = Sampler(replace(params, seed=11), num_prompt=1)
    expected = plain_sampler.distribution(by_token(logits), params)
    counts = np.zeros(SIZE)
    for _ in range(draws):
        counts[sampler.draw(logits, [0])] += 1
    assert set(np.flatnonzero(counts)) <= set(expected)
    likely = {i: q for i, q in expected.items() if q * draws >= 20}
    chi2 = sum((counts[i] - q * draws) ** 2 / (q * draws) for i, q in likely.items())
    assert chi2 < len(likely) + 5 * np.sqrt(2 * len(likely)), "five sigma of a chi-squared variable"


chains = st.builds(
    SamplingParams,
    top_k=st.sampled_from([0, 0, 1, 7, 2000]),
    typical_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    xtc_probability=st.sampled_from([0.0, 1.0]),
    xtc_threshold=st.sampled_from([0.02, 0.1, 0.3, 0.6]),
    temperature=st.floats(0.1, 3),
)


@given(chains, st.integers(0, 1000), st.sampled_from([2, SIZE, 3000]), st.integers(0, 20), st.floats(0.2, 4))
def test_what_the_cuts_leave_is_what_loops_leave(
    params: SamplingParams, seed: int, size: int, masked: int, spread: float
) -> None:
    logits = scores(seed, size) * np.float32(spread / 3)
    logits[1 : min(masked, size - 1)] = -np.inf
    expected = plain_sampler.cut(by_token(logits), params, excludes=params.xtc_probability == 1)
    ids, weights = candidates(logits, params, np.random.default_rng(0))
    total = float(weights.sum())
    got = dict(zip(range(size) if ids is None else ids.tolist(), (weights / total).tolist(), strict=True))
    # A sum that passes a limit by less than single precision may be cut one token earlier or later.
    apart = {t for t in got.keys() ^ expected.keys() if max(got.get(t, 0.0), expected.get(t, 0.0)) > 0}
    if not apart:
        assert all(math.isclose(got.get(t, 0.0), q, rel_tol=1e-3, abs_tol=1e-6) for t, q in expected.items())
    else:
        assert len(apart) == 1


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], int]:
    tokens = draw(st.lists(st.integers(0, 4), min_size=1, max_size=60))
    return tokens, draw(st.integers(1, len(tokens)))


penalties = st.builds(
    SamplingParams,
    logit_bias=st.lists(st.tuples(st.integers(0, 7), st.floats(-5, 5)), max_size=3).map(tuple),
    repeat_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    repeat_last_n=st.sampled_from([-1, 0, 1, 5, 64]),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_base=st.sampled_from([1.0, 1.75]),
    dry_allowed_length=st.integers(0, 4),
    dry_penalty_last_n=st.sampled_from([-1, 0, 1, 10, 64]),
)
breaker_maps = st.dictionaries(
    st.integers(0, 4), st.lists(st.lists(st.integers(0, 4), max_size=2).map(tuple), min_size=1, max_size=2).map(tuple),
    max_size=2,
)  # fmt: skip


@given(histories(), penalties, breaker_maps)
def test_penalties_are_what_loops_take_off(
    history: tuple[list[int], int], params: SamplingParams, breakers: Breakers
) -> None:
    tokens, num_prompt = history
    ours = Penalties(params, num_prompt=num_prompt, breakers=breakers)
    for end in range(num_prompt, len(tokens) + 1):
        if end % 3 == 2 and end < len(tokens):
            continue  # several tokens may come in one step
        logits = scores(end, 8)
        expected = plain_sampler.penalized(logits.tolist(), params, tokens[:end], num_prompt, breakers)
        ours.apply(logits, tokens[:end])
        assert np.allclose(logits, list(expected.values()), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_suffix_lengths_are_what_loops_find(tokens: list[int]) -> None:
    for i, length in enumerate(suffix_lengths(tokens)):
        assert tokens[i + 1 - length : i + 1] == tokens[len(tokens) - length :]
        longer = length + 1
        assert longer > i + 1 or tokens[i + 1 - longer : i + 1] != tokens[len(tokens) - longer :]


def test_a_large_vocabulary_takes_the_same_head() -> None:
    logits = scores(5, 60_000)
    params = SamplingParams(temperature=0.6, top_p=0.5)
    expected = plain_sampler.distribution(by_token(logits), params)
    ids, _ = candidates(logits, params, np.random.default_rng(0))
    assert ids is not None
    assert set(ids.tolist()) == set(expected)


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[7, 4999]] = 0
    sampler = Sampler(SamplingParams(seed=1), num_prompt=1)
    assert {sampler.draw(logits, [0]) for _ in range(200)} == {7, 4999}


@given(st.integers(0, 1000))
def test_temperature_zero_is_argmax(seed: int) -> None:
    assert Sampler(SamplingParams(temperature=0), num_prompt=1).draw(scores(seed), [0]) == int(scores(seed).argmax())


def test_a_seed_repeats() -> None:
    params = SamplingParams(temperature=1.3, seed=7)
    runs = [[s.draw(scores(i), [0]) for i in range(30)] for s in (Sampler(params, num_prompt=1) for _ in range(2))]
    assert runs[0] == runs[1]


def test_extreme_settings_draw_something() -> None:
    for params in (SamplingParams(temperature=1e-300), SamplingParams(top_p=0), SamplingParams(min_p=1, typical_p=0)):
        assert Sampler(params, num_prompt=1).draw(scores(1), [0]) in range(SIZE)
    dry = SamplingParams(temperature=0, dry_multiplier=100, dry_base=100, dry_penalty_last_n=-1)
    assert Sampler(dry, num_prompt=500).draw(scores(1), [3] * 500) != 3


def test_scores_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(BackendError):
        Sampler(SamplingParams(), num_prompt=1).draw(np.full(5, np.nan, np.float32), [0])
