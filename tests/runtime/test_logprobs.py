"""Log-probabilities of an answer's tokens."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from runtime.backends.base import Capabilities
from runtime.batch import Batch
from runtime.engine import Delta, Engine, Failure
from runtime.logprobs import LEAST_LOGPROB, measure
from runtime.request import Echo, FinishReason, Request, RequestId, SamplingParams, TokenLogprob
from tests.support import CollectingSink, ScriptedBackend


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 20), st.data())
def test_figures_are_those_of_a_plain_softmax(scores: list[float], num_top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(scores) - 1))
    total = math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores)
    logprob, top = measure(np.array(scores, np.float32), token, num_top)
    assert math.isclose(logprob, scores[token] - total, abs_tol=1e-4)
    best = sorted(scores, reverse=True)[:num_top]
    assert np.allclose([p for _, p in top], [s - total for s in best], atol=1e-4)
    assert all(math.isclose(scores[t] - total, p, abs_tol=1e-4) for t, p in top)


def test_what_cannot_be_is_a_number() -> None:
    assert measure(np.array([0, -np.inf], np.float32), 1, 2) == (LEAST_LOGPROB, [(0, 0.0), (1, LEAST_LOGPROB)])


class LogprobSink(CollectingSink):
    """Checks after each step that what is reported lies within the text that was passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[TokenLogprob] = []

    @override
    def deliver(self, deltas: list[Delta], failures: list[Failure]) -> None:
        super().deliver(deltas, failures)
        for d in deltas:
            self.logprobs += d.logprobs or ()
            text = self.texts[d.request_id]
            assert d.logprobs is None or b"".join(t.token for t in self.logprobs).decode() == text


class NoisyBackend(ScriptedBackend):
    """Its scores are a hash's, all different."""

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        rows = super().decode(batch)
        best = rows.argmax(axis=1)
        noisy = rows + np.linspace(0, 0.5, rows.shape[1], dtype=np.float32)
        assert (noisy.argmax(axis=1) == best).all()
        return noisy


def answer(params: SamplingParams, *, stop: tuple[str, ...] = ()) -> LogprobSink:
    backend = NoisyBackend(Capabilities(2, 500, 500, 32))
    engine = Engine(backend, sink := LogprobSink(), max_queue=5)
    engine.submit(Request(RequestId(1), (5, 6, 7), 30, params, stop=stop, ignore_eos=True))
    while engine.advance():
        pass
    return sink


def test_each_token_is_reported_as_the_model_saw_it() -> None:
    plain = answer(SamplingParams(temperature=0, logprobs=3))
    assert len(plain.logprobs) == 30
    assert b"".join(t.token for t in plain.logprobs).decode() == plain.texts[RequestId(1)]
    assert [t.offset for t in plain.logprobs] == list(range(30))
    assert all(t.top[0] == (t.token, t.logprob) and len(t.top) == 3 for t in plain.logprobs)
    biased = answer(SamplingParams(temperature=0, logprobs=0, logit_bias=((9, 50.0),)))
    assert {t.token for t in biased.logprobs} == {chr(0x4E00 + 9).encode()}
    assert all(t.logprob < -1 and not t.top for t in biased.logprobs), "the bias is no opinion of the model's"


def test_nothing_is_reported_beyond_a_stop_string() -> None:
    whole = answer(SamplingParams(temperature=0, logprobs=1)).texts[RequestId(1)]
    cut = answer(SamplingParams(temperature=0, logprobs=1), stop=(whole[7:10],))
    assert cut.last[RequestId(1)].finish_reason is FinishReason.STOP
    assert b"".join(t.token for t in cut.logprobs).decode() == cut.texts[RequestId(1)] == whole[:7]


def test_who_does_not_ask_gets_none() -> None:
    assert answer(SamplingParams(temperature=0)).last[RequestId(1)].logprobs is None


# ---------------------------------------------------------------- echoed prompts


def echo_of(engine_limits: Capabilities, prompts: list[tuple[int, ...]], *, max_tokens: int) -> list[Echo]:
    """What is told of each prompt, where all are asked for at once, twice each."""
    backend = NoisyBackend(engine_limits)
    engine = Engine(backend, sink := EchoSink(), max_queue=50)
    params = SamplingParams(temperature=0, logprobs=2)
    for i, prompt in enumerate([*prompts, *prompts]):
        text = "".join(chr(0x4E00 + t) for t in prompt)
        engine.submit(Request(RequestId(i), prompt, max_tokens, params, ignore_eos=True, echo=text))
    while engine.advance():
        pass
    assert all(sink.last[RequestId(i)].num_output == max_tokens for i in range(2 * len(prompts)))
    assert all(sink.last[RequestId(i)].num_cached == 0 for i in range(2 * len(prompts))), "each is computed whole"
    return [sink.echoes[RequestId(i)] for i in range(2 * len(prompts))]


class EchoSink(CollectingSink):
    """Sees that a prompt comes once, and before the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.echoes: dict[RequestId, Echo] = {}

    @override
    def deliver(self, deltas: list[Delta], failures: list[Failure]) -> None:
        for d in deltas:
            if d.echo is not None:
                assert not self.texts.get(d.request_id)
                assert d.request_id not in self.echoes
                self.echoes[d.request_id] = d.echo
        super().deliver(deltas, failures)


def expected_echo(prompt: tuple[int, ...]) -> Echo:
    """The same, computed plainly."""
    backend, found = NoisyBackend(Capabilities(1, 500, 500, 32)), list[TokenLogprob]()
    for i in range(1, len(prompt)):
        row = backend.scores(list(prompt[:i])) + np.linspace(0, 0.5, 97, dtype=np.float32)
        logprob, top = measure(row, prompt[i], 2)
        named = tuple((backend.tokenizer.piece(t) or b"<end>", p) for t, p in top)
        found.append(TokenLogprob(backend.tokenizer.piece(prompt[i]), logprob, named, i))
    text = "".join(chr(0x4E00 + t) for t in prompt)
    return Echo(text, backend.tokenizer.piece(prompt[0]), tuple(found))


@given(
    st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=100).map(tuple), min_size=1, max_size=4),
    st.sampled_from([Capabilities(2, 250, 250, 32), Capabilities(4, 120, 120, 7), Capabilities(3, 300, 150, 64)]),
    st.integers(0, 12),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_every_token_of_an_echoed_prompt_is_reported_once_as_the_model_saw_it(
    prompts: list[tuple[int, ...]], limits: Capabilities, max_tokens: int
) -> None:
    """Also where prompts give way to each other, and where another request has computed the same."""
    echoes = echo_of(limits, prompts, max_tokens=max_tokens)
    assert echoes == [expected_echo(p) for p in prompts] * 2


def test_a_prompt_is_echoed_without_figures_for_who_wants_none() -> None:
    engine = Engine(NoisyBackend(Capabilities(2, 500, 500, 32)), sink := EchoSink(), max_queue=5)
    engine.submit(Request(RequestId(1), (5, 6, 7), 3, SamplingParams(temperature=0), echo="what was asked"))
    while engine.advance():
        pass
    assert sink.echoes == {RequestId(1): Echo("what was asked")}
