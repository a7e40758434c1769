"""Laws of adapters: a request's answer is that of its own set, sets take turns, loads keep to their budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from edge.errors import ConstraintFailed, DoesNotFit, InvalidModelFile, InvalidRequest, QueueFull
from runtime.adapters import MAX_ADAPTERS, ResidentAdapters, adapter_set
from runtime.backends.base import Capabilities
from runtime.engine import Engine
from runtime.grammar import Grammar, Guide
from runtime.loop import Observer
from runtime.request import Adapter, AdapterSet, Request, RequestId, SamplingParams
from runtime.states import StateLimits
from runtime.turns import TURN_STEPS, Turns
from tests.support import CollectingSink, ScriptedBackend

GREEDY = SamplingParams(temperature=0)
POLITE, RUDE = Adapter("polite", 1.0, size_bytes=10), Adapter("rude", 0.5, size_bytes=10)
SETS: list[AdapterSet] = [(), (POLITE,), (POLITE, RUDE)]
TEXT = tuple(range(1, 90))


def make_engine(
    *, slots: int = 4, cells: int = 2000, step: int = 64, states: int = 0, adapter_bytes: int = 100
) -> tuple[Engine, ScriptedBackend, CollectingSink]:
    can = Capabilities(slots, cells, cells, max(step, slots), StateLimits(states), adapter_bytes=adapter_bytes)
    backend, sink = ScriptedBackend(can), CollectingSink()
    return Engine(backend, sink, max_queue=100), backend, sink


def ask(
    engine: Engine, number: int, adapters: AdapterSet, *, prompt: tuple[int, ...] = TEXT, tokens: int = 5,
    priority: int = 0,
) -> None:  # fmt: skip
    asked = Request(RequestId(number), prompt, tokens, GREEDY, ignore_eos=True, adapters=adapters, priority=priority)
    engine.submit(asked)


def finish(engine: Engine) -> None:
    while engine.advance():
        pass


@dataclass(frozen=True)
class Arrival:
    """A request of a set, the step before which it comes, and the step before which its client leaves, if it does."""

    at: int
    adapters: AdapterSet
    prompt: tuple[int, ...]
    max_tokens: int
    leaves_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    at = draw(st.integers(0, 40))
    prompt = (*TEXT[: draw(st.integers(1, 89))], *draw(st.lists(st.integers(1, 96), max_size=10)))
    leaves = draw(st.one_of(st.none(), st.integers(at, at + 30)))
    return Arrival(at, draw(st.sampled_from(SETS)), prompt, draw(st.integers(1, 30)), leaves)


@given(
    plan=st.lists(arrivals(), min_size=1, max_size=14),
    slots=st.integers(1, 5),
    cells=st.sampled_from([150, 400, 2000]),
    step=st.sampled_from([8, 64]),
    states=st.sampled_from([0, 300, 5000]),
)
@settings(max_examples=300, deadline=None)
def test_any_schedule_gives_each_set_its_own_answers(
    plan: list[Arrival], slots: int, cells: int, step: int, states: int
) -> None:
    engine, backend, sink = make_engine(slots=slots, cells=cells, step=step, states=states)
    for now in range(4000):
        for i, a in enumerate(plan):
            if a.at == now:
                engine.submit(Request(RequestId(i), a.prompt, a.max_tokens, GREEDY, adapters=a.adapters))
            if a.leaves_at == now:
                engine.cancel(RequestId(i))
        if not engine.advance() and now > 80:
            break
    else:
        raise AssertionError("a request starved")
    for i, a in enumerate(plan):
        expected = backend.expected(list(a.prompt), max_tokens=a.max_tokens, adapters=a.adapters)
        full = b"".join(backend.tokenizer.piece(t) for t in expected).decode()
        got, last = sink.texts.get(RequestId(i), ""), sink.last.get(RequestId(i))
        assert full.startswith(got)
        assert a.leaves_at is not None or (last is not None and last.finish_reason is not None and got == full)


def test_a_prefix_is_reused_within_its_set_only() -> None:
    engine, _, sink = make_engine(slots=2, states=5000)
    for again in range(2):
        for k, adapters in enumerate(SETS):
            ask(engine, 10 * again + k, adapters)
            finish(engine)
    assert [sink.last[RequestId(k)].num_cached for k in range(3)] == [0, 0, 0]
    assert [sink.last[RequestId(10 + k)].num_cached for k in range(3)] == [len(TEXT) - 1] * 3


def test_sets_change_seldom_and_none_waits_long() -> None:
    engine, backend, _ = make_engine(slots=9, step=64)
    for i in range(9):
        ask(engine, i, SETS[i % 3], prompt=(i + 1, 2, 3), tokens=100)
    finish(engine)
    changes = sum(a != b for a, b in pairwise(backend.sets))
    assert changes <= len(backend.sets) / TURN_STEPS + 3
    for adapters in SETS:
        turns = [i for i, used in enumerate(backend.sets) if used == adapters]
        assert max(b - a for a, b in pairwise(turns)) <= 2 * TURN_STEPS + 1


CROWD = st.lists(st.tuples(st.sampled_from(SETS), st.integers(0, 1)), min_size=1, max_size=8)
RATIO = 4


@given(st.lists(CROWD, min_size=1, max_size=30), st.sampled_from([1, 100, 600]))
@settings(deadline=None)
def test_who_waits_gets_a_turn(crowds: list[list[tuple[AdapterSet, int]]], tokens: int) -> None:
    turns = Turns(RATIO)
    waiting: dict[tuple[AdapterSet, int], int] = {}
    for step in range(1000):
        wanted = crowds[step % len(crowds)]
        chosen = turns.choose(wanted)
        assert chosen in {a for a, _ in wanted}
        turns.book(tokens)
        waiting = {(a, p): waiting.get((a, p), 0) + 1 for a, p in wanted if a != chosen}
        assert max(waiting.values(), default=0) <= 8 * (RATIO + 1) * TURN_STEPS * len(SETS)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=3, max_size=3), st.sampled_from([1, 100]))
@settings(deadline=None)
def test_each_class_has_its_share_of_the_turns(crowd: list[tuple[int, int]], tokens: int) -> None:
    turns, steps = Turns(RATIO), Counter[int]()
    priorities = {a: priority for a, (_, priority) in zip(SETS, crowd, strict=True)}
    wanted = [(a, priority) for a, (number, priority) in zip(SETS, crowd, strict=True) for _ in range(number)]
    for _ in range(120 * TURN_STEPS):
        steps[priorities[turns.choose(wanted)]] += 1
        turns.book(tokens)
    for high, low in combinations(sorted(steps), 2):
        assert 0.8 <= steps[high] / steps[low] / RATIO ** (low - high) <= 1.2
    assert set(steps) == set(priorities.values())


def test_a_higher_class_comes_first_and_pays_what_it_owes() -> None:
    turns, order = Turns(RATIO), list[AdapterSet]()
    for step in range(100):
        wanted = [((), 1), *([((POLITE,), 0)] if step >= 3 else [])]
        order.append(turns.choose(wanted))
        turns.book(1)
    assert order[:4] == [(), (), (), (POLITE,)], "it does not wait for the turn to end"
    first = order.index((), 3)
    assert order[first : first + TURN_STEPS + 1] == [()] * TURN_STEPS + [(POLITE,)], "what is owed is a whole turn"
    assert order.index((), first + TURN_STEPS) == first + TURN_STEPS + RATIO * TURN_STEPS


def test_a_request_of_a_higher_class_is_not_held_up_by_other_sets() -> None:
    def steps_until_done(priority: int) -> int:
        engine, backend, sink = make_engine(slots=9, step=64)
        for i in range(8):
            ask(engine, i, SETS[i % 2], prompt=(i + 1, 2, 3), tokens=200, priority=1)
        for _ in range(20):
            engine.advance()
        before = backend.num_steps
        ask(engine, 99, SETS[2], prompt=(9, 9, 9), tokens=40, priority=priority)
        while 99 not in sink.last or sink.last[RequestId(99)].finish_reason is None:
            engine.advance()
        return backend.num_steps - before

    assert steps_until_done(0) <= 42
    assert steps_until_done(1) >= 80


class RefusingBackend(ScriptedBackend):
    """Takes one adapter, not the other."""

    @override
    def load_adapter(self, adapter: Adapter) -> None:
        if adapter == RUDE:
            raise InvalidModelFile("The adapter", "it is rude")
        super().load_adapter(adapter)


def test_an_adapter_that_does_not_load_fails_its_request_alone() -> None:
    can = Capabilities(2, 1000, 1000, 64, adapter_bytes=100)
    engine = Engine(RefusingBackend(can), sink := CollectingSink(), max_queue=10)
    for i, adapters in enumerate([(POLITE,), (RUDE,), (), (POLITE, RUDE)]):
        ask(engine, i, adapters)
    finish(engine)
    assert sorted(sink.failures) == [1, 3]
    assert isinstance(sink.failures[RequestId(1)].error, InvalidModelFile)
    assert [sink.last[RequestId(i)].num_output for i in (0, 2)] == [5, 5]


class Witness(Observer):
    """Knows who is at work."""

    def __init__(self) -> None:
        self.ids: list[RequestId] = []

    @override
    def begin_step(self, ids: list[RequestId], num_tokens: int) -> None:
        self.ids = ids

    @override
    def idle(self) -> None:
        self.ids = []


def test_who_brings_an_adapter_is_to_blame_while_it_is_loaded() -> None:
    witness = Witness()
    seen: list[list[RequestId]] = []

    class Loading(ScriptedBackend):
        @override
        def load_adapter(self, adapter: Adapter) -> None:
            seen.append(witness.ids)
            super().load_adapter(adapter)

    can = Capabilities(4, 2000, 2000, 64, adapter_bytes=100)
    engine = Engine(Loading(can), CollectingSink(), max_queue=10, observer=witness)
    ask(engine, 1, ())
    engine.advance()
    ask(engine, 2, (POLITE,))
    engine.advance()
    assert seen == [[RequestId(2)]]


def test_who_brings_a_grammar_is_to_blame_while_it_is_begun() -> None:
    witness = Witness()
    seen: list[list[RequestId]] = []

    class Costly(Grammar):
        @override
        def __init__(self) -> None:
            pass

        @override
        def start(self) -> Guide:
            seen.append(witness.ids)
            raise ConstraintFailed("The first step is too costly.")

    can = Capabilities(4, 2000, 2000, 64)
    engine = Engine(ScriptedBackend(can), sink := CollectingSink(), max_queue=10, observer=witness)
    ask(engine, 1, ())
    engine.advance()
    engine.submit(Request(RequestId(2), TEXT, 5, GREEDY, grammar=Costly()))
    engine.advance()
    assert seen == [[RequestId(2)]]
    assert RequestId(2) in sink.failures
    finish(engine)
    assert sink.last[RequestId(1)].num_output == 5


def test_loads_keep_to_the_budget_and_who_is_in_use_stays() -> None:
    engine, backend, sink = make_engine(adapter_bytes=25)
    others = [Adapter(f"other{i}", size_bytes=10) for i in range(3)]
    ask(engine, 1, (POLITE,), tokens=50)
    ask(engine, 2, (others[0],))
    ask(engine, 3, (others[1],))
    engine.advance()
    assert isinstance(sink.failures[RequestId(3)].error, QueueFull), "both that are loaded are in use"
    for _ in range(200):
        if sink.last[RequestId(2)].finish_reason is not None:
            break
        engine.advance()
    ask(engine, 4, (others[2],))
    ask(engine, 5, (Adapter("huge", size_bytes=1000),))
    engine.advance()
    assert backend.loaded == {"polite", "other2"}
    assert isinstance(sink.failures[RequestId(5)].error, DoesNotFit)
    finish(engine)
    assert sink.last[RequestId(1)].num_output == 50


def test_a_set_has_one_form() -> None:
    assert adapter_set([RUDE, POLITE]) == adapter_set([POLITE, Adapter("none", 0.0), RUDE]) == (POLITE, RUDE)
    assert adapter_set([Adapter("polite", 0.0)]) == ()
    for bad in ([POLITE, Adapter("polite", 0.3)], [Adapter(str(i)) for i in range(MAX_ADAPTERS + 1)]):
        with pytest.raises(InvalidRequest):
            adapter_set(bad)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40), st.sets(st.sampled_from("abcdefgh")))))
def test_residents_never_exceed_their_budget(loads: list[tuple[str, int, set[str]]]) -> None:
    residents, held = ResidentAdapters(50), dict[str, int]()
    for digest, size, in_use in loads:
        adapter = Adapter(digest, size_bytes=size)
        if residents.use(adapter):
            continue
        try:
            leaving = residents.add(adapter, in_use=in_use)
        except QueueFull:
            continue
        assert not set(leaving) & in_use
        for gone in leaving:
            del held[gone]
        held[digest] = size
        assert sum(held.values()) <= 50
