"""Laws of the scheduler and the engine, on a backend whose next token is a hash of the cells it may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from edge.errors import BackendError, ContextOverflow, QueueFull
from runtime.backends.base import Capabilities, StateRefused
from runtime.batch import Batch, CacheOp, RestoreState
from runtime.engine import Delta, Engine
from runtime.loop import Observer
from runtime.prefix_cache import MIN_SHARED_TOKENS
from runtime.radix import common_prefix
from runtime.request import FinishReason, Request, RequestId, SamplingParams, TokenId
from runtime.scheduler import Limits, Scheduler
from runtime.sequence import Sequence
from runtime.speculate import AdaptiveSpeculator, SpeculationStats, Speculator
from runtime.states import StateLimits
from runtime.step_cost import StepCosts
from tests.runtime.drafters import scripted_drafter
from tests.support import CollectingSink, ScriptedBackend, ScriptedDisk

GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, that before which its client leaves, if it does, and those between
    which nobody reads its answer."""

    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    leaves_at: int | None
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    held: tuple[int, int] | None = None

    def request(self, number: int) -> Request:
        return Request(
            RequestId(number), self.prompt, self.max_tokens, GREEDY, priority=self.priority, tenant=self.tenant,
            weight=self.weight,
        )  # fmt: skip


FAMILIES = [tuple(range(1 + i, 90 + i)) for i in range(3)]


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    family = draw(st.sampled_from(FAMILIES))
    shared = draw(st.integers(1, len(family)))
    own = draw(st.lists(st.integers(1, 96), max_size=20))
    at = draw(st.integers(0, 40))
    leaves = draw(st.one_of(st.none(), st.integers(at, at + 30)))
    tenant = draw(st.sampled_from("abc"))
    weight = draw(st.sampled_from([0.25, 1.0, 3.0]))
    held = draw(st.one_of(st.none(), st.tuples(st.integers(at + 1, at + 20), st.integers(at + 21, at + 40))))
    return Arrival(
        at, (*family[:shared], *own), draw(st.integers(1, 30)), leaves, draw(st.integers(0, 2)), tenant, weight, held
    )


def capabilities(
    *, slots: int, cells: int, step: int, partial: bool = True, states: int = 0, disk: int = 0, window: int = 0
) -> Capabilities:
    limits = StateLimits(states, disk, partial_reuse=partial, window_tokens=window)
    return Capabilities(slots, cells, cells, step, limits)


@dataclass(frozen=True)
class Memory:
    """How a model remembers: attention to everything, a recurrent state, or attention with a sliding window."""

    partial: bool = True
    window: int = 0


any_schedule = given(
    plan=st.lists(arrivals(), min_size=1, max_size=14),
    slots=st.integers(1, 5),
    cells=st.sampled_from([150, 200, 400, 2000]),
    step=st.sampled_from([8, 16, 64]),
    memory=st.sampled_from([Memory(), Memory(partial=False), Memory(window=25)]),
    states=st.sampled_from([0, 90, 300, 5000]),
    guesses=st.lists(st.integers(0, 5), max_size=40),
    drafter=st.booleans(),
    disk=st.sampled_from([0, 150, 5000]),
    luck=st.lists(st.booleans(), max_size=10),
    has_room=st.lists(st.booleans(), max_size=20),
)


@any_schedule
@settings(max_examples=300, deadline=None)
def test_any_schedule_gives_the_answers_of_requests_alone(**schedule: Any) -> None:
    check_schedule(**schedule)


def check_schedule(
    *, plan: list[Arrival], slots: int, cells: int, step: int, memory: Memory, states: int, guesses: list[int],
    drafter: bool, disk: int, luck: list[bool], has_room: list[bool],
) -> None:  # fmt: skip
    can = capabilities(
        slots=slots, cells=cells, step=max(step, slots), partial=memory.partial, states=states, disk=disk,
        window=memory.window,
    )  # fmt: skip
    drive = ScriptedDisk(luck)
    for _life in range(2 if disk else 1):
        live(plan, ScriptedBackend(can, has_room=has_room), guesses, drive, has_drafter=drafter)
        assert sum(len(tokens) for _, tokens in drive.files) <= disk


