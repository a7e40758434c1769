"""Laws of draft models: they guess what they would say, answers do not change, and they cost no more than agreed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from edge.errors import BackendError
from runtime.backends.base import Capabilities
from runtime.batch import Batch
from runtime.drafter import ModelDrafter
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams, TokenId
from runtime.sequence import Sequence, Status
from runtime.speculate import ALLOWANCE, MOST_DRAFTED, START, AdaptiveSpeculator, SpeculationStats
from tests.runtime.drafters import NearlyBackend
from tests.support import CollectingSink, ScriptedBackend

Cost = Callable[[int], float]
FLAT: Cost = lambda n: 0.02 + 0.0005 * n  # noqa: E731  # a table of machines reads best as formulas
Q8_0: Cost = lambda n: float(np.interp(n, (1, 2, 4, 8, 16, 32, 64), (7, 15.5, 22.8, 27.8, 34.7, 66, 114))) / 1000  # noqa: E731
STRAIGHT: Cost = lambda n: 0.005 * n  # noqa: E731

WINDOW = 80


def small_drafter(*, errs_each: int = 7) -> tuple[ModelDrafter, NearlyBackend]:
    backend = NearlyBackend(Capabilities(3, 3 * WINDOW, 1000, 16), errs_each=errs_each)
    return ModelDrafter(backend, vocab_size=97, relative_cost=0.1, clock=backend.clock), backend


@given(
    lengths=st.lists(st.integers(1, WINDOW), min_size=1, max_size=5),
    asked=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), st.integers(1, 6), st.integers(0, 40)
        ),
        max_size=25,
    ),
)
@settings(max_examples=200, deadline=None)
def test_each_guess_is_what_the_model_says_of_the_text_in_view(
    lengths: list[int], asked: list[tuple[list[int], int, int]]
) -> None:
    drafter, backend = small_drafter()
    prompts = [tuple((i * 31 + k) % 97 for k in range(n)) for i, n in enumerate(lengths)]
    sequences = [Sequence(Request(RequestId(i), p, 1000), i) for i, p in enumerate(prompts)]
    for chosen, depth, growth in asked:
        present = [sequences[i % len(sequences)] for i in chosen]
        texts = [(s, list[TokenId]()) for s in dict.fromkeys(present)]
        for _ in range(depth):
            missing = [drafter.num_missing(s) or 0 for s, _ in texts]
            drafted = drafter.draft([(s, list(more)) for s, more in texts], threads=1)
            if not texts[0][1]:
                assert drafted.num_tokens <= sum(missing), "it promised to read no more"
            for (sequence, more), guess in zip(texts, drafted.guesses, strict=True):
                assert guess is not None
                if len(sequence.tokens) + MOST_DRAFTED <= WINDOW:
                    assert guess.token == backend.next_token([*sequence.tokens, *more])
                more.append(guess.token)
        for sequence, more in texts:
            sequence.tokens += [*more[: growth % (depth + 1)], *range(growth)]


def test_a_text_that_goes_on_is_read_once() -> None:
    drafter, backend = small_drafter()
    sequence = Sequence(Request(RequestId(0), tuple(range(40)), 1000), 0)
    for _ in range(20):
        drafted = drafter.draft([(sequence, [])], threads=1)
        assert drafted.guesses[0] is not None
        sequence.tokens.append(drafted.guesses[0].token)
    assert backend.num_computed == 40 + 19


def test_a_chat_that_goes_on_is_read_from_where_it_ended() -> None:
    drafter, backend = small_drafter()
    first = Sequence(Request(RequestId(0), tuple(range(40)), 1000), 0)
    drafter.draft([(first, [])], threads=1)
    other = Sequence(Request(RequestId(1), tuple(range(50)), 1000), 1)
    assert drafter.num_missing(other) == 50, "the first still needs its slot"
    first.status = Status.FINISHED
    assert drafter.num_missing(other) == 10
    before = backend.num_computed
    assert drafter.draft([(other, [])], threads=1).guesses[0] is not None
    assert backend.num_computed - before == 10


class BrokenBackend(NearlyBackend):
    """Fails when it is asked for the third time."""

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if self.num_steps == 2:
            raise BackendError("out of luck")
        return super().decode(batch)


class TimedBackend(ScriptedBackend):
    """A model whose steps take scripted time on a clock that its draft model shares."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(Capabilities(6, 6000, 6000, 128))
        self._cost = cost
        self.now = 0.0

    @override
    def clock(self) -> float:
        return self.now

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.now += self._cost(batch.num_tokens)
        return super().decode(batch)


class TimedDrafts(NearlyBackend):
    """Its draft model, which takes a share of that time."""

    def __init__(self, model: TimedBackend, *, errs_each: int, share: float) -> None:
        super().__init__(Capabilities(4, 2400, 2400, 64), errs_each=errs_each)
        self._model, self._share = model, share

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self._model.now += self._share * self._model._cost(batch.num_tokens)  # pyright: ignore[reportPrivateUsage]  # its twin
        return super().decode(batch)


