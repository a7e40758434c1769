"""The figures of a report, against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import RecipeError
from quantize.evaluate import compare, cut_windows, summarize

Logits = NDArray[np.float32]


def logits(seed: int, *, rows: int = 70, vocab: int = 300, scale: float = 4.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def close(value: float, expected: float, *, absolute: float = 2e-5, relative: float = 1e-4) -> bool:
    return math.isclose(value, expected, rel_tol=relative, abs_tol=absolute)


def log_softmax(row: Logits) -> NDArray[np.float64]:
    exact = row.astype(np.float64)
    return exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())


@given(st.integers(0, 1000), st.floats(0.01, 3.0))
def test_scores_are_those_of_the_plain_formulas(seed: int, noise: float) -> None:
    source = logits(seed)
    model = source + logits(seed + 1, scale=noise)
    targets = np.random.default_rng(seed).integers(0, 300, 70).astype(np.int32)
    scores = compare(source, model, targets)
    for i, target in enumerate(targets):
        p, q = log_softmax(source[i]), log_softmax(model[i])
        assert close(scores.kld[i], float((np.exp(p) * (p - q)).sum()))
        assert close(scores.source_nll[i], -float(p[target]))
        assert close(scores.model_nll[i], -float(q[target]))
        assert scores.agrees[i] == (source[i].argmax() == model[i].argmax())


def test_a_model_does_not_differ_from_itself() -> None:
    same = logits(7)
    quality = summarize([compare(same, same, np.zeros(70, np.int32))] * 3, window_tokens=140)
    assert quality.kld_mean.value == 0
    assert quality.kld_max == 0
    assert quality.top1_agreement.value == 1
    assert quality.perplexity_ratio.value == 1
    assert quality.perplexity_ratio.error == 0


def test_the_error_is_that_of_the_windows_means() -> None:
    scores = [compare(logits(i), logits(i + 10), np.zeros(70, np.int32)) for i in range(4)]
    quality = summarize(scores, window_tokens=140)
    means = np.array([s.kld.mean() for s in scores])
    assert close(quality.kld_mean.value, means.mean())
    assert quality.kld_mean.error is not None
    assert close(quality.kld_mean.error, means.std(ddof=1) / 2)
    assert quality.num_tokens_scored == 280
    assert close(quality.perplexity.value, float(np.exp(np.mean([s.model_nll for s in scores]))))


def test_one_window_has_no_error() -> None:
    quality = summarize([compare(logits(1), logits(2), np.zeros(70, np.int32))], window_tokens=140)
    assert quality.kld_mean.error is None


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 3000), st.none() | st.just(-1))
def test_windows_tile_the_text(length: int, window: int, wanted: int, first: int | None) -> None:
    if length < window:
        with pytest.raises(RecipeError, match="fewer than one window"):
            cut_windows(list(range(length)), window_tokens=window, num_tokens=wanted, first=first)
        return
    windows = cut_windows(list(range(length)), window_tokens=window, num_tokens=wanted, first=first)
    assert len(windows) == min(length // window, max(wanted // window, 1))
    for i, tokens in enumerate(windows):
        whole = list(range(i * window, (i + 1) * window))
        assert tokens == (whole if first is None else [first, *whole[1:]])
