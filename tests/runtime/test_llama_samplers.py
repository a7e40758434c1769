"""Our samplers against llama.cpp's own, in llama-server's order: the same tokens are left, as likely.

What differs on purpose is left out here: presence and frequency count the answer alone, as OpenAI's and vLLM's do,
where llama.cpp counts the prompt too, and no more than the last tokens (so there is no prompt here, and the window
holds all); random numbers are numpy's; a temperature of 0 is argmax before any cut; and in SentencePiece vocabularies
llama.cpp looks for the rest of a sequence breaker with a space before it, which is never there.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.native.llama import bindings
from edge.store.models import ModelStore
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions, pointer_to
from runtime.penalties import Penalties, find_breakers
from runtime.request import NO_BREAKERS, Breakers, SamplingParams, TokenId
from runtime.sampler import candidates
from tests.support import DEFAULT_MODEL, SEED

Scores = NDArray[np.float32]


@pytest.fixture(scope="module")
def backend() -> Iterator[LlamaBackend]:
    backend = LlamaBackend(ModelStore(SEED).get(DEFAULT_MODEL).weights, LlamaOptions(1, 1, 8, 256, 1 << 30))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def pieces(backend: LlamaBackend) -> list[bytes]:
    return [backend.tokenizer.piece(t) for t in range(backend.facts.vocab_size)]


def scores(seed: int, size: int, *, spread: float = 3.0) -> Scores:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def window(last_n: int) -> int:
    """llama.cpp's samplers want a number where llama-server takes -1 for all."""
    return 5000 if last_n < 0 else last_n


def _samplers(lib: Any, p: SamplingParams, vocab: Any, size: int) -> Iterator[Any]:
    if p.logit_bias:
        biases = (lib.llama_logit_bias * len(p.logit_bias))(*p.logit_bias)
        yield lib.llama_sampler_init_logit_bias(size, len(p.logit_bias), biases)
    yield lib.llama_sampler_init_penalties(
        size, window(p.repeat_last_n), p.repeat_penalty, p.frequency_penalty, p.presence_penalty
    )
    if p.dry_multiplier:
        texts = [t.encode() for t in p.dry_sequence_breakers]
        breakers = (ctypes.c_char_p * len(texts))(*texts)
        last_n = window(p.dry_penalty_last_n)
        yield lib.llama_sampler_init_dry(
            vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length, last_n, breakers, len(texts)
        )
    yield lib.llama_sampler_init_top_k(p.top_k)
    yield lib.llama_sampler_init_typical(p.typical_p, 0)
    yield lib.llama_sampler_init_top_p(p.top_p, 0)
    yield lib.llama_sampler_init_min_p(p.min_p, 0)
    yield lib.llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, 0, 1)
    yield lib.llama_sampler_init_temp(p.temperature)


def theirs(logits: Scores, p: SamplingParams, tokens: list[TokenId], vocab: Any) -> dict[TokenId, float]:
    """What llama.cpp's chain leaves, and how likely each is."""
    lib = bindings()
    data = np.zeros(logits.size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    data["id"], data["logit"] = np.arange(logits.size), logits
    array = lib.llama_token_data_array(pointer_to(data, lib.llama_token_data_p), logits.size, -1, False)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in _samplers(lib, p, vocab, logits.size):
        lib.llama_sampler_chain_add(chain, sampler)
    for token in tokens:
        lib.llama_sampler_accept(chain, token)
    lib.llama_sampler_apply(chain, ctypes.byref(array))
    lib.llama_sampler_free(chain)
    first = (ctypes.addressof(array.data.contents) - data.ctypes.data) // data.itemsize  # XTC moves the beginning
    left = data[first : first + array.size]
    return shares(left["id"].tolist(), left["logit"].astype(np.float64))


def ours(logits: Scores, p: SamplingParams, tokens: list[TokenId], breakers: Breakers) -> dict[TokenId, float]:
    """The same from our samplers."""
    logits = logits.copy()
    Penalties(p, num_prompt=0, breakers=breakers).apply(logits, tokens)
    ids, weights = candidates(logits, p, np.random.default_rng(0))
    kept = range(logits.size) if ids is None else ids.tolist()
    return shares(list(kept), np.log(weights, out=np.full(weights.size, -np.inf), where=weights > 0))


def shares(ids: list[TokenId], logits: NDArray[np.float64]) -> dict[TokenId, float]:
    weights = np.exp(logits - logits.max())
    return {t: w for t, w in zip(ids, (weights / weights.sum()).tolist(), strict=True) if w > 0}


def check(got: dict[TokenId, float], expected: dict[TokenId, float]) -> None:
    """Hold one distribution against another. llama.cpp adds up a vocabulary in single precision: where a sum passes a
    limit by less than that, tokens at the border are cut or not."""
    apart = sorted(max(got.get(t, 0.0), expected.get(t, 0.0)) for t in got.keys() ^ expected.keys())
    assert sum(apart[:-2]) < 5e-4
    both = got.keys() & expected.keys()
    scale = sum(expected[t] for t in both) / sum(got[t] for t in both)
    assert math.isclose(scale, 1, abs_tol=0.05)
    assert all(math.isclose(got[t] * scale, expected[t], rel_tol=1e-3, abs_tol=1e-9) for t in both)


CUTS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.8),
    *(SamplingParams(top_k=k) for k in (1, 2, 40, 10_000)),
    *(SamplingParams(top_p=p) for p in (0.05, 0.5, 0.9, 0.99)),
    *(SamplingParams(min_p=p) for p in (0.01, 0.1, 0.7, 1.0)),
    *(SamplingParams(typical_p=p) for p in (0.05, 0.5, 0.9, 0.99)),
    *(SamplingParams(xtc_probability=1, xtc_threshold=t) for t in (0.005, 0.02, 0.1, 0.3, 0.5, 0.6)),
    SamplingParams(top_k=40, top_p=0.95, min_p=0.05, temperature=0.8),
    SamplingParams(top_k=100, typical_p=0.9, top_p=0.9, min_p=0.02, temperature=1.3),
    SamplingParams(typical_p=0.8, min_p=0.05, xtc_probability=1, xtc_threshold=0.05, temperature=0.6),
    SamplingParams(top_k=30, xtc_probability=1, xtc_threshold=0.01, top_p=0.98),
]


