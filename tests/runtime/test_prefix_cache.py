"""Laws of the prefix cache: its tree finds what a scan finds, its budgets hold, tenants stay apart."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.prefix_cache import PrefixCache
from runtime.radix import RadixTree, common_prefix
from runtime.request import Request, RequestId
from runtime.sequence import Sequence
from runtime.states import (
    HOT_USES,
    DiskOp,
    LoadState,
    RemoveState,
    SavedState,
    SavedStates,
    Scope,
    StateLimits,
    StoreState,
)

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


class TreeAgainstScan(RuleBasedStateMachine):
    """A radix tree beside a dictionary that is searched whole."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[int] = RadixTree()
        self.held: dict[int, list[int]] = {}

    @rule(value=st.integers(0, 9), tokens=TOKENS)
    def insert(self, value: int, tokens: list[int]) -> None:
        if value not in self.held:
            self.tree.insert(value, tokens)
            self.held[value] = list(tokens)

    @rule(value=st.integers(0, 9), tokens=TOKENS)
    def extend(self, value: int, tokens: list[int]) -> None:
        if value in self.held:
            self.tree.extend(value, tokens)
            self.held[value] += tokens

    @rule(value=st.integers(0, 9))
    def remove(self, value: int) -> None:
        self.tree.remove(value)
        self.held.pop(value, None)

    @rule(tokens=TOKENS, limit=st.integers(0, 14))
    def find(self, tokens: list[int], limit: int) -> None:
        found, length = self.tree.find(tokens, limit=limit)
        scan = {v: common_prefix(t, tokens, limit=limit) for v, t in self.held.items()}
        assert length == max(scan.values(), default=0)
        assert set(found) == ({v for v, n in scan.items() if n == length} if length else set())

    @rule(tokens=TOKENS, limit=st.integers(0, 14))
    def find_whole(self, tokens: list[int], limit: int) -> None:
        found, length = self.tree.find_whole(tokens, limit=limit)
        whole = {v: len(t) for v, t in self.held.items() if len(t) <= limit and t == tokens[: len(t)]}
        assert length == max(whole.values(), default=0)
        assert set(found) == {v for v, n in whole.items() if n == length}

    @invariant()
    def size(self) -> None:
        assert len(self.tree) == len(self.held)


TestTreeAgainstScan = TreeAgainstScan.TestCase

OWN, OTHER = Scope("a"), Scope("b")
LONG_TOKENS = st.lists(st.integers(1, 2), min_size=30, max_size=60)
SCOPES = st.sampled_from([OWN, OTHER, Scope(None)])


