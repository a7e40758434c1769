"""Laws of speculation: guesses follow the text, and they never cost more than their allowance."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from runtime.backends.base import Capabilities
from runtime.batch import Batch, Chunk
from runtime.engine import Engine
from runtime.ngram import MAX_MATCH, MAX_NGRAMS, NGRAM, Lookup
from runtime.request import Adapter, Request, RequestId, SamplingParams, TokenId
from runtime.sequence import Sequence
from runtime.speculate import ALLOWANCE, START, WIDTHS, AdaptiveSpeculator, SpeculationStats
from runtime.step_cost import StepCosts
from tests.support import CollectingSink, ScriptedBackend

Cost = Callable[[int], float]
FLAT: Cost = lambda n: 0.005 + 0.0005 * n  # noqa: E731  # a table of machines reads best as formulas
Q8_0: Cost = lambda n: float(np.interp(n, (1, 2, 4, 8, 16, 32, 64), (7, 15.5, 22.8, 27.8, 34.7, 66, 114))) / 1000  # noqa: E731
STRAIGHT: Cost = lambda n: 0.005 * n  # noqa: E731

texts = st.lists(st.integers(0, 3), min_size=2, max_size=200)


@given(texts, st.data())
def test_what_is_guessed_followed_the_same_tokens_before(tokens: list[int], data: st.DataObject) -> None:
    lookup, at = Lookup(), data.draw(st.integers(1, len(tokens)))
    lookup.follow(tokens[:at])
    while at < len(tokens):
        guesses = lookup.guess(tokens[:at], 5)
        before = lookup.matched
        assert before <= MAX_MATCH
        if guesses and before:
            tail = tokens[max(0, at - before) : at]
            places = [i for i in range(len(tail), at) if tokens[i - len(tail) : i] == tail]
            assert any((tokens[i:at] * 5)[:5] == guesses for i in places)
        outcomes = lookup.follow(tokens[: at + 1])
        assert outcomes == ([(before, guesses[0] == tokens[at])] if guesses else [])
        at += 1


@given(texts)
def test_a_text_taken_at_once_is_looked_up_as_one_taken_token_by_token(tokens: list[int]) -> None:
    at_once, one_by_one = Lookup(), Lookup()
    at_once.follow(tokens)
    for end in range(1, len(tokens) + 1):
        one_by_one.follow(tokens[:end])
    if at_once.matched >= NGRAM:
        assert at_once.guess(tokens, 9) == one_by_one.guess(tokens, 9) or one_by_one.matched > at_once.matched


def test_a_long_text_takes_no_more_memory_than_agreed() -> None:
    rng = random.Random(1)
    tokens = [rng.randrange(50_000) for _ in range(MAX_NGRAMS + 5000)]
    lookup = Lookup()
    lookup.follow(tokens)
    for _ in range(100):
        tokens.append(rng.randrange(50_000))
        lookup.follow(tokens)
    assert len(lookup._index) <= MAX_NGRAMS  # pyright: ignore[reportPrivateUsage]  # nothing else shows the memory


# ---------------------------------------------------------------- time


@dataclass
class Machine:
    """Steps of scripted cost, one text decoded after the other."""

    cost: Cost
    speculator: AdaptiveSpeculator = field(default_factory=AdaptiveSpeculator)
    seconds: float = 0.0
    plain_seconds: float = 0.0
    dearest_loss: float = 0.0
    costs: StepCosts = field(default_factory=StepCosts)

    def decode(self, prompt: list[TokenId], answer: list[TokenId]) -> None:
        """Draw an answer, with as many steps as it takes."""
        sequence = Sequence(Request(RequestId(0), tuple(prompt), len(answer) + 1), 0)
        left = list(answer)
        while left:
            self.speculator.plan([sequence], costs=self.costs, threads=2)
            guesses = sequence.draft
            right = next((i for i, (g, t) in enumerate(zip(guesses, left, strict=False)) if g != t), len(guesses))
            num_drawn = min(right + 1, len(left))
            self._step(sequence, 1 + len(guesses), num_drawn)
            sequence.tokens += left[:num_drawn]
            left = left[num_drawn:]

    def _step(self, sequence: Sequence, width: int, num_drawn: int) -> None:
        seconds = self.cost(width)
        self.seconds += seconds
        self.plain_seconds += num_drawn * self.cost(1)
        self.dearest_loss = max(self.dearest_loss, seconds - num_drawn * self.cost(1))
        batch = Batch((), (Chunk(sequence, 0, 0, [0] * width, num_logits=width),))
        self.costs.record(width, threads=2, seconds=seconds)
        self.speculator.learn(batch, [num_drawn - 1], seconds=seconds, costs=self.costs, threads=2)


@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=12),
    st.lists(st.floats(0, 3), min_size=len(WIDTHS), max_size=len(WIDTHS)),
)
@settings(max_examples=150, deadline=None)
def test_no_text_on_no_machine_takes_longer_than_agreed(
    texts: list[tuple[list[int], list[int]]], steps: list[float]
) -> None:
    heights = np.cumsum([1.0, *steps])
    machine = Machine(lambda n: float(np.interp(n, (1, *WIDTHS), heights)))
    for prompt, answer in texts * 3:
        machine.decode(prompt, answer)
    assert machine.seconds <= (1 + ALLOWANCE) * machine.plain_seconds + START + machine.dearest_loss + 1e-6


COPIED = random.Random(2).choices(range(400), k=160)


def edited(rng: random.Random) -> list[int]:
    return [rng.randrange(400) if rng.random() < 0.05 else t for t in COPIED]


@pytest.mark.parametrize(("cost", "gain"), [(FLAT, 4.0), (Q8_0, 2.2)], ids=["flat", "q8_0"])
def test_a_copied_text_is_drawn_several_times_as_fast(cost: Cost, gain: float) -> None:
    machine = Machine(cost)
    for _ in range(6):
        machine.decode(COPIED, COPIED)
    assert machine.plain_seconds > gain * machine.seconds


def test_a_text_copied_with_edits_is_drawn_faster() -> None:
    machine, rng = Machine(Q8_0), random.Random(3)
    for _ in range(6):
        machine.decode(COPIED, edited(rng))
    assert machine.plain_seconds > 1.2 * machine.seconds


@pytest.mark.parametrize("cost", [FLAT, Q8_0, STRAIGHT], ids=["flat", "q8_0", "straight"])
def test_a_text_that_repeats_nothing_costs_nothing(cost: Cost) -> None:
    machine, rng = Machine(cost), random.Random(4)
    for _ in range(6):
        machine.decode(COPIED, [rng.randrange(400) for _ in range(160)])
    assert machine.seconds <= 1.001 * machine.plain_seconds


def test_copying_where_wide_steps_do_not_pay_is_given_up() -> None:
    machine = Machine(lambda n: 0.005 * n**1.2)
    for _ in range(30):
        machine.decode(COPIED, COPIED)
    assert machine.seconds <= 1.03 * machine.plain_seconds
    assert machine.speculator.stats().num_drafted < 0.1 * 30 * len(COPIED)


# ---------------------------------------------------------------- in the engine


class CyclingBackend(ScriptedBackend):
    """Says the same twenty tokens over and over; each step takes scripted time."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(Capabilities(4, 4000, 4000, 128))
        self._cost = cost
        self.now = 0.0

    @override
    def next_token(self, cells: list[TokenId]) -> TokenId:
        return cells[-1] % 20 + 1

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.now += self._cost(batch.num_tokens)
        return super().decode(batch)


