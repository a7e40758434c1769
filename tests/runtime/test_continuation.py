"""Prompts of texts and tokens to continue, with the vocabularies of real models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge.errors import ContextOverflow, InvalidRequest
from edge.store.models import ModelStore
from runtime import wire
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.continuation import Continuer
from runtime.request import SamplingParams
from tests.runtime.tiny_models import FIM, make_tiny
from tests.support import DEFAULT_MODEL, SEED

GIB = 1 << 30


def opened(path: Path) -> LlamaBackend:
    options = LlamaOptions(threads=1, num_slots=2, step_tokens=64, context_tokens=256, available_bytes=2 * GIB)
    return LlamaBackend(path, options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaBackend]:
    """A model that fills in middles, with a SentencePiece vocabulary."""
    backend = opened(make_tiny(tmp_path_factory.mktemp("tiny") / "fim.gguf", "qwen2", fills_in=True))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def default() -> Iterator[LlamaBackend]:
    backend = opened(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    yield backend
    backend.close()


def continuer(backend: LlamaBackend, *, context_tokens: int = 200) -> Continuer:
    facts = backend.facts
    return Continuer(backend.tokenizer, bos=facts.bos, vocab_size=facts.vocab_size, context_tokens=context_tokens)


def asked(prompt: str | list[int], **more: object) -> wire.Generate:
    message = wire.Generate(1, None, prompt, SamplingParams(), 5, [])
    return msgspec.structs.replace(message, **more)


def test_a_middle_is_filled_in_between_the_marks_of_the_vocabulary(tiny: LlamaBackend) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.fim_tokens == FIM
    before, behind, middle = FIM
    tokens = continuer(tiny).prompt(asked("the sea", suffix=" boat"), room=100).tokens
    suffix = tokenizer.encode(" boat", add_special=False, parse_special=False)
    text = tokenizer.encode("the sea", add_special=True, parse_special=False)
    assert tokens == [text[0], before, *text[1:], behind, *suffix, middle]
    assert text[0] == 1, "BOS"
    assert continuer(tiny).prompt(asked([5, 6], suffix=""), room=100).tokens == [before, 5, 6, behind, middle]


def test_a_model_without_marks_refuses_a_suffix(default: LlamaBackend) -> None:
    if default.tokenizer.fim_tokens is not None:
        pytest.fail("the default model fills in middles: the test needs another one")
    with pytest.raises(InvalidRequest, match="cannot fill in a middle") as caught:
        continuer(default).prompt(asked("a", suffix="b"), room=100)
    assert caught.value.field == "suffix"


@pytest.mark.parametrize("model", ["tiny", "default"])
def test_the_beginning_goes(model: str, request: pytest.FixtureRequest) -> None:
    backend: LlamaBackend = request.getfixturevalue(model)
    text = "the boat and the sea " * 60
    begin = backend.tokenizer.encode("", add_special=True, parse_special=False)
    whole = backend.tokenizer.encode(text, add_special=True, parse_special=False)
    prompt = continuer(backend).prompt(asked(text, truncates=True, echoes=True), room=50)
    assert prompt.tokens == [*begin, *whole[len(begin) + prompt.num_dropped :]]
    assert (len(prompt.tokens), prompt.num_dropped) == (50, len(whole) - 50)
    assert prompt.echo is not None
    assert text.endswith(prompt.echo.lstrip())
    tokens = continuer(backend).prompt(asked(whole, truncates=True), room=50)
    assert (tokens.tokens, tokens.num_dropped) == (whole[-50:], len(whole) - 50)


def test_what_is_far_too_long_is_cut_unread(default: LlamaBackend) -> None:
    text = "The pump is on the boat. " * 200_000
    prompt = continuer(default).prompt(asked(text, truncates=True), room=100)
    assert len(prompt.tokens) == 100
    rate = len(default.tokenizer.encode(text[:25_000], add_special=False, parse_special=False)) / 25_000
    assert math.isclose(prompt.num_dropped, len(text) * rate - 100, rel_tol=0.1)
    with pytest.raises(ContextOverflow) as caught:
        continuer(default).prompt(asked(text), room=100)
    assert math.isclose(caught.value.prompt_tokens, len(text) * rate, rel_tol=0.1)
    assert caught.value.field == "prompt"


def test_nothing_is_left_of_a_prompt_that_has_no_room(default: LlamaBackend) -> None:
    for text, room in (("word " * 300, 0), ("word " * 300, -5)):
        with pytest.raises(ContextOverflow):
            continuer(default).prompt(asked(text, truncates=True), room=room)


@pytest.mark.parametrize("model", ["tiny", "default"])
def test_an_echo_is_what_was_sent(model: str, request: pytest.FixtureRequest) -> None:
    backend: LlamaBackend = request.getfixturevalue(model)
    text = " the pump’s — 日本 😀\n"
    assert continuer(backend).prompt(asked(text, echoes=True), room=100).echo == text
    tokens = backend.tokenizer.encode(text, add_special=False, parse_special=False)
    assert continuer(backend).prompt(asked(tokens, echoes=True), room=100).echo == text
    assert continuer(backend).prompt(asked(text), room=100).echo is None
