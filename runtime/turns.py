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

    Each turn is one class's of priority: a class gets `class_ratio` times what the next one gets, as far as it wants
    it. In a class, a set's claim is its sequences times the turns since it last ran. It grows while the set waits, so
    a set of one sequence comes before one of n after at most n turns of that one. A higher class that arrives ends a
    turn, unless a lower one has waited for it.

    Args:
        class_ratio: What a class gets, against the class after it.
    """

    def __init__(self, class_ratio: float) -> None:
        self._class_ratio = class_ratio
        self._current: AdapterSet = ()
        self._class = 0
        self._class_times: dict[int, float] = {}
        """What each class has had over its weight, in turns: the least is next (start-time fair queueing)."""
        self._now = 0.0
        self._steps = self._tokens = 0
        self._turn = 0
        self._last_turn: dict[AdapterSet, int] = {}

    def choose(self, wanted: Iterable[tuple[AdapterSet, int]]) -> AdapterSet:
        """The set of the next step.

        Args:
            wanted: Of each sequence that could be computed, its set and its priority.
        """
        crowds: dict[int, Counter[AdapterSet]] = {}
        for adapters, priority in wanted:
            crowds.setdefault(priority, Counter())[adapters] += 1
        sets = set[AdapterSet]().union(*crowds.values())
        arrived = [p for p, crowd in crowds.items() if any(a not in self._last_turn for a in crowd)]
        is_gone = self._current not in sets or self._current not in self._last_turn
        self._last_turn = {a: self._last_turn.get(a, self._turn - 1) for a in sets}
        if sets and (is_gone or self._is_over(crowds, arrived)):
            self._begin(crowds)
        return self._current

    def _is_over(self, crowds: dict[int, Counter[AdapterSet]], arrived: list[int]) -> bool:
        higher = [p for p in crowds if p < self._class]
        overtaken = any(self._time(p) <= self._now for p in higher) and all(p in arrived for p in higher)
        return overtaken or self._steps >= TURN_STEPS or self._tokens >= TURN_TOKENS

    def _time(self, priority: int) -> float:
        return max(self._class_times.get(priority, 0.0), self._now)

    def _begin(self, crowds: dict[int, Counter[AdapterSet]]) -> None:
        times = {p: self._time(p) for p in crowds}
        self._class = min(crowds, key=lambda p: (times[p], p))
        self._now = times[self._class]
        self._class_times |= times
        crowd = crowds[self._class]
        others = [a for a in crowd if a != self._current] or [self._current]
        self._current = max(others, key=lambda a: crowd[a] * (self._turn - self._last_turn[a]))
        self._turn += 1
        self._last_turn[self._current] = self._turn
        self._steps = self._tokens = 0

    def book(self, num_tokens: int) -> None:
        """Count a step of the chosen set."""
        self._steps += 1
        self._tokens += num_tokens
        cost = max(1 / TURN_STEPS, num_tokens / TURN_TOKENS)
        self._class_times[self._class] = self._time(self._class) + cost * self._class_ratio**self._class