class BooksOfStates(RuleBasedStateMachine):
    """Saved states beside a disk that does what it is told, late."""

    def __init__(self) -> None:
        super().__init__()
        self.states = SavedStates(StateLimits(memory_bytes=150, disk_bytes=200))
        self.memory: dict[int, SavedState] = {}
        self.files: dict[int, SavedState] = {}
        self.reading: list[SavedState] = []
        self.pinned: dict[str, SavedState] = {}

    def settle(self) -> None:
        for state_id in self.states.take_dropped():
            del self.memory[state_id]

    @rule(tokens=LONG_TOKENS, scope=SCOPES, uses=st.integers(1, 2))
    def add(self, tokens: list[int], scope: Scope, uses: int) -> None:
        if uses > 1 and self.states.find_near(tokens, scope, slack=0):
            return
        state = self.states.add(tokens, scope, uses=uses)
        self.settle()
        if state is not None:
            self.memory[state.id] = state

    @rule(tokens=LONG_TOKENS, scope=SCOPES)
    def find_and_use(self, tokens: list[int], scope: Scope) -> None:
        state, length = self.states.find_in_memory(tokens, scope, limit=len(tokens))
        here = [s for s in self.memory.values() if s.scope in scope.visible]
        assert length == max((common_prefix(s.tokens, tokens, limit=len(tokens)) for s in here), default=0)
        if state is not None:
            assert state.scope in (scope, Scope(None))
            self.states.use(state)

    @rule(tokens=LONG_TOKENS, scope=SCOPES)
    def read(self, tokens: list[int], scope: Scope) -> None:
        state, _ = self.states.find_on_disk(tokens, scope, limit=len(tokens))
        if state is not None:
            assert state.scope in (scope, Scope(None))
            self.states.load(state)

    @rule()
    def disk_works(self) -> None:
        for op in self.states.take_disk_ops():
            self.apply(op)

    def apply(self, op: DiskOp) -> None:
        match op:
            case StoreState(state):
                assert self.memory[state.id] is state, "what is written is there to be read"
                self.files[state.id] = state
            case RemoveState(state):
                self.files.pop(state.id, None)
            case LoadState(state):
                self.reading.append(state)

    @rule()
    def memory_lacks(self) -> None:
        if self.reading:
            self.states.unread(self.reading.pop())
        if self.memory:
            self.states.unsaved(next(iter(self.memory.values())).id)
            self.settle()
            self.drop_lost_pins()

    @rule(is_good=st.booleans())
    def read_ends(self, is_good: bool) -> None:
        if self.reading:
            state = self.reading.pop(0)
            holds = self.states.loaded(state, is_good=is_good and state.id in self.files)
            self.settle()
            if holds:
                self.memory[state.id] = state
            self.drop_lost_pins()  # where its file was bad

    @rule(name=st.sampled_from(["x", "y"]), pin=st.booleans())
    def pin(self, name: str, pin: bool) -> None:
        state = next(iter(self.memory.values()), None)
        if pin and (state is None or not self.states.may_pin(state.tokens, state.scope, name)):
            return
        if not pin or self.pinned.get(name) is not state:
            self.states.unpin(name)
            self.settle()
            self.pinned.pop(name, None)
        if pin and state is not None and state.in_memory:
            self.states.pin(state, name)
            self.pinned = {n: s for n, s in self.pinned.items() if s is not state} | {name: state}

    @rule()
    def fail(self) -> None:
        self.states.clear()
        self.settle()
        self.drop_lost_pins()  # what the disk had not begun to write

    def drop_lost_pins(self) -> None:
        self.pinned = {n: s for n, s in self.pinned.items() if s.in_memory or s.on_disk}

    @invariant()
    def books_hold(self) -> None:
        assert self.states.memory_bytes == sum(s.size_bytes for s in self.memory.values()) <= 150
        assert self.states.disk_bytes <= 200
        assert self.states.num_states == len(self.memory)
        assert all(s.in_memory for s in self.memory.values())

    @invariant()
    def pins_stay_and_leave_room(self) -> None:
        assert {s.pin: s for s in self.states.pins()} == self.pinned
        assert sum(s.size_bytes for s in self.pinned.values()) <= 75
        assert all(s.on_disk for s in self.pinned.values() if s.in_memory)


TestBooksOfStates = BooksOfStates.TestCase


def test_what_was_used_most_stays() -> None:
    states = SavedStates(StateLimits(memory_bytes=150))
    often = states.add(list(range(50)), OWN)
    assert often is not None
    for _ in range(5):
        states.use(often)
    for i in range(1, 10):
        assert states.add(list(range(100 * i, 100 * i + 50)), OWN) is not None
    assert often.in_memory
    for i in range(10, 30):  # and what was used long ago goes in the end
        states.add(list(range(100 * i, 100 * i + 50)), OWN)
    assert not often.in_memory


def sequence(tokens: list[int], *, tenant: str = "", cache_key: str = "", pin: str = "") -> Sequence:
    return Sequence(Request(RequestId(0), tuple(tokens), 1, tenant=tenant, cache_key=cache_key, pin=pin), 0)


def cache_of(*, num_slots: int = 4) -> PrefixCache:
    limits = StateLimits(memory_bytes=5000, disk_bytes=5000)
    return PrefixCache(num_slots=num_slots, num_cells=5000, states=limits, reserved=lambda: 0)


def run(cache: PrefixCache, s: Sequence) -> int:
    """Compute a sequence and let it go; the tokens that it had not to compute."""
    slot = cache.place(s, cells=len(s.tokens) + 1)
    assert slot is not None
    cached = len(slot.tokens)
    cache.append(slot, s.tokens[cached:])
    cache.release(slot)
    return cached


def test_another_tenants_prefix_is_not_found_and_a_pinned_one_is() -> None:
    cache = cache_of()
    prompt = list(range(100))
    assert run(cache, sequence(prompt, tenant="a")) == 0
    assert run(cache, sequence(prompt, tenant="b")) == 0
    assert run(cache, sequence(prompt, tenant="a")) == 99
    run(cache, sequence(list(range(200, 300)), pin="p"))
    assert run(cache, sequence([*range(200, 300), 1], tenant="b")) == 100


