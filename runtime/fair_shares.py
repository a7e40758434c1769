"""Who may wait, who goes next, and how a step's room is divided. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class FairShares(Generic[K]):
    """Virtual times of those who wait for a shared machine: the earliest goes next, and what it gets moves it on.

    Whoever joins the queue starts at the virtual time of the last one served, so that nobody saves up while away and
    nobody is punished for what he used while the machine was free; what he was served beyond that still counts.

    Source: start-time fair queueing (Goyal, Vin and Cheng 1996, "Start-time Fair Queuing", SIGCOMM), with tokens
    counted as they are computed, since an answer's length is not known before (Sheng et al. 2024, "Fairness in Serving
    Large Language Models", arXiv:2401.00588).
    """

    def __init__(self) -> None:
        self._times: dict[K, float] = {}
        self._waiting: Counter[K] = Counter()
        self._now = 0.0

    def enter(self, key: K) -> None:
        """Something of `key` begins to wait."""
        if not self._waiting[key]:
            self._times = {k: t for k, t in self._times.items() if t > self._now or self._waiting[k]}
            self._times[key] = self.time(key)
        self._waiting[key] += 1

    def leave(self, key: K) -> None:
        """Something of `key` waits no longer."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]

    def serve(self, key: K) -> None:
        """Something of `key` leaves the queue to be served: the virtual time is now its own."""
        self._now = max(self._now, self.time(key))
        self.leave(key)

    def charge(self, key: K, amount: float) -> None:
        """Move `key` on by what it got, over its weight; a negative amount gives back what it did not get after all."""
        self._times[key] = self.time(key) + amount

    def time(self, key: K) -> float:
        """The virtual time of `key`; at least the present one, unless it waited all along."""
        own = self._times.get(key, self._now)
        return own if self._waiting[key] else max(own, self._now)

    def reset(self) -> None:
        """Forget what was used: the machine stands idle."""
        self.__init__()


def may_wait(own: int, held: int, capacity: int) -> bool:
    """Whether a queue takes one more of somebody's.

    Args:
        own: How many of his it holds.
        held: How many of all.

    As many as are free: one alone gets half of the queue, two a third each, and there is always room for one who has
    nothing in it. Source: Choudhury and Hahne 1998, "Dynamic Queue Length Thresholds for Shared-Memory Packet
    Switches", IEEE/ACM Transactions on Networking 6(2), with a factor of 1.
    """
    return own < capacity - held


def share_out(room: int, wants: list[tuple[float, int]]) -> list[int]:
    """Divide `room` tokens by weight, max-min fair: what one does not want goes to the others.

    Args:
        wants: Weight (above 0) and tokens wanted (at least 1) of each, in the order in which they get a token where
            there is not one for each. With one for each, nobody gets none.

    Returns:
        A part for each, at most what it wants; their sum is at most `room`, and all of it where enough is wanted.
    """
    parts = [0] * len(wants)
    order = sorted(range(min(len(wants), room)), key=lambda i: wants[i][1] / wants[i][0])
    weights = sum(wants[i][0] for i in order)
    for num_after, i in zip(range(len(order) - 1, -1, -1), order, strict=True):
        weight, want = wants[i]
        fair = int(room * weight / weights) if num_after else room
        parts[i] = min(want, max(1, fair), room - num_after)
        room -= parts[i]
        weights -= weight
    return parts