def run(
    cost: Cost, *, errs_each: int | None, share: float = 0.05, num_clients: int = 1, answers: int = 3,
    params: SamplingParams | None = None,
) -> tuple[float, dict[RequestId, str], SpeculationStats]:  # fmt: skip
    """Some answers after each other, each from so many clients; seconds, texts and what was guessed."""
    backend, sink = TimedBackend(cost), CollectingSink()
    drafter = None
    if errs_each is not None:
        drafts = TimedDrafts(backend, errs_each=errs_each, share=share)
        drafter = ModelDrafter(drafts, vocab_size=97, relative_cost=share, clock=backend.clock)
    speculator = AdaptiveSpeculator(drafter) if drafter is not None else None
    engine = Engine(backend, sink, max_queue=10, speculator=speculator, clock=backend.clock)
    for turn in range(answers):
        for i in range(num_clients):
            prompt = tuple((i * 7 + turn * 11 + k) % 96 + 1 for k in range(30))
            number = RequestId(turn * 10 + i)
            engine.submit(Request(number, prompt, 200, params or SamplingParams(temperature=0), ignore_eos=True))
        while engine.advance():
            pass
    return backend.now, sink.texts, engine.stats().speculation


@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_good_draft_model_makes_answers_faster(num_clients: int) -> None:
    plain_s, plain, _ = run(FLAT, errs_each=None, num_clients=num_clients)
    seconds, texts, stats = run(FLAT, errs_each=20, num_clients=num_clients)
    assert texts == plain
    assert seconds < 0.4 * plain_s
    assert stats.num_accepted_by_model > 0.6 * stats.num_drafted_by_model > 0


def test_a_draft_model_that_errs_makes_short_guesses() -> None:
    plain_s, _, _ = run(FLAT, errs_each=None)
    seconds, _, stats = run(FLAT, errs_each=3)
    assert seconds < 0.75 * plain_s
    assert stats.num_accepted_by_model > 0.25 * stats.num_drafted_by_model > 0


@pytest.mark.parametrize("cost", [FLAT, Q8_0, STRAIGHT], ids=["flat", "q8_0", "straight"])
@pytest.mark.parametrize(
    ("errs_each", "share"), [(1, 0.05), (2, 0.5), (20, 1.5)], ids=["always wrong", "often wrong", "dear"]
)
@pytest.mark.parametrize("num_clients", [1, 4])
def test_a_draft_model_that_does_not_pay_costs_no_more_than_agreed(
    cost: Cost, errs_each: int, share: float, num_clients: int
) -> None:
    plain_s, plain, _ = run(cost, errs_each=None, num_clients=num_clients)
    seconds, texts, _ = run(cost, errs_each=errs_each, share=share, num_clients=num_clients)
    assert texts == plain
    assert seconds <= (1 + ALLOWANCE) * plain_s + START * cost(num_clients)


@given(
    heights=st.lists(st.floats(0, 3), min_size=6, max_size=6), errs_each=st.integers(1, 40),
    share=st.floats(0.001, 3), num_clients=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_no_draft_model_on_no_machine_costs_more_than_agreed(
    heights: list[float], errs_each: int, share: float, num_clients: int
) -> None:
    steps = np.cumsum([1.0, *heights])
    cost: Cost = lambda n: float(np.interp(n, (1, 2, 4, 8, 16, 64, 128), (*steps[:6], steps[5] + n)))  # noqa: E731  # as above
    plain_s, plain, _ = run(cost, errs_each=None, num_clients=num_clients, answers=2)
    seconds, texts, _ = run(cost, errs_each=errs_each, share=share, num_clients=num_clients, answers=2)
    assert texts == plain
    one_loss = cost(128) + MOST_DRAFTED * share * cost(4) + share * cost(128) * 4
    assert seconds <= (1 + ALLOWANCE) * plain_s + START * cost(num_clients) + one_loss


def test_a_draft_model_that_breaks_ends_the_guessing_and_nothing_else() -> None:
    _, plain, _ = run(FLAT, errs_each=None)
    backend, sink = TimedBackend(FLAT), CollectingSink()
    broken = BrokenBackend(Capabilities(4, 2400, 2400, 64), errs_each=9)
    drafter = ModelDrafter(broken, vocab_size=97, relative_cost=0.1, clock=backend.clock)
    engine = Engine(backend, sink, max_queue=10, speculator=AdaptiveSpeculator(drafter), clock=backend.clock)
    prompt = tuple(k % 96 + 1 for k in range(30))
    engine.submit(Request(RequestId(0), prompt, 200, SamplingParams(temperature=0), ignore_eos=True))
    while engine.advance():
        pass
    assert sink.texts[RequestId(0)] == plain[RequestId(0)]
    assert drafter.num_missing(Sequence(Request(RequestId(1), (1, 2), 3), 1)) is None


def test_draws_with_a_seed_are_those_without_guesses() -> None:
    for seed in range(4):
        params = SamplingParams(temperature=0.15, seed=seed)
        _, plain, _ = run(FLAT, errs_each=None, answers=5, params=params)
        _, texts, stats = run(FLAT, errs_each=9, answers=5, params=params)
        assert texts == plain
        assert stats.num_drafted_by_model > stats.num_accepted_by_model > 100