def live(
    plan: list[Arrival], backend: ScriptedBackend, guesses: list[int], drive: ScriptedDisk, *, has_drafter: bool = False
) -> None:
    """One run of a worker, from its start to its end."""
    if has_drafter:
        speculator = AdaptiveSpeculator(scripted_drafter(backend.capabilities))
    else:
        speculator = ScriptedSpeculator(backend, guesses) if guesses else None
    engine = Engine(
        backend, sink := CollectingSink(), max_queue=100, speculator=speculator, disk=drive, clock=backend.clock
    )
    for scope, tokens in list(drive.files):
        if not engine.adopt(list(tokens), scope, uses=1, pin=""):
            drive.remove(scope, list(tokens))
    work = sum(len(a.prompt) + a.max_tokens for a in plan)
    for now in range(120 + 4 * work):  # a step computes a token or waits for the disk, which works in every third
        for i, a in enumerate(plan):
            if a.at == now:
                engine.submit(a.request(i))
            if a.leaves_at == now:
                engine.cancel(RequestId(i))
            if a.held and now in a.held:
                engine.hold(RequestId(i), is_held=now == a.held[0])
        computed = engine.advance()
        worked = now % 3 == 0 and drive.work()
        if not computed and not worked and now > 80 and now % 3 == 0:
            break
    else:
        raise AssertionError("a request starved")
    stats = engine.stats().queues
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.cells_used == sum(map(len, backend.cells.values())), "the books and the cache differ"
    assert stats.num_states == len(backend.states), "the books and the states differ"
    for i, a in enumerate(plan):
        check_answer(backend, sink, RequestId(i), a)
        check_tenants(backend, sink.last.get(RequestId(i)), a, plan if drive.files else [b for b in plan if b is not a])
    engine.persist()
    while drive.work():
        engine.advance()


def test_a_restarted_engine_goes_on_from_the_disk() -> None:
    drive = ScriptedDisk([])
    can = capabilities(slots=4, cells=2000, step=64, states=5000, disk=5000)
    plan = [Arrival(0, tuple(range(1, 90)), 3, None), Arrival(5, tuple(range(2, 91)), 3, None, tenant="b")]
    live(plan, ScriptedBackend(can), [], drive)
    live(plan, backend := ScriptedBackend(can), [], drive)
    assert backend.num_computed <= 2 * (1 + 3), "all but the last token of each prompt was read back"


class RefusingBackend(ScriptedBackend):
    """Takes no saved state back."""

    num_refused = 0

    @override
    def _apply(self, op: CacheOp) -> None:
        if isinstance(op, RestoreState):
            self.num_refused += 1
            raise StateRefused(op.state)
        super()._apply(op)


def test_a_state_that_the_library_refuses_is_computed_instead_and_harms_nobody() -> None:
    drive = ScriptedDisk([])
    can = capabilities(slots=4, cells=2000, step=64, states=5000, disk=5000)
    plan = [Arrival(3 * i, tuple(range(1 + i, 90)), 8, None, tenant=t) for i, t in enumerate("abab")]
    live(plan, ScriptedBackend(can), [], drive)
    live(plan, backend := RefusingBackend(can), [], drive)
    assert backend.num_refused > 0


def test_a_state_for_which_memory_lacks_is_not_saved_and_nobody_notices() -> None:
    backend = ScriptedBackend(capabilities(slots=2, cells=10_000, step=64, states=5000), has_room=[False, True] * 9)
    engine = Engine(backend, sink := CollectingSink(), max_queue=10)
    for again in range(2):
        for k in range(6):
            prompt = tuple((k * 7 + i) % 90 + 1 for i in range(200))
            engine.submit(Request(RequestId(10 * again + k), prompt, 3, GREEDY))
            while engine.advance():
                pass
            assert engine.stats().queues.num_states == len(backend.states)
    assert {sink.last[RequestId(10 + k)].num_cached for k in range(6)} == {0, 199}
    assert [sink.texts[RequestId(k)] for k in range(6)] == [sink.texts[RequestId(10 + k)] for k in range(6)]


def test_a_file_for_which_memory_lacks_is_not_read_and_stays() -> None:
    drive = ScriptedDisk([])
    can = capabilities(slots=4, cells=2000, step=64, states=5000, disk=5000)
    plan = [Arrival(0, tuple(range(1, 90)), 3, None)]
    live(plan, ScriptedBackend(can), [], drive)
    files = dict(drive.files)
    live(plan, backend := ScriptedBackend(can, has_room=[False] * 9), [], drive)
    assert backend.num_computed >= 89
    assert drive.files.keys() >= files.keys()


