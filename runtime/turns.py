"""Which adapter set the next step computes. Pure.

llama.cpp sets adapters for a whole context, so a step holds one set, and it plans its graph anew at each change: 6 ms
on the default model, about a step of one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from runtime.request import AdapterSet

TURN_STEPS = 8
"""Steps of a turn while others wait: a change then costs 5 % of a turn of eight sequences."""
TURN_TOKENS = 512
"""Tokens that end a turn sooner: a step that reads a prompt lasts as long as many that do not."""


class Turns:
    """Sets take turns by what waits and for how long, so that changes are few and no set starves.

    A set's claim is its sequences times the steps since it last ran. It grows while the set waits, so a set of one
    sequence comes before one of n after at most n turns of that one.
    """

    def __init__(self) -> None:
        self._current: AdapterSet = ()
        self._steps = self._tokens = 0
        self._clock = 0
        self._last_run: dict[AdapterSet, int] = {}

    def choose(self, wanted: Iterable[AdapterSet]) -> AdapterSet:
        """The set of the next step.

        Args:
            wanted: Of each sequence that could be computed, its set.
        """
        self._clock += 1
        counts = Counter(wanted)
        self._last_run = {a: self._last_run.get(a, self._clock - 1) for a in counts}
        others = [a for a in counts if a != self._current]
        is_over = self._steps >= TURN_STEPS or self._tokens >= TURN_TOKENS
        if others and (is_over or self._current not in counts):
            self._current = max(others, key=lambda a: counts[a] * (self._clock - self._last_run[a]))
            self._steps = self._tokens = 0
        self._last_run[self._current] = self._clock
        return self._current

    def book(self, num_tokens: int) -> None:
        """Count a step of the chosen set."""
        self._steps += 1
        self._tokens += num_tokens
