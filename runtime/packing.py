"""Which texts the next step takes: of several requests at once, fair among them by tokens. Pure.

An encoder reads a text whole, in one step, and nothing stays behind. So a step is any set of texts that fits it. Start-
time fair queueing (Goyal et al. 1996, SIGCOMM) over requests: the one that got the fewest tokens chooses first, so a
single question waits one step beside a hundred thousand tokens of somebody's archive. Within a request the longest
text that fits goes first, so that short ones are left to fill the gaps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from runtime.request import RequestId


@dataclass(frozen=True, slots=True)
class Place:
    """One text of a request."""

    request_id: RequestId
    index: int


@dataclass(slots=True)
class _Pile:
    """The texts of a request that are still to be read, shortest first: lengths and indices side by side."""

    request_id: RequestId
    lengths: list[int]
    indices: list[int]
    num_served: int
    """Tokens it was given, as if it had been there from the start."""


@dataclass(slots=True)
class Packer:
    """The queue of an encoder. Not thread-safe.

    Attributes:
        max_tokens: Of a step; a single longer text makes a step of its own.
        max_texts: Of a step.
    """

    max_tokens: int
    max_texts: int
    _piles: dict[RequestId, _Pile] = field(default_factory=dict[RequestId, _Pile])
    _now: int = 0
    """What the last request to choose had been given: who comes new has no claim on earlier steps."""

    @property
    def num_requests(self) -> int:
        """Requests with texts that are still to be read."""
        return len(self._piles)

    @property
    def num_tokens(self) -> int:
        """Of all texts that are still to be read. Looks at each."""
        return sum(sum(pile.lengths) for pile in self._piles.values())

    def add(self, request_id: RequestId, lengths: Sequence[int]) -> None:
        """Queue texts of these lengths, at least one."""
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
        self._piles[request_id] = _Pile(request_id, [lengths[i] for i in order], order, self._now)

    def cancel(self, request_id: RequestId) -> None:
        """Forget a request; an unknown one is ignored."""
        self._piles.pop(request_id, None)

    def next_step(self) -> list[Place]:
        """Take the texts of the next step out of the queue; none if there are none."""
        places: list[Place] = []
        room = self.max_tokens
        # Whoever got the least, and came first, chooses. One of whose texts none fits drops out: room only shrinks.
        choosing = [(pile.num_served, at, pile) for at, pile in enumerate(self._piles.values())]
        heapify(choosing)
        while choosing and len(places) < self.max_texts:
            served, order, pile = heappop(choosing)
            at = bisect_right(pile.lengths, room) - 1 if places else len(pile.lengths) - 1
            if at < 0:
                continue
            if not places:
                self._now = max(self._now, served)
            length = pile.lengths.pop(at)
            places.append(Place(pile.request_id, pile.indices.pop(at)))
            room -= length
            pile.num_served += length
            if pile.lengths:
                heappush(choosing, (pile.num_served, order, pile))
            else:
                del self._piles[pile.request_id]
        return places
