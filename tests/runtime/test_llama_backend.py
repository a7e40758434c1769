"""The llama.cpp backend on real weights: how it cuts a step into calls changes no score."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.store.models import ModelStore
from runtime.backends.llama_cpp import NARROW_TOKENS, LlamaBackend, LlamaOptions, by_shape
from runtime.backends.llama_draft import open_drafter
from runtime.batch import TILE_TOKENS, Batch, Chunk
from runtime.request import Request, RequestId, TokenId
from runtime.sequence import Sequence
from tests.support import DEFAULT_MODEL, SEED


def opened() -> LlamaBackend:
    # Cells of more than 32 MiB, which glibc maps by themselves in a process of any age (M_MMAP_THRESHOLD, mallopt(3)).
    return LlamaBackend(ModelStore(SEED).get(DEFAULT_MODEL).weights, LlamaOptions(1, 4, 256, 2048, 4 << 30))


@pytest.fixture(scope="module")
def backend() -> Iterator[LlamaBackend]:
    made = opened()
    yield made
    made.close()


def chunk(slot: int, start: int, tokens: list[TokenId], *, num_logits: int = 1) -> Chunk:
    return Chunk(Sequence(Request(RequestId(slot), (1,), 1), slot), slot, start, tokens, num_logits=num_logits)


def lengths(calls: list[tuple[Chunk, ...]]) -> list[list[int]]:
    return [[len(c.tokens) for c in call] for call in calls]


def test_answers_are_computed_apart_from_long_prompts() -> None:
    wide = TILE_TOKENS - NARROW_TOKENS
    calls = by_shape((chunk(0, 9, [1]), chunk(1, 0, [1] * wide), chunk(2, 9, [1] * NARROW_TOKENS)))
    assert lengths(calls) == [[wide], [1, NARROW_TOKENS]]


def test_what_is_short_together_is_one_call() -> None:
    together = (chunk(0, 9, [1]), chunk(1, 0, [1] * (TILE_TOKENS - 2)))
    assert by_shape(together) == [together]
    prompts = (chunk(0, 0, [1] * 100), chunk(1, 0, [1] * 100))
    assert by_shape(prompts) == [prompts]
    answers = tuple(chunk(i, 9, [1]) for i in range(TILE_TOKENS + 1))
    assert by_shape(answers) == [answers]


def check_an_emptied_cache(backend: LlamaBackend) -> None:
    text = list(range(100, 300))
    backend.clear()
    whole = backend.promised_bytes()
    assert whole > 20 << 20
    before = backend.decode(Batch((), (chunk(0, 0, text),))).copy()
    assert backend.promised_bytes() < whole - (1 << 20)
    backend.clear()
    assert backend.promised_bytes() == whole
    assert (backend.decode(Batch((), (chunk(0, 0, text),))) == before).all()


def check_a_draft_model(backend: LlamaBackend) -> None:
    backend.clear()
    own = backend.promised_bytes()
    drafter = open_drafter(ModelStore(SEED).get(DEFAULT_MODEL).weights, backend, threads=1, available_bytes=4 << 30)
    try:
        assert backend.promised_bytes() >= own + (20 << 20)
    finally:
        drafter.close()
    assert backend.promised_bytes() == own


@pytest.mark.parametrize("check", ["check_an_emptied_cache", "check_a_draft_model"])
def test_memory_is_given_back_and_promised(check: str) -> None:
    """In a process of its own, as a worker is: in one that had many mappings the kernel joins the cells to others."""
    module = "tests.runtime.test_llama_backend"
    code = f"import {module} as t\nbackend = t.opened()\nt.{check}(backend)\nbackend.close()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_scores_are_in_the_order_of_the_chunks(backend: LlamaBackend) -> None:
    rng = np.random.default_rng(5)

    def text(size: int) -> list[TokenId]:
        return rng.integers(100, 40_000, size).tolist()

    begun = [text(20), text(100), text(40)]
    chunks = (
        chunk(0, 20, text(3), num_logits=2),
        chunk(1, 100, text(80)),
        chunk(2, 40, text(1)),
        chunk(3, 0, text(90), num_logits=0),
    )

    def after(*batch: Chunk) -> NDArray[np.float32]:
        backend.clear()
        for slot, tokens in enumerate(begun):
            backend.decode(Batch((), (chunk(slot, 0, tokens),)))
        return backend.decode(Batch((), batch)).copy()

    assert len(by_shape(chunks)) == 2
    together = after(*chunks)
    alone = np.concatenate([after(c) for c in chunks])
    assert together.shape == alone.shape == (4, backend.tokenizer.vocab_size)
    assert np.abs(together - alone).max() < 0.3
    assert (together.argmax(axis=1) == alone.argmax(axis=1)).all()