def test_sets_of_adapters_that_take_turns_are_guessed_for() -> None:
    backend, sink = CyclingBackend(Q8_0), CollectingSink()
    engine = Engine(backend, sink, max_queue=10, speculator=AdaptiveSpeculator(), clock=lambda: backend.now)
    for i in range(4):
        adapters = (Adapter("polite"),) if i % 2 else ()
        params = SamplingParams(temperature=0)
        engine.submit(Request(RequestId(i), (i + 1, 2, 3), 400, params, ignore_eos=True, adapters=adapters))
    while engine.advance():
        pass
    stats = engine.stats().speculation
    assert stats.num_accepted > 0.8 * stats.num_drafted > 0


@pytest.mark.parametrize(("cost", "verdict"), [(Q8_0, "faster"), (STRAIGHT, "as before")])
@pytest.mark.parametrize("num_clients", [1, 4])
def test_the_engine_guesses_where_it_pays(
    cost: Cost, verdict: Literal["faster", "as before"], num_clients: int
) -> None:
    def run(speculator: AdaptiveSpeculator | None) -> tuple[float, dict[RequestId, str], SpeculationStats]:
        backend, sink = CyclingBackend(cost), CollectingSink()
        engine = Engine(backend, sink, max_queue=10, speculator=speculator, clock=lambda: backend.now)
        for i in range(num_clients):
            params = SamplingParams(temperature=0)
            engine.submit(Request(RequestId(i), (i + 1, 2, 3), 400, params, ignore_eos=True))
        while engine.advance():
            pass
        return backend.now, sink.texts, engine.stats().speculation

    plain_s, plain_texts, _ = run(None)
    seconds, answers, stats = run(AdaptiveSpeculator())
    assert answers == plain_texts
    if verdict == "faster":
        assert seconds < 0.8 * plain_s
        assert stats.num_accepted > 0.8 * stats.num_drafted > 0
    else:
        assert seconds <= (1 + ALLOWANCE) * plain_s + START * cost(num_clients)
