"""What a step costs, learned from the steps that were run. Pure: told of each step's seconds, reads no clock.

A step's time grows with its tokens, but not in a straight line: small batches are dear (the default model in Q4_1, two
threads: 5.4 ms for one token, 27 for eight, 2 ms a token from 50 on), and how dear depends on the weights' type. So it
is remembered by width, and read off between the widths that were seen. Whose tokens they are hardly counts: sixteen of
one sequence cost within 6 % of one each of sixteen.

The host's speed changes too, by half or double for seconds at a time. That changes all widths alike: it is kept apart,
as the pace of the last steps, so that a width not seen for a while is still told right.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from statistics import median

_SAMPLES = 15
"""A width's cost is the median of its last so many steps."""
_PACE_STEPS = 7
"""The pace is the median of the last so many steps, each against its width's cost."""
_SETTLED = 3
"""A width with fewer samples than this says nothing about the pace."""
_EXACT = 16
"""Widths up to this are kept apart, wider ones by steps of a quarter."""


def _width(num_tokens: int) -> int:
    if num_tokens <= _EXACT:
        return num_tokens
    return round(_EXACT * 1.25 ** round(math.log(num_tokens / _EXACT, 1.25)))


@dataclass(slots=True)
class _Table:
    """Costs at pace 1 by width, for one number of threads; `widths` is sorted."""

    widths: list[int] = field(default_factory=list[int])
    samples: dict[int, deque[float]] = field(default_factory=dict[int, deque[float]])
    costs: dict[int, float] = field(default_factory=dict[int, float])

    def add(self, width: int, seconds: float) -> None:
        if width not in self.samples:
            self.samples[width] = deque(maxlen=_SAMPLES)
            insort(self.widths, width)
        self.samples[width].append(seconds)
        self.costs[width] = median(self.samples[width])

    def cost(self, num_tokens: int) -> float:
        """Between two known widths on the line between them, beyond them in proportion."""
        i = bisect_left(self.widths, num_tokens)
        if i in (0, len(self.widths)):
            nearest = self.widths[min(i, len(self.widths) - 1)]
            return self.costs[nearest] * num_tokens / nearest
        low, high = self.widths[i - 1], self.widths[i]
        share = (num_tokens - low) / (high - low)
        return self.costs[low] + share * (self.costs[high] - self.costs[low])


class StepCosts:
    """Seconds of a step by its tokens and threads. One thread owns it; memory is bounded by the widths there are."""

    def __init__(self) -> None:
        self._tables: dict[int, _Table] = {}
        self._ratios: deque[float] = deque(maxlen=_PACE_STEPS)
        self._pace = 1.0

    def record(self, num_tokens: int, *, threads: int, seconds: float) -> None:
        """Learn from a step of so many tokens, of however many sequences. Nonsense (no tokens, no time) is ignored."""
        if num_tokens <= 0 or seconds <= 0:
            return
        table = self._tables.setdefault(threads, _Table())
        width = _width(num_tokens)
        seconds *= width / num_tokens
        if len(table.samples.get(width, ())) >= _SETTLED:
            self._ratios.append(seconds / table.costs[width])
            self._pace = median(self._ratios)
        table.add(width, seconds / self._pace)

    def predict(self, num_tokens: int, *, threads: int) -> float | None:
        """Seconds that a step of so many tokens would take now; None before any step with so many threads."""
        table = self._tables.get(threads)
        return self._pace * table.cost(num_tokens) if table is not None else None

    def widest(self, *, threads: int) -> int:
        """Tokens of the widest step with so many threads; beyond it `predict` only multiplies."""
        table = self._tables.get(threads)
        return table.widths[-1] if table is not None else 0