@pytest.mark.parametrize("size", [2, 300, 20_000])
@pytest.mark.parametrize("params", CUTS, ids=lambda p: f"{CUTS.index(p)}")
def test_cuts_leave_what_llama_cpps_leave(params: SamplingParams, size: int) -> None:
    for seed, spread in enumerate((1.0, 3.0, 8.0)):
        logits = scores(seed, size, spread=spread)
        check(ours(logits, params, [], NO_BREAKERS), theirs(logits, params, [], None))


TAKEN = [
    SamplingParams(logit_bias=((3, 5.0), (25_000, -100.0), (17, -0.5))),
    *(SamplingParams(repeat_penalty=r, repeat_last_n=n) for r in (1.3, 0.8) for n in (-1, 1, 64, 5000)),
    SamplingParams(presence_penalty=0.7, frequency_penalty=0.3, repeat_last_n=5000),
    SamplingParams(presence_penalty=-0.7, frequency_penalty=0.9, repeat_penalty=1.1, repeat_last_n=5000),
    *(SamplingParams(dry_multiplier=0.8, dry_penalty_last_n=-1, dry_allowed_length=n) for n in (1, 2, 4)),
    *(SamplingParams(dry_multiplier=0.8, dry_penalty_last_n=20, dry_allowed_length=n) for n in (1, 2, 4)),
    SamplingParams(dry_multiplier=2.0, dry_base=1.1, dry_penalty_last_n=-1, dry_sequence_breakers=()),
    SamplingParams(dry_multiplier=0.8, dry_penalty_last_n=-1, dry_sequence_breakers=("the pump", "boat: a", "\n* s")),
]  # fmt: skip
TEXT = "the pump: the boat: a sea\n* sails over water\n* the pump"
CHAIN = SamplingParams(
    logit_bias=((70, 1.0),), repeat_penalty=1.1, repeat_last_n=5000, presence_penalty=0.2, frequency_penalty=0.1,
    dry_multiplier=0.8, dry_penalty_last_n=-1, top_k=60, typical_p=0.97, top_p=0.95, min_p=0.01,
    xtc_probability=1, xtc_threshold=0.05, temperature=0.8,
)  # fmt: skip


@pytest.mark.parametrize("params", [*TAKEN, CHAIN], ids=lambda p: f"{[*TAKEN, CHAIN].index(p)}")
def test_penalties_take_off_what_llama_cpps_take_off(
    params: SamplingParams, backend: LlamaBackend, pieces: list[bytes]
) -> None:
    vocab = bindings().llama_model_get_vocab(backend._model)  # pyright: ignore[reportPrivateUsage]  # theirs want the library's own
    breakers = NO_BREAKERS
    if params.dry_multiplier:
        breakers = find_breakers(params.dry_sequence_breakers, backend.tokenizer, pieces)
    alphabet = backend.tokenizer.encode(TEXT, add_special=False, parse_special=False)
    for seed in range(3):
        tokens = np.random.default_rng(seed).choice(alphabet[: 4 + 4 * seed], 30 + 60 * seed).tolist()
        logits = scores(seed, backend.facts.vocab_size)
        logits[alphabet] += np.float32(9)  # those that are taken off from decide
        check(ours(logits, params, tokens, breakers), theirs(logits, params, tokens, vocab))
