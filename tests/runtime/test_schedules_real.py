"""Arrivals, cancels, shared prefixes, tenants and pre-emptions on the real model: the greedy law holds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from edge.store.models import ModelStore
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams
from tests.support import DEFAULT_MODEL, SEED, CollectingSink, GreedyLaw

GREEDY = SamplingParams(temperature=0)
SHARED = (
    "You look after the pumps of a small water works. Answer in few words, and say so when you do not know. ",
    "Below is a page of the log of a fishing boat in the northern sea, kept by its mate over many winters. ",
)
ASKED = ("What is a pump?", "Name three fish.", "Who keeps the log?", "Where is the sea?", "How cold is ice?")


@pytest.fixture(scope="module")
def law() -> Iterator[GreedyLaw]:
    law = GreedyLaw(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    yield law
    law.close()


def requests(law: GreedyLaw, rng: random.Random) -> list[Request]:
    encode = law.backend.tokenizer.encode
    texts = [rng.choice(SHARED) * rng.randint(0, 2) + rng.choice(ASKED) for _ in range(24)]
    return [
        Request(
            RequestId(i), tuple(encode(text, add_special=True, parse_special=False)), rng.choice([6, 50, 90]), GREEDY,
            return_tokens=True, priority=rng.choice([0, 0, 1]), tenant=rng.choice("ab"),
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def answers(sink: CollectingSink) -> dict[RequestId, list[int]]:
    """The tokens that each finished request was given."""
    return {i: list(d.tokens[d.num_prompt :]) for i, d in sink.last.items() if d.tokens is not None}


def alone(backend: LlamaBackend, asked: list[Request]) -> dict[RequestId, list[int]]:
    """The answers one after the other, each in an empty cache."""
    sink = CollectingSink()
    for request in asked:
        backend.clear()
        engine = Engine(backend, sink, max_queue=1)
        engine.submit(request)
        while engine.advance():
            pass
    backend.clear()
    return answers(sink)


def test_a_busy_engine_with_few_cells_answers_as_each_request_alone(law: GreedyLaw) -> None:
    rng = random.Random(3)
    asked = requests(law, rng)
    weights = ModelStore(SEED).get(DEFAULT_MODEL).weights
    backend = LlamaBackend(weights, LlamaOptions(1, 6, 64, 256, 4 << 30, state_bytes=64 << 20))
    expected = alone(backend, asked)
    engine = Engine(backend, sink := CollectingSink(), max_queue=100)
    arrivals = {r.id: rng.randint(0, 120) for r in asked}
    cancels = {r.id: arrivals[r.id] + rng.randint(1, 60) for r in asked if rng.random() < 0.2}
    for now in range(2000):
        for request in asked:
            if arrivals[request.id] == now:
                engine.submit(request)
            if cancels.get(request.id) == now:
                engine.cancel(request.id)
        if not engine.advance() and now > 200:
            break
    got = answers(sink)
    stats = engine.stats().queues
    backend.close()
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    assert stats.num_preemptions > 0
    assert got.keys() >= {r.id for r in asked} - cancels.keys()
    for request in asked:
        if request.id in got:
            assert law.obeys(list(request.prompt), got[request.id], expected[request.id])
    print(stats, len(got), len(cancels))
    equal = sum(got[i] == expected[i] for i in got)
    print(equal)
    assert equal >= 0.7 * len(got), f"only {equal} of {len(got)} answers are equal"
