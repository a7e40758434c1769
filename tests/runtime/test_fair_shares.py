"""Shares of tenants and classes of priority: laws of the arithmetic, and of the scheduler that uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.fair_shares import FairShares, may_wait, share_out
from runtime.request import Request, RequestId, SamplingParams
from runtime.scheduler import CLASS_RATIO, GROWTH_TOKENS, TAKE_AFTER_TOKENS, Limits, Scheduler
from runtime.sequence import GAVE_WAY_ENOUGH
from runtime.states import StateLimits

GREEDY = SamplingParams(temperature=0)

wants = st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 200)), max_size=8)


@given(room=st.integers(0, 600), wants=wants)
def test_parts_use_the_room_and_no_small_want_is_cut_for_a_larger(room: int, wants: list[tuple[float, int]]) -> None:
    parts = share_out(room, wants)
    assert sum(parts) == min(room, sum(want for _, want in wants))
    assert all(0 <= part <= want for part, (_, want) in zip(parts, wants, strict=True))
    if room < len(wants):
        return
    total = sum(weight for weight, _ in wants)
    for part, (weight, want) in zip(parts, wants, strict=True):
        # Everybody gets what he wants or his share of the room, up to rounding and the token each one has for certain.
        assert part >= min(want, max(1, int((room - len(wants)) * weight / total) - len(wants)))


def test_with_less_than_a_token_each_the_first_in_turn_get_one() -> None:
    assert share_out(2, [(1, 5), (9, 1), (1, 1)]) == [1, 1, 0]
    assert share_out(0, [(1, 5)]) == [0]


def test_absence_saves_nothing_up_and_work_on_a_free_machine_is_no_debt() -> None:
    shares: FairShares[str] = FairShares()
    for _ in range(10):  # alone
        shares.enter("a")
        shares.serve("a")
        shares.charge("a", 100)
    shares.enter("a")
    shares.enter("b")
    assert shares.time("b") == 900, "as if it had just been served beside a"
    shares.serve("b")
    shares.charge("b", 5000)
    shares.enter("b")
    assert shares.time("b") == 5900, "who comes back at once has what he used still against him"


class Machine:
    """Runs a scheduler without a backend: every token drawn is 1. Counts the tokens computed by `key`."""

    def __init__(self, limits: Limits, *, key: Callable[[Request], object]) -> None:
        self.scheduler = Scheduler(limits)
        self.computed: Counter[object] = Counter()
        self.finished: list[RequestId] = []
        self.steps = 0
        self._key = key
        self._ids = count()

    def add(
        self, num_prompt: int, max_tokens: int, *, priority: int = 0, tenant: str = "", weight: float = 1.0
    ) -> RequestId:
        number = next(self._ids)
        prompt = (number + 2, *[1] * (num_prompt - 1))
        request = Request(
            RequestId(number), prompt, max_tokens, GREEDY, priority=priority, tenant=tenant, weight=weight
        )
        self.scheduler.add(request)
        return request.id

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert batch is not None
        self.steps += 1
        for chunk in batch.chunks:
            self.computed[self._key(chunk.sequence.request)] += len(chunk.tokens)
            if chunk.num_logits:
                chunk.sequence.tokens.append(1)
            self.scheduler.update(chunk)
            if chunk.sequence.num_output >= chunk.sequence.request.max_tokens:
                self.scheduler.retire(chunk.sequence, reason=None)
                self.finished.append(chunk.sequence.request.id)

    def waiting(self, tenant: str) -> int:
        return sum(s.request.tenant == tenant for s in self.scheduler.waiting)


@given(
    weight=st.sampled_from([1.0, 3.0]),
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    outputs=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
@settings(max_examples=20, deadline=None)
def test_two_tenants_who_always_want_more_compute_by_weight(
    weight: float, sizes: tuple[int, int], outputs: tuple[int, int]
) -> None:
    machine = Machine(Limits(4, 20_000, 64), key=lambda r: r.tenant)
    while sum(machine.computed.values()) < 6_000:
        for i, tenant in enumerate("ab"):
            while machine.waiting(tenant) < 5:
                machine.add(sizes[i], outputs[i], tenant=tenant, weight=weight if tenant == "b" else 1.0)
        machine.step()
    longest = max(sizes) + max(outputs)
    apart = abs(machine.computed["a"] - machine.computed["b"] / weight)
    assert apart <= 2 * 4 * longest, "the bound of Sheng et al. 2024, theorem 4.8, with four slots"


def test_a_flood_of_one_tenant_delays_anothers_request_by_one_admission() -> None:
    machine = Machine(Limits(2, 20_000, 64), key=lambda r: r.tenant)
    flood = [machine.add(20, 20, tenant="a") for _ in range(100)]
    for _ in range(30):
        machine.step()
    alone = machine.add(20, 20, tenant="b")
    before = set(machine.finished)
    while alone not in machine.finished:
        machine.step()
    assert len(set(machine.finished) & set(flood)) - len(before) <= 4


def test_a_batch_job_gives_its_slot_to_who_waits_at_a_screen_and_loses_nothing() -> None:
    machine = Machine(Limits(2, 20_000, 64, states=StateLimits(20_000)), key=lambda r: r.priority)
    jobs = [machine.add(100, 1000, priority=1) for _ in range(6)]
    for _ in range(200):
        machine.step()
    start = machine.steps
    question = machine.add(40, 10)
    while question not in machine.finished:
        machine.step()
    assert machine.steps - start <= 12
    while machine.scheduler.has_work:
        machine.step()
    assert sorted(machine.finished) == sorted([*jobs, question])
    assert machine.computed[1] == 6 * 1100 - 6, "the states were put back: nothing was computed twice"


def questions() -> Iterator[tuple[int, int]]:
    """Sizes of what interactive users ask, for ever."""
    while True:
        yield from [(30, 20), (5, 60), (200, 5)]


@pytest.mark.parametrize("slots", [1, 2, 8])
@given(
    prompt=st.integers(1, 300),
    output=st.integers(1, 100),
    priority=st.sampled_from([1, 1, 1, 2]),
    cells=st.sampled_from([1000, 20_000]),
    states=st.sampled_from([0, 1000, 20_000]),
)
@settings(max_examples=8, deadline=None)
def test_no_class_starves_under_an_endless_flood_of_a_higher_one(
    slots: int, prompt: int, output: int, priority: int, cells: int, states: int
) -> None:
    """While a class wants, the one above gets at most `CLASS_RATIO` times what it gets, beside what passes while a slot
    or cells fall free; and what it gets is progress, bar what is computed again after giving way."""
    machine = Machine(Limits(slots, cells, 64, states=StateLimits(states)), key=lambda r: r.priority)
    prompt, output = prompt // priority**3, output // priority**2 + 1
    ask = questions()
    for _ in range(4 * slots):
        machine.add(*next(ask))
    job = machine.add(prompt + 1, output, priority=priority)
    slack = 64 * (prompt + output + 500)
    while job not in machine.finished:
        while len(machine.scheduler.waiting) < 4 * slots:
            machine.add(*next(ask))
        machine.step()
        assert machine.computed[0] <= CLASS_RATIO**priority * (machine.computed[priority] + TAKE_AFTER_TOKENS) + slack
        assert machine.computed[priority] <= (1 + priority * GAVE_WAY_ENOUGH) * (prompt + 1 + output)


@given(
    plan=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 120), st.integers(0, 2)), min_size=1, max_size=10),
    slots=st.integers(1, 6),
    cells=st.sampled_from([200, 300, 600]),
    states=st.sampled_from([0, 5000]),
)
@settings(max_examples=200, deadline=None)
def test_long_answers_in_few_cells_go_on_and_seldom_give_way(
    plan: list[tuple[int, int, int]], slots: int, cells: int, states: int
) -> None:
    machine = Machine(Limits(slots, cells, 64, states=StateLimits(states)), key=lambda r: r.priority)
    for num_prompt, max_tokens, priority in plan:
        machine.add(num_prompt, max_tokens, priority=priority)
    while machine.scheduler.has_work:
        machine.step()
    num_output = sum(max_tokens for _, max_tokens, _ in plan)
    assert len(machine.finished) == len(plan)
    assert machine.scheduler.stats().num_preemptions <= len(plan) + num_output / GROWTH_TOKENS


@given(st.integers(1, 60), st.lists(st.integers(0, 5), max_size=200))
def test_whoever_has_nothing_in_a_queue_finds_room_in_it(capacity: int, comings: list[int]) -> None:
    held: Counter[int] = Counter()
    for who in comings:
        if may_wait(held[who], held.total(), 2 * capacity):
            held[who] += 1
    assert held.total() <= 2 * capacity
    assert max(held.values(), default=0) <= capacity, "one alone gets half"
    assert held.total() >= min(capacity, len(comings)) * (len(held) == 1)
    if len(held) < 2 * capacity - held.total():
        assert may_wait(0, held.total(), 2 * capacity)
