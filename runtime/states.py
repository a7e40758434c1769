"""Computed prefixes that left the KV cache: which are kept in memory, which on the disk, and which one a prompt goes on
from.

Pure bookkeeping: the bytes are the backend's and the disk's. Restoring 800 tokens of the default model takes 1 ms from
memory and a few from the disk; computing them takes more than a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, NewType

from runtime.radix import RadixTree
from runtime.request import Request, TokenId

StateId = NewType("StateId", int)

MIN_STATE_TOKENS = 32
"""A shorter prefix is computed again about as fast as it is restored."""
MAX_PINNED_SHARE = 0.5
"""Pinned states take at most so much of either budget: the rest serves what nobody pinned."""
HOT_USES = 2
"""A prefix that served so many requests is written to the disk while there is time."""

MAX_READ_RATIO = 16
"""A file is read where it holds at most so many times the tokens that it saves: reading a token took a hundredth of the
time of computing it."""


class Scope(NamedTuple):
    """Who may find a prefix: requests of one tenant, with one set of adapters. Timing and `cached_tokens` tell whether
    somebody computed a prefix before, so nobody else may.

    Attributes:
        tenant: The key that a request came with; None for what the device's owner pinned for all.
    """

    tenant: str | None = ""
    adapters: str = ""

    @property
    def visible(self) -> tuple[Scope, ...]:
        """The scopes in which a request of this one may look."""
        shared = Scope(None, self.adapters)
        return (self, shared) if self != shared else (self,)


def scope_of(request: Request) -> Scope:
    """Where what a request computes is found again."""
    adapters = "+".join(f"{a.digest}*{a.scale!r}" for a in request.adapters)
    return Scope(None if request.pin else request.tenant, adapters)


@dataclass(frozen=True, slots=True)
class StateLimits:
    """What may be kept outside the cells.

    Attributes:
        memory_bytes: All states in memory together; 0 keeps none, on the disk neither.
        disk_bytes: All states on the disk together; 0 keeps none.
        cell_bytes: Of one token's keys and values.
        overhead_bytes: Of a state, however short: what a recurrent model remembers.
        partial_reuse: Whether cells may be cut and shared at any length, and states be cut; else a state serves only
            prompts that begin with all of it.
        window_tokens: A state longer than that lacks what lay before a sliding window, and is not to be cut; 0 for
            models without.
    """

    memory_bytes: int = 0
    disk_bytes: int = 0
    cell_bytes: int = 1
    overhead_bytes: int = 0
    partial_reuse: bool = True
    window_tokens: int = 0

    @property
    def may_cut_all(self) -> bool:
        """Whether every state and all cells serve prompts that share a part of them."""
        return self.partial_reuse and not self.window_tokens

    def may_cut(self, num_tokens: int) -> bool:
        """Whether a state of so many tokens also serves prompts that share a part of it."""
        return self.partial_reuse and (not self.window_tokens or num_tokens <= self.window_tokens)


NO_STATES = StateLimits()


@dataclass(slots=True, eq=False)
class SavedState:
    """A computed prefix, its bytes held by the backend, by a file, or both.

    Attributes:
        pin: Name under which the device's owner pinned it, or empty.
        uses: Requests that went on from it, the one that computed it included.
        priority: What it is worth; the least goes first.
        on_disk: Whether the books of the disk have it; `is_written` once the bytes are there.
        is_too_large: Memory did not suffice to read it when a prompt wanted it.
    """

    id: StateId
    tokens: list[TokenId]
    scope: Scope
    size_bytes: int
    uses: int = 1
    pin: str = ""
    priority: float = 0.0
    in_memory: bool = False
    on_disk: bool = False
    is_loading: bool = False
    is_written: bool = False
    is_too_large: bool = False


@dataclass(frozen=True, slots=True)
class StoreState:
    """Write a state to the disk; the backend holds its bytes."""

    state: SavedState


@dataclass(frozen=True, slots=True)
class LoadState:
    """Read a state from the disk."""

    state: SavedState


@dataclass(frozen=True, slots=True)
class RemoveState:
    """Remove a state's file."""

    state: SavedState


DiskOp = StoreState | LoadState | RemoveState