class Onlooker(Observer):
    """Lets the disk work while the engine says that it is idle, and ends it after an answer."""

    def __init__(self, drive: ScriptedDisk, sink: CollectingSink) -> None:
        self._drive = drive
        self._sink = sink
        self.engine: Engine | None = None

    @override
    def begin_step(self, ids: list[RequestId], num_tokens: int) -> None:
        pass

    @override
    def idle(self) -> None:
        self._drive.work()
        if self._sink.num_finished and self.engine is not None:
            self.engine.stop()


def test_waiting_for_the_disk_is_no_step_that_hangs() -> None:
    drive, sink = ScriptedDisk([]), CollectingSink()
    can = capabilities(slots=4, cells=2000, step=64, states=5000, disk=5000)
    request = Arrival(0, tuple(range(1, 90)), 3, None)
    live([request], ScriptedBackend(can), [], drive)
    onlooker = Onlooker(drive, sink)
    engine = onlooker.engine = Engine(ScriptedBackend(can), sink, max_queue=5, disk=drive, observer=onlooker)
    for scope, tokens in list(drive.files):
        engine.adopt(list(tokens), scope, uses=1, pin="")
    engine.submit(request.request(0))
    engine.run()
    assert sink.last[RequestId(0)].num_cached == 88


class ScriptedSpeculator(Speculator):
    """Guesses what the backend will say, as far as the plan goes, and then something else."""

    def __init__(self, backend: ScriptedBackend, plan: list[int]) -> None:
        self._backend = backend
        self._plan = plan

    @override
    def plan(self, decoding: list[Sequence], *, costs: StepCosts, threads: int) -> None:
        number = self._plan[self._backend.num_steps % len(self._plan)]
        for sequence in decoding:
            sequence.draft = [*self._backend.expected(sequence.tokens, max_tokens=number), 0, 1]

    @override
    def learn(self, batch: Batch, gained: list[int], *, seconds: float, costs: StepCosts, threads: int) -> None:
        assert all(0 <= g < max(1, c.num_logits) for c, g in zip(batch.chunks, gained, strict=True))

    @override
    def stats(self) -> SpeculationStats:
        return SpeculationStats()


def check_answer(backend: ScriptedBackend, sink: CollectingSink, request_id: RequestId, a: Arrival) -> None:
    expected = backend.expected(list(a.prompt), max_tokens=a.max_tokens)
    text = backend.tokenizer
    full = b"".join(text.piece(t) for t in expected).decode()
    got = sink.texts.get(request_id, "")
    assert full.startswith(got)
    last = sink.last.get(request_id)
    if last is not None and last.finish_reason is not None:
        assert got == full
    else:
        assert a.leaves_at is not None, "only who leaves gets no whole answer"


def check_tenants(backend: ScriptedBackend, last: Delta | None, a: Arrival, others: list[Arrival]) -> None:
    """What was reused is what others of the same tenant asked or were answered."""
    kin = [b for b in others if b.tenant == a.tenant]
    texts = [[*b.prompt, *backend.expected(list(b.prompt), max_tokens=b.max_tokens)] for b in kin]
    known = max((common_prefix(t, list(a.prompt), limit=len(a.prompt) - 1) for t in texts), default=0)
    assert last is None or last.num_cached <= known


def test_a_short_prompt_overtakes_a_long_one() -> None:
    backend = ScriptedBackend(capabilities(slots=4, cells=10_000, step=64))
    sink = CollectingSink()
    engine = Engine(backend, sink, max_queue=10)
    engine.submit(Request(RequestId(1), tuple([7] * 4000), 5, GREEDY))
    for _ in range(3):
        engine.advance()
    engine.submit(Request(RequestId(2), (8, 9, 10), 5, GREEDY))
    engine.advance()
    assert sink.last[RequestId(2)].num_output == 1
    assert sink.last[RequestId(1)].num_output == 0


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    backend = ScriptedBackend(capabilities(slots=4, cells=10_000, step=64))
    sink = CollectingSink()
    engine = Engine(backend, sink, max_queue=10_000)
    engine.submit(Request(RequestId(0), tuple([7] * 640), 1, GREEDY))
    for step in range(1, 60):
        for k in range(3):
            engine.submit(Request(RequestId(1000 * step + k), (8 + k, step % 90, *range(1, 60)), 1, GREEDY))
        engine.advance()
        if RequestId(0) in sink.last and sink.last[RequestId(0)].finish_reason:
            assert step <= 45, "a quarter of each step was its own"
            return
    raise AssertionError("the long prompt starved")


