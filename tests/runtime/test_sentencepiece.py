"""SentencePiece vocabularies put a space before every text: no answer, prompt or forced text gains or loses one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions, LlamaTokenizer
from runtime.engine import Engine
from runtime.grammar import Grammar, Grammars
from runtime.request import Constraint, FinishReason, Request, RequestId, SamplingParams
from tests.runtime.tiny_models import make_tiny
from tests.support import CollectingSink

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "the water": {"enum": ["the sea", "of the boat", "ü 🌊 the pump"]},
        "is open": {"type": "boolean"},
        "s": {"type": "string", "maxLength": 6},
    },
    "required": ["the water", "is open", "s"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "qwen2")


@pytest.fixture(scope="module")
def backend(weights: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend(weights, LlamaOptions(1, 4, 64, 1024, 1 << 30))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def tokenizer(weights: Path) -> Iterator[LlamaTokenizer]:
    backend = LlamaBackend(weights, LlamaOptions(1, 1, 8, 256, 1 << 30))
    yield backend.tokenizer
    backend.close()


texts = st.lists(st.sampled_from([" ", "the", " the", "water", "ing", "\n", "é", "🌊", "</s>", "x", "\x02"])).map(
    "".join
)


@given(texts, texts)
@settings(deadline=None)
def test_what_goes_on_from_a_text_is_what_its_tokens_say(tokenizer: LlamaTokenizer, text: str, more: str) -> None:
    first = tokenizer.encode(text, add_special=True, parse_special=False)
    rest = tokenizer.encode(more, add_special=False, parse_special=False)
    said = b"".join(tokenizer.piece(t) for t in first).decode()
    assert said == (" " + text if text else "")
    assert b"".join(tokenizer.piece(t) for t in rest).decode() == more


def answers(backend: LlamaBackend, grammar: Grammar, *, logprobs: int | None) -> list[tuple[str, tuple[int, ...]]]:
    """Of four requests beside each other; with log-probabilities, nothing is taken without being drawn."""
    backend.clear()
    engine = Engine(backend, sink := CollectingSink(), max_queue=9)
    for i in range(4):
        prompt = backend.tokenizer.encode("the boat " * (i + 1), add_special=True, parse_special=False)
        params = SamplingParams(temperature=1.2, seed=i, logprobs=logprobs)
        request = Request(RequestId(i), tuple(prompt), 200, params, return_tokens=True, grammar=grammar)
        engine.submit(request)
    while engine.advance():
        pass
    assert not sink.failures
    assert {d.finish_reason for d in sink.last.values()} == {FinishReason.STOP}
    return [(sink.texts[RequestId(i)], (d.tokens or ())[d.num_prompt :]) for i, d in sorted(sink.last.items())]


def test_forced_text_has_no_spaces_of_its_own(backend: LlamaBackend) -> None:
    grammars = Grammars(backend.tokenizer, backend.facts.vocab_size)
    grammar = grammars.compile(Constraint("json_schema", json.dumps(SCHEMA)))
    jumped = answers(backend, grammar, logprobs=None)
    for text, tokens in jumped:
        jsonschema.validate(json.loads(text), SCHEMA)
        said = b"".join(backend.tokenizer.piece(t) for t in tokens)
        assert said.decode() == text
    assert answers(backend, grammar, logprobs=0) == jumped


def test_a_choice_is_answered_as_it_is_written(backend: LlamaBackend) -> None:
    grammars = Grammars(backend.tokenizer, backend.facts.vocab_size)
    for choice in ("the water", " the water", "  of\nthe pump"):
        grammar = grammars.compile(Constraint("choice", json.dumps([choice])))
        assert {text for text, _ in answers(backend, grammar, logprobs=None)} == {choice}