@dataclass(slots=True)
class _Tier:
    """One place where states lie: its budget, and the trees that find them."""

    limit_bytes: int
    used_bytes: int = 0
    pinned_bytes: int = 0
    floor: float = 0.0
    """Priority of what was dropped last: what is used now starts from there, so the past is forgotten."""
    states: dict[StateId, SavedState] = field(default_factory=dict[StateId, SavedState])
    trees: dict[Scope, RadixTree[StateId]] = field(default_factory=dict[Scope, RadixTree[StateId]])

    def add(self, state: SavedState) -> None:
        self.states[state.id] = state
        self.used_bytes += state.size_bytes
        self.pinned_bytes += state.size_bytes if state.pin else 0
        self.trees.setdefault(state.scope, RadixTree()).insert(state.id, state.tokens)

    def remove(self, state: SavedState) -> None:
        del self.states[state.id]
        self.used_bytes -= state.size_bytes
        self.pinned_bytes -= state.size_bytes if state.pin else 0
        tree = self.trees[state.scope]
        tree.remove(state.id)
        if not len(tree):
            del self.trees[state.scope]

    def find(
        self, tokens: list[TokenId], scopes: Iterable[Scope], *, limit: int, may_cut: Callable[[int], bool]
    ) -> tuple[SavedState | None, int]:
        """The state that gives the longest beginning of `tokens`, and how long that is, at most `limit`; `may_cut` says
        of which lengths states may be cut."""
        best, length = None, 0
        for scope in scopes:
            if (tree := self.trees.get(scope)) is None:
                continue
            found, n = tree.find(tokens, limit=limit)
            fitting = [i for i in islice(found, 16) if may_cut(len(self.states[i].tokens))]
            if not fitting:
                fitting, n = tree.find_whole(tokens, limit=limit)
            if n > length:
                best, length = self.states[fitting[0]], n
        return best, length

    def find_some(self, tokens: list[TokenId], scopes: Iterable[Scope]) -> Iterator[SavedState]:
        """A few states that begin with all of `tokens`."""
        for scope in scopes:
            if (tree := self.trees.get(scope)) is not None:
                found, length = tree.find(tokens, limit=len(tokens))
                yield from (self.states[i] for i in islice(found, 16 if length == len(tokens) else 0))

    def victims(self, size_bytes: int) -> list[SavedState] | None:
        """What has to go before so much more fits, the least valuable first; None where even that is too little."""
        missing = self.used_bytes + size_bytes - self.limit_bytes
        chosen: list[SavedState] = []
        for state in sorted(self.states.values(), key=_worth) if missing > 0 else ():
            if missing <= 0 or state.pin:
                break
            missing -= state.size_bytes
            chosen.append(state)
        return chosen if missing <= 0 else None


def _never(_num_tokens: int) -> bool:
    return False


def _always(_num_tokens: int) -> bool:
    return True


def _worth(state: SavedState) -> tuple[bool, float]:
    return bool(state.pin), state.priority


