"""Computed prefixes that left the KV cache: which are worth keeping, and which one a new prompt goes on from.

Pure bookkeeping: the bytes are the backend's. Restoring 800 tokens of the default model takes 1 ms, computing them more
than a second.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NewType

from runtime.request import AdapterSet, TokenId

StateId = NewType("StateId", int)

MIN_STATE_TOKENS = 32
"""A shorter prefix is computed again about as fast as it is restored."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A sequence's cells, held by the backend under `id`; computed with `adapters`."""

    id: StateId
    tokens: list[TokenId]
    adapters: AdapterSet = ()


def common_prefix(a: list[TokenId], b: list[TokenId], *, limit: int) -> int:
    """Length of the longest common prefix, at most `limit`: bisection over slice equality, at C speed."""
    high = min(len(a), len(b), limit)
    if a[:high] == b[:high]:
        return high
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class SavedStates:
    """The states that fit a budget of cells, the longest unused dropped first.

    Args:
        max_cells: Cells that all states together may hold; 0 keeps none.
    """

    def __init__(self, max_cells: int) -> None:
        self._max_cells = max_cells
        self._states: OrderedDict[StateId, SavedState] = OrderedDict()
        self._cells = 0
        self._next_id = 0

    @property
    def num_cells(self) -> int:
        """Cells held now."""
        return self._cells

    @property
    def num_states(self) -> int:
        return len(self._states)

    def find(self, tokens: list[TokenId], *, limit: int, adapters: AdapterSet = ()) -> tuple[SavedState | None, int]:
        """The state of these adapters that shares the longest beginning with `tokens`, and how long that is, at most
        `limit`."""
        best, length = None, 0
        for state in self._of(adapters):
            n = common_prefix(state.tokens, tokens, limit=limit)
            if n > length:
                best, length = state, n
        return best, length

    def _of(self, adapters: AdapterSet) -> list[SavedState]:
        return [s for s in self._states.values() if s.adapters == adapters]

    def holds(self, state: SavedState) -> bool:
        """Whether a state was not dropped meanwhile."""
        return state.id in self._states

    def use(self, state: SavedState) -> None:
        """Note that a state was of use: it is dropped later."""
        self._states.move_to_end(state.id)

    def add(self, tokens: list[TokenId], *, adapters: AdapterSet = ()) -> tuple[SavedState | None, list[StateId]]:
        """Decide whether cells that are about to go are kept.

        Returns:
            The new state, or None where they are too few, too many, or the beginning of one that is held already; and
            the states that are dropped for it.
        """
        if not MIN_STATE_TOKENS <= len(tokens) <= self._max_cells:
            return None, []
        covering, length = self.find(tokens, limit=len(tokens), adapters=adapters)
        if covering is not None and length == len(tokens):
            self.use(covering)
            return None, []
        dropped = self._drop_beginnings_of(tokens, adapters) + self._make_room(len(tokens))
        self._next_id += 1
        state = SavedState(StateId(self._next_id), list(tokens), adapters)
        self._states[state.id] = state
        self._cells += len(tokens)
        return state, dropped

    def clear(self) -> list[StateId]:
        """Forget everything; what the backend may drop."""
        ids = list(self._states)
        self._states.clear()
        self._cells = 0
        return ids

    def _drop_beginnings_of(self, tokens: list[TokenId], adapters: AdapterSet) -> list[StateId]:
        return [self._drop(s) for s in self._of(adapters) if tokens[: len(s.tokens)] == s.tokens]

    def _make_room(self, cells: int) -> list[StateId]:
        dropped: list[StateId] = []
        while self._cells + cells > self._max_cells:
            dropped.append(self._drop(next(iter(self._states.values()))))
        return dropped

    def _drop(self, state: SavedState) -> StateId:
        del self._states[state.id]
        self._cells -= len(state.tokens)
        return state.id
