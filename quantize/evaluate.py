"""How far a quantized model is from its source: perplexity, KL divergence, agreement, speed.

Windows as llama.cpp's perplexity tool cuts them (`tools/perplexity/perplexity.cpp`): the text in pieces of the window's
length, each read from an empty context behind the tokenizer's first token, and only its second half scored, so that
every scored token has half a window before it. So the perplexities here compare with those published.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import RecipeError
from edge.store.goldens import Goldens, GoldenText

from .gguf.llama import ScoringModel

VERSION = 1
"""Of the measurement; part of the key under which a result is cached."""

WINDOW_TOKENS = 512
_ROWS_AT_ONCE = 32  # Of a vocabulary of 32k: 4 MB an array, which stays in the cache.
GOLDEN_TOKENS, NUM_GOLDENS = 24, 2
_PREFILL_REPEATS, _DECODE_TOKENS = 3, 48


class Estimate(msgspec.Struct, frozen=True):
    """A mean and its standard error.

    The error is that of the windows' means (clusters), because neighbouring tokens are not independent; with one window
    it is NaN, which JSON has as null.
    """

    value: float
    error: float | None


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """A model against its source on one text.

    Attributes:
        perplexity_ratio: Of the model to the source, token by token, so its error is far below those of the two.
        kld_mean: KL divergence from the source's distribution to the model's, in nats a token.
        top1_agreement: Share of tokens after which both put the same token first.
    """

    num_tokens_scored: int
    num_windows: int
    window_tokens: int
    perplexity: Estimate
    source_perplexity: Estimate
    perplexity_ratio: Estimate
    kld_mean: Estimate
    kld_median: float
    kld_p99: float
    kld_max: float
    top1_agreement: Estimate


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one sequence on this machine's CPU.

    Prefill is the best of three, decode the median step: another process's work on the same cores disturbs them least.

    Attributes:
        cpu_share: CPU time the threads had, of what they could have had. Well below 1, others were at work on the
            cores, and the speeds are lower than this machine's.
    """

    prefill_tok_s: float
    decode_tok_s: float
    prefill_tokens: int
    decode_tokens: int
    num_threads: int
    cpu_share: float


class WindowScores(msgspec.Struct, frozen=True):
    """Per scored token of one window; arrays of equal length."""

    source_nll: NDArray[np.float64]
    model_nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    agrees: NDArray[np.float64]


def _compare_rows(
    source: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.int32]
) -> tuple[NDArray[np.float64], ...]:
    # With x the logits less their maximum and Z the sum of their exponentials, log p = x - log Z; so the divergence is
    # sum(exp(xp) (xp - xq)) / Zp - log Zp + log Zq, and each array is walked over once. float32 with numpy's pairwise
    # sums is off by about 1e-6 nats, a thousandth of what Q8_0 costs.
    xp, xq = (x - x.max(axis=-1, keepdims=True) for x in (source, model))
    ep = np.exp(xp)
    zp, log_zq = ep.sum(axis=-1), np.log(np.exp(xq).sum(axis=-1))
    index, log_zp = np.arange(len(targets)), np.log(zp)
    kld = (ep * (xp - xq)).sum(axis=-1) / zp - log_zp + log_zq
    agrees = source.argmax(axis=-1) == model.argmax(axis=-1)
    columns = (log_zp - xp[index, targets], log_zq - xq[index, targets], np.maximum(kld, 0), agrees)
    return tuple(column.astype(np.float64) for column in columns)


def compare(source: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.int32]) -> WindowScores:
    """Score two models' logits for the same tokens.

    Args:
        source: Shape ``(tokens, vocab)``.
        model: The same shape.
        targets: The tokens that came, shape ``(tokens,)``.
    """
    chunks = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(targets), _ROWS_AT_ONCE)]
    parts = [_compare_rows(source[rows], model[rows], targets[rows]) for rows in chunks]
    return WindowScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _estimate(columns: list[NDArray[np.float64]]) -> Estimate:
    means = [float(column.mean()) for column in columns]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Estimate(statistics.fmean(means), error)


def _exponential(log: Estimate) -> Estimate:
    value = math.exp(log.value)
    return Estimate(value, None if log.error is None else value * log.error)


def summarize(windows: list[WindowScores], *, window_tokens: int) -> Quality:
    """The figures of a report out of all windows, each of which has the same number of scored tokens."""
    kld = np.concatenate([w.kld for w in windows])
    return Quality(
        num_tokens_scored=len(kld),
        num_windows=len(windows),
        window_tokens=window_tokens,
        perplexity=_exponential(_estimate([w.model_nll for w in windows])),
        source_perplexity=_exponential(_estimate([w.source_nll for w in windows])),
        perplexity_ratio=_exponential(_estimate([w.model_nll - w.source_nll for w in windows])),
        kld_mean=_estimate([w.kld for w in windows]),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.quantile(kld, 0.99)),
        kld_max=float(kld.max()),
        top1_agreement=_estimate([w.agrees for w in windows]),
    )