class SavedStates:
    """The states that fit their budgets, in memory and on the disk.

    What goes first is the state of the least value: the tokens that it saves, times its uses, for each byte that it
    takes, counted from the value of what went last (GDSF: L. Cherkasova, HPL-98-69R1, 1998).
    """

    def __init__(self, limits: StateLimits) -> None:
        self.limits = limits
        self._memory = _Tier(limits.memory_bytes)
        self._disk = _Tier(limits.disk_bytes)
        self._next_id = 0
        self._dropped: list[StateId] = []
        self._disk_ops: deque[DiskOp] = deque()

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory now."""
        return self._memory.used_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk now, those included that are being written."""
        return self._disk.used_bytes

    @property
    def num_states(self) -> int:
        """States in memory."""
        return len(self._memory.states)

    def size_bytes(self, num_tokens: int) -> int:
        """Bytes of a state of so many tokens."""
        return self.limits.overhead_bytes + num_tokens * self.limits.cell_bytes

    def take_dropped(self) -> list[StateId]:
        """What the backend may forget, since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def take_disk_ops(self) -> list[DiskOp]:
        """What the disk has to do, since the last call; to be done after the step that was planned last."""
        ops = list(self._disk_ops)
        self._disk_ops.clear()
        return ops

    # ------------------------------------------------------------------ finding and using

    def find_in_memory(self, tokens: list[TokenId], scope: Scope, *, limit: int) -> tuple[SavedState | None, int]:
        """The state that shares the longest beginning with `tokens`, and how long that is, at most `limit`."""
        return self._memory.find(tokens, scope.visible, limit=limit, may_cut=self.limits.may_cut)

    def find_on_disk(self, tokens: list[TokenId], scope: Scope, *, limit: int) -> tuple[SavedState | None, int]:
        """The same among the files; nothing where reading it would cost more than it saves, or pins leave no room."""
        state, length = self._disk.find(tokens, scope.visible, limit=limit, may_cut=self.limits.may_cut)
        if state is None or state.is_too_large:
            return None, 0
        return (
            (state, length) if len(state.tokens) <= length * MAX_READ_RATIO and self._fits_memory(state) else (None, 0)
        )

    def num_shared(self, tokens: list[TokenId], scope: Scope, *, limit: int) -> int:
        """Length of the longest beginning that `tokens` share with a state, whether or not it can be cut there."""
        return max(t.find(tokens, scope.visible, limit=limit, may_cut=_always)[1] for t in (self._memory, self._disk))

    def find_near(self, tokens: list[TokenId], scope: Scope, *, slack: int) -> SavedState | None:
        """A state that holds these tokens and nothing else, give or take a few at the end."""
        for tier in (self._memory, self._disk):
            state, length = tier.find(tokens, scope.visible, limit=len(tokens), may_cut=_never)
            if state is not None and length >= len(tokens) - slack:
                return state
            for state in tier.find_some(tokens, scope.visible):
                if len(state.tokens) <= len(tokens) + slack:
                    return state
        return None

    def use(self, state: SavedState) -> None:
        """Note that a state served a request."""
        state.uses += 1
        self._appraise(state)
        if state.uses >= HOT_USES:
            self.persist(state)

    def _appraise(self, state: SavedState) -> None:
        floor = max(self._memory.floor if state.in_memory else 0.0, self._disk.floor if state.on_disk else 0.0)
        state.priority = floor + state.uses * len(state.tokens) / state.size_bytes

    # ------------------------------------------------------------------ memory

    def add(self, tokens: list[TokenId], scope: Scope, *, uses: int = 1) -> SavedState | None:
        """Decide whether cells that are about to go are kept in memory.

        Those that `HOT_USES` requests shared are kept by themselves, also where a longer state holds them too.

        Returns:
            The new state, whose bytes the backend has to save; None where they are too few, too many, or held already.
        """
        size = self.size_bytes(len(tokens))
        if len(tokens) < MIN_STATE_TOKENS or size > self.limits.memory_bytes:
            return None
        if uses < HOT_USES and self._covers(tokens, scope):
            return None
        known, length = self._disk.find(tokens, (scope,), limit=len(tokens), may_cut=_never)
        known = known if length == len(tokens) else None
        if known is not None and known.in_memory:
            known.uses = max(known.uses, uses)
            self._appraise(known)
            return None
        for beginning in self._outgrown(tokens, scope) if self.limits.may_cut(len(tokens)) else ():
            self._forget(beginning)
        if not self._make_memory(size):
            return None
        state = known or self._new(tokens, scope)
        state.uses = max(state.uses, uses)
        self._hold(state)
        return state

    def _new(self, tokens: list[TokenId], scope: Scope) -> SavedState:
        self._next_id += 1
        return SavedState(StateId(self._next_id), list(tokens), scope, self.size_bytes(len(tokens)))

    def _hold(self, state: SavedState) -> None:
        state.in_memory, state.is_too_large = True, False
        self._memory.add(state)
        self._appraise(state)
        if state.uses >= HOT_USES:
            self.persist(state)

    def _covers(self, tokens: list[TokenId], scope: Scope) -> bool:
        """Whether memory holds a state of the same scope that serves as well as one of `tokens` would."""
        covering, length = self._memory.find(tokens, (scope,), limit=len(tokens), may_cut=self.limits.may_cut)
        if covering is None or length < len(tokens):
            return False
        self._appraise(covering)
        return True

    def _outgrown(self, tokens: list[TokenId], scope: Scope) -> Iterator[SavedState]:
        """States of one request that are beginnings of `tokens`: the longer one serves as well."""
        limit = len(tokens)
        while limit > 0:
            state, limit = self._memory.find(tokens, (scope,), limit=limit, may_cut=_never)
            if state is not None and state.uses < HOT_USES and not state.pin:
                yield state
            limit -= 1

    def _fits_memory(self, state: SavedState) -> bool:
        return state.in_memory or self._memory.pinned_bytes + state.size_bytes <= self._memory.limit_bytes

    def _make_memory(self, size_bytes: int) -> bool:
        victims = self._memory.victims(size_bytes)
        for victim in victims or ():
            self._memory.floor = max(self._memory.floor, victim.priority)
            self._forget(victim)
        return victims is not None

    def _forget(self, state: SavedState) -> None:
        """Drop a state from memory. A write of it that was planned and not begun is off."""
        self._memory.remove(state)
        state.in_memory = False
        self._dropped.append(state.id)
        if StoreState(state) in self._disk_ops:
            self._disk_ops.remove(StoreState(state))
            self._disk.remove(state)
            state.on_disk = False

    def unsaved(self, state_id: StateId) -> None:
        """Book that the backend could not hold a state; a file of it stays."""
        if (state := self._memory.states.get(state_id)) is not None:
            self._forget(state)

    def unread(self, state: SavedState) -> None:
        """Book that memory does not suffice to read a state: its file stays, and prompts are computed."""
        state.is_loading, state.is_too_large = False, True

    def discard(self, state_id: StateId) -> None:
        """Forget a state, and its file."""
        state = self._memory.states.get(state_id) or self._disk.states.get(state_id)
        if state is not None and state.in_memory:
            self._forget(state)
        if state is not None:
            self.remove(state)

    def clear(self) -> None:
        """Forget what is in memory; the files stay."""
        for state in list(self._memory.states.values()):
            self._forget(state)

    # ------------------------------------------------------------------ pins

    def pins(self) -> list[SavedState]:
        """What is pinned, by name."""
        states = {**self._memory.states, **self._disk.states}
        return sorted((s for s in states.values() if s.pin), key=lambda s: s.pin)

    def may_pin(self, tokens: list[TokenId], scope: Scope, name: str) -> bool:
        """Whether these tokens fit beside the pins of other names."""
        size = self.size_bytes(len(tokens))
        others = (s for s in self.pins() if s.pin != name and (s.scope, s.tokens) != (scope, tokens))
        budgets = [tier.limit_bytes for tier in (self._memory, self._disk) if tier is self._memory or tier.limit_bytes]
        return size + sum(s.size_bytes for s in others) <= MAX_PINNED_SHARE * min(budgets)

    def pin(self, state: SavedState, name: str) -> None:
        """Keep a state that is in memory until `unpin`, here and on the disk."""
        if state.pin != name and state.on_disk:
            self.remove(state)  # its file does not say that it is pinned
        self._name_pin(state, name)
        self.persist(state)

    def unpin(self, name: str) -> list[SavedState]:
        """Let the states go that were pinned under a name."""
        states = [s for s in self.pins() if s.pin == name]
        for state in states:
            self._name_pin(state, "")
            if state.in_memory:
                self._forget(state)
            self.remove(state)
        return states

    def _name_pin(self, state: SavedState, name: str) -> None:
        change = state.size_bytes * (bool(name) - bool(state.pin))
        self._memory.pinned_bytes += change if state.in_memory else 0
        self._disk.pinned_bytes += change if state.on_disk else 0
        state.pin = name

    # ------------------------------------------------------------------ disk

    def adopt(self, tokens: list[TokenId], scope: Scope, *, uses: int, pin: str) -> SavedState | None:
        """Take a file of an earlier run into the books, where less valuable ones give way; None where it cannot be
        used or is one too many. Of equal ones the first goes: the longest unused is to be adopted first."""
        state = self._new(tokens, scope)
        state.uses, state.pin, state.is_written = uses, pin, True
        self._appraise(state)
        if state.size_bytes > self.limits.memory_bytes or not self._make_disk(state):
            return None
        return state

    def persist(self, state: SavedState) -> None:
        """Have a state in memory written to the disk, where less valuable ones give way for it."""
        if not state.on_disk and state.in_memory and self._make_disk(state):
            self._disk_ops.append(StoreState(state))

    def _make_disk(self, state: SavedState) -> bool:
        """Book a state on the disk, where it fits once less valuable ones have gone."""
        victims = self._disk.victims(state.size_bytes)
        if victims is None or (not state.pin and any(v.priority > state.priority for v in victims)):
            return False
        for victim in victims:
            self._disk.floor = max(self._disk.floor, victim.priority)
            self.remove(victim)
        state.on_disk = True
        self._disk.add(state)
        return True

    def written(self, state: SavedState, *, is_good: bool) -> None:
        """Book what came of a write."""
        if is_good:
            state.is_written = state.on_disk
        else:
            self.remove(state)

    def persist_all(self) -> None:
        """Have every state in memory written, the most valuable first: the process is about to end."""
        for state in sorted(self._memory.states.values(), key=_worth, reverse=True):
            self.persist(state)

    def load(self, state: SavedState) -> None:
        """Have a state read from the disk; `loaded` follows."""
        if not state.is_loading:
            state.is_loading = True
            self._disk_ops.append(LoadState(state))

    def loaded(self, state: SavedState, *, is_good: bool) -> bool:
        """Book what came of a read: whether the backend is to hold its bytes. A file that proves bad is forgotten, and
        written anew where memory has got the state meanwhile."""
        state.is_loading = False
        if not is_good:
            self.remove(state)
            if state.pin or state.uses >= HOT_USES:
                self.persist(state)
            return False
        if state.in_memory or not state.on_disk or not self._make_memory(state.size_bytes):
            return False
        self._hold(state)
        return True

    def remove(self, state: SavedState) -> None:
        """Take a state off the disk."""
        if state.on_disk:
            self._disk.remove(state)
            state.on_disk = state.is_written = False
            if StoreState(state) in self._disk_ops:
                self._disk_ops.remove(StoreState(state))
            else:
                self._disk_ops.append(RemoveState(state))
