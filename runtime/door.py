"""Who is let in, and who has to go where room is short. Owned by the event loop.

A connection costs a file descriptor and memory before anybody knows what it wants, so there is a bound of them, and
of those of one address. Near it, those make room that ask for nothing: first who has sent a part of a head, since
programs send theirs in one piece; then who waits between two requests; then who still sends a body. Of each kind, the
oldest.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger("edge.server")

BATCH = 16
"""Where all places are taken, this part of them is looked for at once: a look takes as long for one."""
LOOK_INTERVAL_S = 0.1
LOG_INTERVAL_S = 10.0
"""Connections that were ended are logged together: nobody shall fill the log by being ended."""


@dataclass(frozen=True, slots=True)
class Manners:
    """What connections have to keep to.

    Attributes:
        max_connections: Open at once.
        max_of_peer: Of these, of one address of another machine; of IPv6, of one network of 64 bits.
        head_s: From the first byte of a request to the end of its head; from its start for a connection, with TLS too.
        stall_s: Without that anything of a body comes, or of an answer is taken.
    """

    max_connections: int
    max_of_peer: int
    head_s: float = 10.0
    stall_s: float = 30.0


class Guest(Protocol):
    """A connection."""

    peer: str

    @property
    def leisure(self) -> tuple[int, float] | None:
        """How well it could go, the least first: a rank, and since when. None while a request is answered, to the last
        byte."""
        ...

    def check(self, now: float) -> None:
        """See that it keeps its manners, and end it where it does not."""
        ...

    def drop(self) -> None:
        """End it at once."""
        ...

    def dismiss(self) -> None:
        """End it if it waits between two requests."""
        ...


class Door:
    """The connections that are open.

    Attributes:
        is_draining: The appliance stops: each answer is the last of its connection.
    """

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.is_draining = False
        self._guests: dict[Guest, None] = {}
        self._of_peer: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._logged_at = float("-inf")
        self._look_again_at: dict[str | None, float] = {}
        """After a look that found nobody; of a peer, or of all."""

    def __len__(self) -> int:
        return len(self._guests)

    def guests(self) -> list[Guest]:
        """The connections, the oldest first."""
        return list(self._guests)

    def has_room(self, peer: str, *, now: float) -> bool:
        """Whether one more of this peer may come in; others may have to go for it.

        Args:
            peer: Its address; empty for programs of this machine, which share one.
            now: By the event loop's clock.
        """
        most, most_of_peer = self.manners.max_connections, self.manners.max_of_peer
        if peer and self._of_peer[peer] >= most_of_peer:
            self._look(1, peer, now)
        if len(self) >= most:
            self._look(max(1, most // BATCH), None, now)
        return len(self) < most and not (peer and self._of_peer[peer] >= most_of_peer)

    def _look(self, num: int, peer: str | None, now: float) -> None:
        """Make room, unless just now there was none to be made: a look at all takes long."""
        if now >= self._look_again_at.get(peer, now) and not self.make_room(num, peer=peer):
            self._look_again_at[peer] = now + LOOK_INTERVAL_S

    def make_room(self, num: int, *, peer: str | None = None) -> int:
        """End at most `num` connections that ask for nothing; of one peer, where it is given. How many that were."""
        asked = [g for g in self._guests if peer is None or g.peer == peer]
        idle = [(leisure, i) for i, g in enumerate(asked) if (leisure := g.leisure) is not None]
        going = [asked[i] for _, i in heapq.nsmallest(num, idle)]
        for guest in going:
            self.leave(guest)
            guest.drop()
            self.note("made room")
        return len(going)

    def enter(self, guest: Guest) -> None:
        """A connection begins."""
        self._guests[guest] = None
        self._of_peer[guest.peer] += 1

    def leave(self, guest: Guest) -> None:
        """It ends. May be said again."""
        if guest in self._guests:
            del self._guests[guest]
            self._of_peer -= Counter((guest.peer,))

    def note(self, reason: str) -> None:
        """Count a connection that was ended, or not let in."""
        self._ended[reason] += 1

    def sweep(self, now: float) -> None:
        """End those that have no manners; to be called about once a second.

        Args:
            now: By the event loop's clock.
        """
        self._look_again_at.clear()
        self._ask_each(lambda guest: guest.check(now))
        if self._ended and now - self._logged_at > LOG_INTERVAL_S:
            reasons = ", ".join(f"{num} {reason}" for reason, num in sorted(self._ended.items()))
            log.warning("connections ended or refused: %s; %d are open", reasons, len(self))
            self._ended.clear()
            self._logged_at = now

    def drain(self) -> None:
        """The appliance stops: who waits between two requests goes now, the others after their answer."""
        self.is_draining = True
        self._ask_each(lambda guest: guest.dismiss())

    def _ask_each(self, ask: Callable[[Guest], None]) -> None:
        """One that fails goes, and harms no other."""
        for guest in self.guests():
            try:
                ask(guest)
            except Exception:
                log.exception("a connection could not be looked after, and is ended")
                self.leave(guest)
                with contextlib.suppress(Exception):  # the cause is logged
                    guest.drop()


@dataclass(slots=True)
class Pace:
    """Whether something goes on: at least `min_bytes` in any `window_s`."""

    window_s: float
    min_bytes: int
    since: float
    _from: int = 0

    def restart(self, now: float, num_bytes: int) -> None:
        """Nothing is owed for the time until now."""
        self.since, self._from = now, num_bytes

    def is_too_slow(self, now: float, num_bytes: int) -> bool:
        """Look again; several times in a window.

        Args:
            num_bytes: All that went so far.
        """
        if num_bytes - self._from >= self.min_bytes:
            self.restart(now, num_bytes)
        return now - self.since > self.window_s