def test_a_shared_prefix_is_computed_once() -> None:
    backend = ScriptedBackend(capabilities(slots=8, cells=10_000, step=64))
    sink = CollectingSink()
    engine = Engine(backend, sink, max_queue=10)
    prefix = tuple(range(1, 90)) * 3
    for i in range(8):
        engine.submit(Request(RequestId(i), (*prefix, i + 1), 1, GREEDY))
    while engine.advance():
        pass
    assert sink.num_finished == 8
    assert backend.num_computed < len(prefix) + 8 * 40
    assert sorted(d.num_cached >= len(prefix) - MIN_SHARED_TOKENS for d in sink.last.values()) == [False] + [True] * 7


def test_a_prompt_that_left_the_slots_is_restored() -> None:
    backend = ScriptedBackend(capabilities(slots=2, cells=10_000, step=64, states=5000))
    engine = Engine(backend, sink := CollectingSink(), max_queue=10)
    prompts = [tuple((k * 7 + i) % 90 + 1 for i in range(200)) for k in range(6)]
    for again in range(2):
        for k, prompt in enumerate(prompts):
            engine.submit(Request(RequestId(10 * again + k), prompt, 3, GREEDY))
            while engine.advance():
                pass
    assert [sink.last[RequestId(k)].num_cached for k in range(6)] == [0] * 6
    assert [sink.last[RequestId(10 + k)].num_cached for k in range(6)] == [199] * 6
    assert [sink.texts[RequestId(k)] for k in range(6)] == [sink.texts[RequestId(10 + k)] for k in range(6)]


def test_a_preempted_sequence_goes_on_from_its_saved_state() -> None:
    backend = ScriptedBackend(capabilities(slots=3, cells=200, step=64, states=5000))
    engine = Engine(backend, sink := CollectingSink(), max_queue=10)
    for i in range(3):
        engine.submit(Request(RequestId(i), tuple(range(1 + i, 41 + i)), 100, GREEDY, ignore_eos=True))
    while engine.advance():
        pass
    assert engine.stats().queues.num_preemptions > 0
    assert backend.num_computed <= 3 * 140, "nothing was computed twice"
    assert all(d.num_output == 100 for d in sink.last.values())


def test_cells_run_out_and_the_youngest_gives_way() -> None:
    backend = ScriptedBackend(capabilities(slots=3, cells=200, step=64))
    sink = CollectingSink()
    engine = Engine(backend, sink, max_queue=10)
    for i in range(3):
        engine.submit(Request(RequestId(i), tuple(range(1 + i, 41 + i)), 100, GREEDY, ignore_eos=True))
    preempted = 0
    while engine.advance():
        preempted = engine.stats().queues.num_preemptions
    assert preempted > 0
    assert all(d.num_output == 100 for d in sink.last.values())
    assert not sink.failures


def test_a_request_that_can_never_fit_fails_alone() -> None:
    engine = Engine(ScriptedBackend(capabilities(slots=2, cells=100, step=16)), sink := CollectingSink(), max_queue=5)
    engine.submit(Request(RequestId(1), tuple([1] * 90), 20, GREEDY))
    engine.submit(Request(RequestId(2), (1, 2, 3), 4, GREEDY))
    while engine.advance():
        pass
    assert isinstance(sink.failures[RequestId(1)].error, ContextOverflow)
    assert sink.last[RequestId(2)].finish_reason is not None


def test_a_full_queue_refuses() -> None:
    engine = Engine(ScriptedBackend(capabilities(slots=1, cells=500, step=16)), sink := CollectingSink(), max_queue=2)
    for i in range(5):
        engine.submit(Request(RequestId(i), (1, 2, i + 3), 4, GREEDY))
    while engine.advance():
        pass
    refused = [f.error for f in sink.failures.values()]
    assert len(refused) == 3
    assert all(isinstance(e, QueueFull) for e in refused)


class FailingBackend(ScriptedBackend):
    """Fails its third step."""

    def decode(self, batch: Batch) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]  # the type is the base's
        if self.num_steps == 2:
            self.num_steps += 1
            raise BackendError("out of luck")
        return super().decode(batch)


def test_a_failed_step_fails_what_it_held_and_the_next_request_is_answered() -> None:
    backend = FailingBackend(capabilities(slots=2, cells=500, step=16))
    engine = Engine(backend, sink := CollectingSink(), max_queue=5)
    engine.submit(Request(RequestId(1), (1, 2, 3), 10, GREEDY, ignore_eos=True))
    for _ in range(4):
        engine.advance()
    assert sink.failures[RequestId(1)].error.code == "backend_error"
    engine.submit(Request(RequestId(2), (1, 2, 3), 3, GREEDY, ignore_eos=True))
    while engine.advance():
        pass
    assert sink.last[RequestId(2)].finish_reason == FinishReason.LENGTH


