"""The prompt chunk beside decoding sequences, on a fake clock and scripted step costs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from runtime.backends.base import Capabilities
from runtime.batch import Batch
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams
from runtime.step_budget import HEAD_START_S, MAX_WAITS, MIN_PROMPT_TOKENS, WORTHWHILE_TOKENS, BudgetTuner, ahead_s
from runtime.step_cost import StepCosts
from tests.support import CollectingSink, ScriptedBackend

GREEDY = SamplingParams(temperature=0)


class CostedBackend(ScriptedBackend):
    """Each step moves the clock by what a machine would take for it."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        super().__init__(Capabilities(4, 20_000, 20_000, 512))
        self.cost = cost
        self.now = 0.0
        self.rng = random.Random(1)
        self.steps: list[tuple[int, int, float]] = []
        """Decoding tokens, prompt tokens and seconds of each."""

    @override
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        seconds = self.cost(batch.num_tokens) * self.rng.uniform(0.9, 1.1)
        self.now += seconds
        decoding = sum(not c.sequence.is_prefilling for c in batch.chunks)
        self.steps.append((decoding, batch.num_tokens - decoding, seconds))
        return super().decode(batch)


def dear(n: int) -> float:
    """The default model, two threads."""
    return 0.003 + 0.002 * n


def cheap(n: int) -> float:
    """A machine on which reading the weights is what a step takes."""
    return 0.05 + 0.0002 * n


def slow(n: int) -> float:
    """A small board."""
    return 0.4 * n


def steps_beside(cost: Callable[[int], float], *, interval_s: float = 0.0) -> list[tuple[int, int, float]]:
    """The steps while a long prompt is read beside an answer."""
    backend = CostedBackend(cost)
    engine = Engine(backend, CollectingSink(), max_queue=10, token_interval_s=interval_s, clock=lambda: backend.now)
    engine.submit(Request(RequestId(1), (5, 6, 7), 400, GREEDY, ignore_eos=True))
    for _ in range(10):
        engine.advance()
    engine.submit(Request(RequestId(2), tuple([7] * 4000), 1, GREEDY))
    while engine.stats().queues.num_running != 1 or engine.stats().queues.num_waiting or len(backend.steps) < 13:
        engine.advance()
    at_prompt = [i for i, (decoding, prompt, _) in enumerate(backend.steps) if decoding and prompt]
    return backend.steps[at_prompt[0] : at_prompt[-1] + 1]


@pytest.mark.parametrize(("cost", "longest"), [(dear, 1.2), (cheap, 0.2)])
def test_an_answer_keeps_ahead_of_its_reader_while_a_long_prompt_is_read(
    cost: Callable[[int], float], longest: float
) -> None:
    steps = steps_beside(cost)
    assert sum(prompt for _, prompt, _ in steps) >= 3999
    assert all(seconds <= 1.3 * longest for _, _, seconds in steps[3:]), "once the width is known"
    late_s = [sum(seconds for _, _, seconds in steps[: i + 1]) - 0.2 * i for i in range(len(steps))]
    assert max(late_s) <= HEAD_START_S + 10 * 0.2 + 0.5, "of its ten tokens it had none before"
    assert max(seconds for _, _, seconds in steps) >= 0.6 * longest, "no smaller than it has to be"
    read = [prompt for _, prompt, _ in steps if prompt]
    assert all(prompt >= WORTHWHILE_TOKENS for prompt in read[3:-1]), "rather seldom than in small pieces"


@pytest.mark.parametrize("seconds", [0.0, 0.5, 5.0])
def test_an_answer_is_ahead_by_what_its_reader_has_not_read(seconds: float) -> None:
    assert math.isclose(ahead_s(10, seconds), HEAD_START_S + 2.0 - seconds)


def test_a_target_is_kept_and_a_slow_machine_reads_on() -> None:
    assert all(seconds <= 0.05 for _, _, seconds in steps_beside(dear, interval_s=0.04)[3:])
    assert all(prompt == MIN_PROMPT_TOKENS for _, prompt, _ in steps_beside(slow)[3:-1])


def test_a_prompt_alone_has_the_whole_step() -> None:
    backend = CostedBackend(dear)
    engine = Engine(backend, CollectingSink(), max_queue=10, clock=lambda: backend.now)
    engine.submit(Request(RequestId(1), tuple([7] * 2048), 1, GREEDY))
    while engine.advance():
        pass
    assert [prompt for _, prompt, _ in backend.steps] == [512] * 4


@given(
    costs=st.lists(st.tuples(st.integers(1, 600), st.floats(1e-5, 10)), max_size=30),
    decoding=st.integers(0, 40),
    room=st.integers(0, 512),
    interval_s=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_whatever_was_measured_prompts_get_something_and_no_more_than_there_is(
    costs: list[tuple[int, float]], decoding: int, room: int, interval_s: float
) -> None:
    learned = StepCosts()
    for tokens, seconds in costs:
        learned.record(tokens, threads=0, seconds=seconds)
    tuner = BudgetTuner(learned, interval_s=interval_s)
    answers = [tuner.prompt_tokens(decoding, room) for _ in range(MAX_WAITS + 1)]
    assert all(0 <= tokens <= room for tokens in answers)
    assert any(tokens >= min(room, MIN_PROMPT_TOKENS) for tokens in answers)


def learned(cost: Callable[[int], float]) -> StepCosts:
    """Costs of every width."""
    costs = StepCosts()
    for tokens in range(1, 600):
        costs.record(tokens, threads=0, seconds=cost(tokens))
    return costs


@pytest.mark.parametrize("wanted", [20, 65, 100, 127, 300])
def test_a_prompt_that_fits_is_read_at_once(wanted: int) -> None:
    assert BudgetTuner(learned(dear), ahead_s=lambda: 1.2).prompt_tokens(3, wanted) == wanted


def test_who_does_not_get_ahead_is_not_waited_for() -> None:
    tuner = BudgetTuner(learned(dear), ahead_s=lambda: -5.0)
    read = [tuner.prompt_tokens(3, 500) for _ in range(6)]
    assert [tokens > 0 for tokens in read] == [False, True] * 3


def test_answers_of_a_lower_class_and_those_that_gave_way_do_not_hold_a_prompt_up() -> None:
    backend = CostedBackend(dear)
    engine = Engine(backend, CollectingSink(), max_queue=10, clock=lambda: backend.now)
    engine.submit(Request(RequestId(1), (5, 6, 7), 400, GREEDY, ignore_eos=True, priority=3))
    for _ in range(10):
        engine.advance()
    backend.now += 60  # nobody reads it as fast as it could be written
    engine.submit(Request(RequestId(2), tuple([7] * 2000), 1, GREEDY))
    while engine.stats().queues.num_running != 1 or len(backend.steps) < 13:
        engine.advance()
    assert max(prompt for _, prompt, _ in backend.steps) == 509 + 2
