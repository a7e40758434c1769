"""The encoder on real weights: PyTorch's vectors and scores, alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.errors import DoesNotFit, UnsupportedFormat
from runtime import wire
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.backends.llama_encoder import LlamaEncoder, choose_window
from runtime.embedding import EmbedEngine
from runtime.request import RequestId
from runtime.texts import TextMaker
from tests.runtime.embedding_texts import DOCUMENTS, GOLDEN, QUERY, TEXTS
from tests.runtime.encoders import KeepingSink

OPTIONS = LlamaOptions(threads=1, num_slots=8, step_tokens=512, context_tokens=0, available_bytes=4 << 30)


@pytest.fixture(scope="module")
def encoder(minilm_gguf: Path) -> Iterator[LlamaEncoder]:
    made = LlamaEncoder(minilm_gguf, OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ranker(reranker_gguf: Path) -> Iterator[LlamaEncoder]:
    made = LlamaEncoder(reranker_gguf, OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN) as table:
        return dict(table)


def run(encoder: LlamaEncoder, *messages: wire.Embed) -> list[NDArray[np.float32]]:
    """The rows of each message, all of them put in at once."""
    sink, maker = KeepingSink(), TextMaker(encoder)
    engine = EmbedEngine(encoder, sink, max_queue=100)
    for message in messages:
        engine.submit(maker.request(message))
    while engine.advance():
        pass
    assert not sink.failures
    rows = [sink.done[RequestId(message.id)].rows or b"" for message in messages]
    return [np.frombuffer(r, "<f4").reshape(len(m.texts), -1) for r, m in zip(rows, messages, strict=True)]


def test_vectors_are_pytorchs(encoder: LlamaEncoder, golden: dict[str, NDArray[Any]]) -> None:
    (rows,) = run(encoder, wire.Embed(1, [*TEXTS]))
    cosines = (rows * golden["vectors"]).sum(axis=1)
    assert {text: cosine for text, cosine in zip(TEXTS, cosines.tolist(), strict=True) if cosine < 0.999} == {}
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_texts_have_the_tokens_that_transformers_gives_them(
    encoder: LlamaEncoder, golden: dict[str, NDArray[Any]]
) -> None:
    made = TextMaker(encoder).request(wire.Embed(1, [*TEXTS]))
    assert [len(text.tokens) for text in made.texts] == golden["counts"].tolist()


def test_together_is_as_alone(encoder: LlamaEncoder) -> None:
    (together,) = run(encoder, wire.Embed(1, [*TEXTS]))
    alone = np.concatenate(run(encoder, *(wire.Embed(i, [text]) for i, text in enumerate(TEXTS))))
    single = np.concatenate([run(encoder, wire.Embed(1, [text]))[0] for text in TEXTS])
    assert (together * single).sum(axis=1).min() > 0.9999
    assert (alone * single).sum(axis=1).min() > 0.9999


def test_tokens_are_read_as_they_are(encoder: LlamaEncoder) -> None:
    tokens = TextMaker(encoder).request(wire.Embed(1, [TEXTS[0]])).texts[0].tokens.tolist()
    (rows,) = run(encoder, wire.Embed(1, [TEXTS[0], tokens]))
    assert rows[0] @ rows[1] > 0.9999


def test_fewer_dimensions_are_the_first_ones(encoder: LlamaEncoder) -> None:
    whole, cut = run(encoder, wire.Embed(1, [TEXTS[0]]), wire.Embed(2, [TEXTS[0]], dimensions=64))
    assert cut.shape == (1, 64)
    np.testing.assert_allclose(cut[0], whole[0, :64] / np.linalg.norm(whole[0, :64]), atol=1e-4)


def test_a_cut_text_is_its_beginning(encoder: LlamaEncoder) -> None:
    (rows,) = run(encoder, wire.Embed(1, ["word " * 1000, "word " * 510], truncate=True))
    assert rows[0] @ rows[1] > 0.9999


def test_scores_are_pytorchs(ranker: LlamaEncoder, golden: dict[str, NDArray[Any]]) -> None:
    """With the pooler, and the type of the second text's tokens, that llama.cpp leaves out by itself."""
    (rows,) = run(ranker, wire.Embed(1, [*DOCUMENTS], QUERY, raw_scores=True))
    np.testing.assert_allclose(rows[:, 0], golden["scores"], rtol=0.01)
    singles = [run(ranker, wire.Embed(1, [text], QUERY, raw_scores=True))[0][0, 0] for text in DOCUMENTS]
    np.testing.assert_allclose(rows[:, 0], singles, rtol=0.01)


def test_a_text_that_does_not_fit_the_memory_is_not_promised() -> None:
    def window(asked: int, room_bytes: int) -> int:
        return choose_window(asked=asked, trained=8192, bytes_for=lambda n: n * n, room_bytes=room_bytes)

    assert (window(0, 1 << 30), window(0, 1 << 22), window(600, 1 << 22)) == (8192, 2048, 600)
    for asked, room_bytes in ((4096, 1 << 22), (0, 100)):
        with pytest.raises(DoesNotFit):
            window(asked, room_bytes)


def test_an_encoder_is_not_opened_to_make_text(minilm_gguf: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="encoder"):
        LlamaBackend(minilm_gguf, OPTIONS)