def test_of_equal_prefixes_the_one_of_the_same_cache_key_is_taken() -> None:
    cache = cache_of()
    shared = list(range(100))
    for i, key in enumerate(("x", "y", "z")):
        cache.slots[i].affinity = key
        cache.append(cache.slots[i], [*shared, 1000 + i])
    assert cache.place(sequence([*shared, 7], cache_key="y"), cells=102) is cache.slots[1]


def test_a_prefix_that_two_share_is_saved_by_itself_and_written() -> None:
    cache = cache_of()
    shared = list(range(100))
    for question in range(3):
        run(cache, sequence([*shared, *range(1000 * question + 500, 1000 * question + 550)]))
    stored = [op.state.tokens for op in cache.take_disk_ops() if isinstance(op, StoreState)]
    assert stored == [shared]


def test_a_state_is_used_when_a_slot_is_found_for_it_and_not_before() -> None:
    cache = PrefixCache(num_slots=2, num_cells=100, states=StateLimits(10_000), reserved=lambda: 0)
    state = cache.states.add(list(range(80)), Scope(), uses=1)
    assert state is not None
    other = cache.place(sequence(list(range(500, 560))), cells=60)
    assert other is not None
    cache.append(other, list(range(500, 560)))
    waits = sequence([*range(80), 99])
    for _ in range(5):
        assert cache.place(waits, cells=81) is None
    assert state.uses == 1
    assert other.tokens, "what runs keeps its cells"
    cache.release(other)
    assert cache.place(waits, cells=81) is not None
    assert state.uses == 2


def test_who_finds_no_room_costs_nobody_his_cells() -> None:
    cache = PrefixCache(num_slots=3, num_cells=100, states=StateLimits(), reserved=lambda: 0)
    run(cache, sequence(list(range(30))))
    busy = cache.place(sequence(list(range(500, 560))), cells=60)
    assert busy is not None
    cache.append(busy, list(range(500, 560)))
    assert cache.place(sequence(list(range(700, 750))), cells=50) is None
    assert cache.cells_used == 90


def test_a_hit_on_the_disk_sorts_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    states = SavedStates(StateLimits(memory_bytes=100, disk_bytes=1000))
    kept = states.adopt(list(range(60)), OWN, uses=1, pin="")
    assert states.add(list(range(100, 190)), OWN) is not None
    monkeypatch.setattr("runtime.states.sorted", None, raising=False)
    found, length = states.find_on_disk([*range(60), 7], OWN, limit=60)
    assert (found, length) == (kept, 60)


def test_pins_in_memory_leave_the_rest_to_what_is_read() -> None:
    states = SavedStates(StateLimits(memory_bytes=150, disk_bytes=1000))
    pinned = states.add(list(range(70)), OWN)
    large = states.adopt(list(range(100, 190)), OWN, uses=1, pin="")
    assert pinned is not None
    assert large is not None
    states.pin(pinned, "p")
    assert states.find_on_disk([*range(100, 190), 7], OWN, limit=90) == (None, 0)
    states.unpin("p")
    assert states.find_on_disk([*range(100, 190), 7], OWN, limit=90) == (large, 90)


def test_where_the_budget_shrank_the_longest_unused_files_go() -> None:
    states = SavedStates(StateLimits(memory_bytes=500, disk_bytes=150))
    found = [states.adopt(list(range(100 * i, 100 * i + 50)), OWN, uses=1, pin="") for i in range(5)]
    assert [s is not None and s.on_disk for s in found] == [False, False, True, True, True]
    assert [op.state for op in states.take_disk_ops() if isinstance(op, RemoveState)] == found[:2]
    assert states.adopt(list(range(900, 950)), OWN, uses=9, pin="") is not None
    assert states.adopt([1] * 50, OWN, uses=1, pin="p") is not None
    assert states.adopt([2] * 120, OWN, uses=1, pin="") is None, (
        "it is worth less for each byte than what it would push out"
    )


def test_a_state_that_memory_and_the_disk_hold_is_not_booked_twice() -> None:
    states = SavedStates(StateLimits(100_000, 100_000))
    first = states.add(list(range(80)), Scope(), uses=HOT_USES)
    assert first is not None
    for op in states.take_disk_ops():
        assert isinstance(op, StoreState)
        states.written(op.state, is_good=True)
    used_bytes = states.memory_bytes
    assert states.add(list(range(80)), Scope(), uses=HOT_USES) is None
    assert states.memory_bytes == used_bytes