def cut_windows(tokens: list[int], *, window_tokens: int, num_tokens: int, first: int | None) -> list[list[int]]:
    """Windows of a text, at most `num_tokens` in all and at least one, each begun with the tokenizer's first token.

    Raises:
        RecipeError: The text is shorter than one window.
    """
    count = min(len(tokens) // window_tokens, max(num_tokens // window_tokens, 1))
    if count == 0:
        raise RecipeError(f"The text has {len(tokens)} tokens, fewer than one window of {window_tokens}.")
    windows = [tokens[i * window_tokens : (i + 1) * window_tokens] for i in range(count)]
    return windows if first is None else [[first, *window[1:]] for window in windows]


def _faster_threads(model: ScoringModel, window: list[int], num_threads: int) -> int:
    """All threads or one. A busy core makes the others spin at each of a graph's barriers: 2 threads beside one foreign
    process were 5 to 8 times slower than 1 (measured on 2 cores)."""
    seconds: dict[int, float] = {}
    for count in (num_threads, 1):
        model.use_threads(count)
        began = time.perf_counter()
        model.logits(window, scored_from=len(window) - 1)
        seconds[count] = time.perf_counter() - began
    return min(seconds, key=seconds.__getitem__)


def measure_quality(
    source_path: Path,
    model_path: Path,
    *,
    text: str,
    num_tokens: int,
    num_threads: int,
    on_progress: Callable[[float], None],
) -> Quality:
    """Compare a model with its source, window by window; two windows' logits are all that is held.

    Raises:
        BackendError: A model cannot be loaded or run.
        RecipeError: The two do not share a vocabulary.
    """
    with (
        ScoringModel(source_path, window_tokens=WINDOW_TOKENS, num_threads=num_threads) as source,
        ScoringModel(model_path, window_tokens=WINDOW_TOKENS, num_threads=num_threads) as model,
    ):
        if (source.num_vocab, source.window_tokens) != (model.num_vocab, model.window_tokens):
            raise RecipeError("The two models do not share a vocabulary and a context, so they cannot be compared.")
        size = source.window_tokens
        windows = cut_windows(
            source.tokenize(text), window_tokens=size, num_tokens=num_tokens, first=source.first_token
        )
        threads = _faster_threads(source, windows[0], num_threads)
        for each in (source, model):
            each.use_threads(threads)
        scores: list[WindowScores] = []
        for i, window in enumerate(windows):
            targets = np.array(window[size // 2 + 1 :], np.int32)
            pair = [m.logits(window, scored_from=size // 2)[: len(targets)] for m in (source, model)]
            scores.append(compare(pair[0], pair[1], targets))
            on_progress((i + 1) / len(windows))
        return summarize(scores, window_tokens=size)


def measure_goldens(path: Path, *, text: str, num_threads: int) -> Goldens:
    """What a model thinks of the beginning of a text, for devices to compare with.

    Raises:
        BackendError: The model cannot be loaded or run.
    """
    with ScoringModel(path, window_tokens=WINDOW_TOKENS, num_threads=num_threads) as model:
        tokens = model.tokenize(text)
        windows = [tokens[i * GOLDEN_TOKENS : (i + 1) * GOLDEN_TOKENS] for i in range(NUM_GOLDENS)]
        return Goldens(texts=[_golden(model, window) for window in windows if len(window) > 1])


def _golden(model: ScoringModel, tokens: list[int]) -> GoldenText:
    scores = model.logits(tokens, scored_from=0)[:-1].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(tokens) - 1), tokens[1:]] - np.log(np.exp(scores).sum(axis=1))
    return GoldenText(tokens=tokens, logprobs=[round(float(value), 4) for value in chosen])


def _tokens_per_second(seconds: Iterable[float]) -> float:
    return 1 / statistics.median(seconds)


def measure_speed(path: Path, *, text: str, num_threads: int) -> Speed:
    """Time one sequence: reading a prompt, then one token at a time.

    Raises:
        BackendError: The model cannot be loaded or run.
    """
    with ScoringModel(path, window_tokens=WINDOW_TOKENS, num_threads=num_threads) as model:
        tokens = model.tokenize(text)[: model.window_tokens]
        cut = len(tokens) - min(_DECODE_TOKENS, len(tokens) // 2)
        prompt, rest = tokens[:cut], tokens[cut:]
        began, cpu_began = time.perf_counter(), time.process_time()
        prefill = max(model.prefill_rate(prompt, repeats=_PREFILL_REPEATS))
        decode = _tokens_per_second(list(model.decode_seconds(rest, at=len(prompt))))
        share = (time.process_time() - cpu_began) / (time.perf_counter() - began) / num_threads
        return Speed(
            prefill_tok_s=round(prefill, 1),
            decode_tok_s=round(decode, 1),
            prefill_tokens=len(prompt),
            decode_tokens=len(rest),
            num_threads=num_threads,
            cpu_share=round(share, 2),
        )
