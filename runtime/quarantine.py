"""Which request ended the worker: a pure judge.

Every request of the step that died is a suspect. A suspect that comes again runs alone until it is past the point of
the death: then it was another's fault. One that dies alone, and was a suspect before, is convicted. So the guilty one
is found at the second death, and nobody is convicted for its company.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NewType

import msgspec

from runtime import wire

Fingerprint = NewType("Fingerprint", str)

WINDOW_S = 600.0
"""How long a death is remembered."""
MAX_SUSPECTS = 4096
MARGIN_TOKENS = 8
"""How far past the point of the death a suspect goes on alone: the last step's token was not seen, and sampled answers
differ a little."""


def fingerprint(message: wire.Ask, *, engine: str) -> Fingerprint:
    """What makes two requests the same: all but the id and whose it is, for one model and version of the engine."""
    message = msgspec.structs.replace(message, id=0)
    match message:
        case wire.Generate():
            message = msgspec.structs.replace(message, tenant="")
        case wire.Render():
            message = msgspec.structs.replace(message, asked=msgspec.structs.replace(message.asked, id=0, tenant=""))
        case _:
            pass
    body = msgspec.msgpack.encode(message)
    return Fingerprint(hashlib.blake2b(engine.encode() + b"\0" + body, digest_size=8).hexdigest())


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that was in a step that died.

    Attributes:
        at: When it was last, on the monotonic clock.
        num_output: Tokens it had when it got furthest.
        reasons: How the worker ended, each time.
    """

    at: float
    num_output: int
    reasons: tuple[str, ...]

    @property
    def alone_until(self) -> int:
        """Tokens of output after which it may have company."""
        return self.num_output + MARGIN_TOKENS


class Quarantine:
    """The suspects of one model."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._suspects: dict[Fingerprint, Suspect] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody is suspected."""
        return not self._suspects

    def suspect(self, who: Fingerprint) -> Suspect | None:
        """What is known of a request; None means nothing."""
        found = self._suspects.get(who)
        if found is not None and self._clock() - found.at > WINDOW_S:
            del self._suspects[who]
            return None
        return found

    def blame(self, step: Mapping[Fingerprint, int], *, reason: str) -> Suspect | None:
        """Note that the worker died in a step.

        Args:
            step: Who was in it, and how many tokens each had.

        Returns:
            What is known of the one that is convicted by it, if one is.
        """
        now = self._clock()
        before = {who: self.suspect(who) for who in step}
        for who, num_output in step.items():
            known = before[who]
            furthest = max(num_output, known.num_output if known else 0)
            self._suspects.pop(who, None)  # so that the latest stand last
            self._suspects[who] = Suspect(now, furthest, (*(known.reasons[-3:] if known else ()), reason))
        while len(self._suspects) > MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]
        if len(step) == 1 and None not in before.values():
            (who,) = step
            return self._suspects.pop(who)
        return None

    def clear(self, who: Fingerprint) -> None:
        """It went past the point of the death."""
        self._suspects.pop(who, None)
