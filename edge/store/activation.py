"""What becomes of a slot's versions: pure decisions, each of which is one write of `slots.json`.

`current` is what serves, or what serves again: only a version that was confirmed stands there, and only `confirmed` and
`swapped` change it. A version on trial stands beside it. So whichever writes a power cut lets through, there is a
version to serve, and one that took the machine down is not tried again.
"""

from __future__ import annotations

from msgspec.structs import replace

from edge.errors import InvalidRequest, SlotBusy

from .digest import Digest
from .slots import Slot, Trial, Verdict

MAX_STARTS = 3
"""How often a version is loaded for one trial, where the appliance was stopped in order each time in between."""
CUT_OFF = "the appliance ended without being asked to while this version was loaded or on trial: a crash or a power cut"
RESTARTED = f"the appliance was stopped {MAX_STARTS} times before its trial was over"
NO_VERSION = "There is no version before the one that serves."


def begun(slot: Slot, candidate: Digest, name: str, *, trial_s: float) -> Slot:
    """A version goes on trial, and its first load is counted. To be on the disk before that load.

    Raises:
        SlotBusy: Another one is on trial.
    """
    if slot.trial is not None:
        raise SlotBusy("Another version is on trial there.", hint="Wait until it is confirmed, or: edge rollback SLOT.")
    return started(_named(slot, candidate, name, trial=Trial(candidate=candidate, trial_s=trial_s)))


def started(slot: Slot) -> Slot:
    """A further load of the version on trial is counted. To be on the disk before that load."""
    trial = slot.trial
    if trial is None:
        return slot
    return replace(slot, trial=replace(trial, num_starts=trial.num_starts + 1, is_open=True))


def paused(slot: Slot, *, served_s: float) -> Slot:
    """The appliance ends in order, with a version on trial that served for so long."""
    trial = slot.trial
    return slot if trial is None else replace(slot, trial=replace(trial, is_open=False, served_s=served_s))


def recovered(slot: Slot, *, now_s: float) -> Slot:
    """The slot as the appliance finds it when it starts. Where a trial is left, it goes on: see `started`."""
    trial = slot.trial
    if trial is not None and trial.is_open:
        return reverted(slot, CUT_OFF, now_s=now_s)
    if trial is not None and trial.num_starts >= MAX_STARTS:
        return reverted(slot, RESTARTED, now_s=now_s)
    return slot


def confirmed(slot: Slot, *, now_s: float) -> Slot:
    """The version on trial stays; the one before it is kept."""
    trial = slot.trial
    if trial is None:
        return slot
    verdict = Verdict(digest=trial.candidate, outcome="confirmed", time_s=now_s)
    return _trimmed(replace(slot, current=trial.candidate, previous=slot.current, trial=None, last=verdict))


def reverted(slot: Slot, reason: str, *, now_s: float, was_asked: bool = False) -> Slot:
    """The version on trial goes; the current one serves."""
    trial = slot.trial
    if trial is None:
        return slot
    outcome = "withdrawn" if was_asked else "rolled_back"
    verdict = Verdict(digest=trial.candidate, outcome=outcome, reason=reason, time_s=now_s)
    return _trimmed(replace(slot, trial=None, last=verdict))


def swapped(slot: Slot, reason: str, *, now_s: float) -> Slot:
    """The version before the current one serves again, and the other way round.

    Raises:
        InvalidRequest: There is none.
    """
    if slot.previous is None or slot.current is None:
        raise InvalidRequest(NO_VERSION, hint="See: edge slots.")
    verdict = Verdict(digest=slot.current, outcome="withdrawn", reason=reason, time_s=now_s)
    return replace(slot, current=slot.previous, previous=slot.current, last=verdict)


def _named(slot: Slot, digest: Digest, name: str, *, trial: Trial) -> Slot:
    return replace(slot, trial=trial, names={**slot.names, digest: name})


def _trimmed(slot: Slot) -> Slot:
    """Without the names of versions that it no longer speaks of."""
    spoken_of = [*slot.digests(), *([slot.last.digest] if slot.last else [])]
    return replace(slot, names={d: n for d, n in slot.names.items() if d in spoken_of})