def test_a_stop_string_ends_the_answer_and_is_kept_out() -> None:
    backend = ScriptedBackend(capabilities(slots=1, cells=500, step=16))
    prompt = (5, 6, 7)
    whole = b"".join(backend.tokenizer.piece(t) for t in backend.expected(list(prompt), max_tokens=40)).decode()
    stop = whole[4:6]
    engine = Engine(backend, sink := CollectingSink(), max_queue=5)
    engine.submit(Request(RequestId(1), prompt, 40, GREEDY, stop=(stop,)))
    while engine.advance():
        pass
    assert sink.texts[RequestId(1)] == whole[: whole.index(stop)]
    assert sink.last[RequestId(1)].finish_reason == FinishReason.STOP


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.integers(0, 50))
def test_common_prefix_is_what_a_loop_finds(a: list[int], b: list[int], limit: int) -> None:
    n = 0
    while n < min(len(a), len(b), limit) and a[n] == b[n]:
        n += 1
    assert common_prefix(a, b, limit=limit) == n


def test_a_seed_decides_whatever_else_is_computed() -> None:
    def answers(*, others: int) -> tuple[str, str, str]:
        backend = ScriptedBackend(capabilities(slots=8, cells=5000, step=64))
        engine = Engine(backend, sink := CollectingSink(), max_queue=20)
        for i in range(others):
            engine.submit(Request(RequestId(100 + i), (1, 2, i + 3), 20, GREEDY, ignore_eos=True))
        for i, seed in enumerate((7, 7, 8)):
            params = SamplingParams(temperature=1.0, seed=seed)
            engine.submit(Request(RequestId(i), (9, 9, 9), 20, params, ignore_eos=True))
        while engine.advance():
            pass
        return sink.texts[RequestId(0)], sink.texts[RequestId(1)], sink.texts[RequestId(2)]

    first, again, other = answers(others=0)
    assert first == again != other
    assert answers(others=4) == (first, again, other)


def test_nothing_to_do_is_no_batch() -> None:
    assert Scheduler(Limits(2, 100, 16)).schedule() is None


class PartlyBrokenBackend(ScriptedBackend):
    """Gives no number after texts that begin with 6."""

    @override
    def scores(self, cells: list[TokenId]) -> NDArray[np.float32]:
        return np.full(97, np.nan if cells[0] == 6 else 1.0, np.float32)


def test_an_answer_without_usable_scores_ends_alone() -> None:
    sink = CollectingSink()
    engine = Engine(PartlyBrokenBackend(Capabilities(4, 256, 256, 64)), sink, max_queue=10)
    engine.submit(Request(RequestId(1), (5, 6), 8, SamplingParams(temperature=0), ignore_eos=True))
    engine.submit(Request(RequestId(2), (6, 5), 8, SamplingParams(temperature=1)))
    while engine.advance():
        pass
    assert {*sink.failures} == {RequestId(2)}
    assert sink.last[RequestId(1)].finish_reason is FinishReason.LENGTH


def test_a_sequence_beyond_its_checkpoints_goes_on() -> None:
    sequence = Sequence(Request(RequestId(1), tuple(range(9)), 1), 1)
    sequence.checkpoints |= {3, 6}
    assert sequence.before_checkpoint(9) == 3
    sequence.num_computed = 6
    assert sequence.before_checkpoint(3) == 3


def test_an_answer_that_nobody_reads_costs_no_steps_and_gives_its_slot_to_who_waits() -> None:
    backend = ScriptedBackend(capabilities(slots=1, cells=400, step=64, states=5000))
    engine = Engine(backend, sink := CollectingSink(), max_queue=10, clock=backend.clock)
    unread, other = RequestId(1), RequestId(2)
    engine.submit(Request(unread, tuple(range(1, 40)), 20, GREEDY))
    for _ in range(5):
        engine.advance()
    engine.hold(unread, is_held=True)
    so_far = sink.last[unread].num_output
    assert not engine.advance()
    engine.submit(Request(other, tuple(range(50, 90)), 5, GREEDY))
    while engine.advance():
        pass
    assert sink.last[other].finish_reason is not None
    assert sink.last[unread].num_output == so_far < 20
    engine.hold(unread, is_held=False)
    while engine.advance():
        pass
    assert sink.last[unread].num_output == 20
    assert backend.num_computed <= 39 + 20 + 40 + 5 + 1, "it went on from its saved state"
