"""The versions of a slot: whatever happens in whatever order, and wherever the power is cut, a confirmed one serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge.errors import InvalidRequest, SlotBusy
from edge.store.activation import MAX_STARTS, begun, confirmed, paused, recovered, reverted, started, swapped
from edge.store.digest import Digest, digest_bytes
from edge.store.files import FileOps
from edge.store.slots import Slot, read_slots, write_slots

VERSIONS = [digest_bytes(bytes([i])) for i in range(4)]
versions = st.sampled_from(VERSIONS)


class SlotMachine(RuleBasedStateMachine):
    """A device that is told things and loses power. What serves is what the front would send requests to."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Slot()
        self.serves: Digest | None = None
        self.is_up = True
        self.is_loaded = False
        """Whether the version on trial was loaded since the appliance started."""
        self.proven: set[Digest] = set()
        """Versions that were confirmed."""
        self.doomed: set[Digest] = set()
        """Versions that were being loaded or on trial when the power went, and that nobody activated since."""

    @initialize(version=versions)
    def first(self, version: Digest) -> None:
        self.disk = confirmed(begun(Slot(), version, "a:x", trial_s=1), now_s=0)
        self.serves = version
        self.proven.add(version)

    @precondition(lambda self: self.is_up)
    @rule(version=versions)
    def activate(self, version: Digest) -> None:
        if self.disk.trial is not None:
            with pytest.raises(SlotBusy):
                begun(self.disk, version, "a:x", trial_s=1)
        elif version != self.disk.current:
            self.disk = begun(self.disk, version, "a:x", trial_s=1)
            self.doomed.discard(version)
            self.is_loaded = True

    @precondition(lambda self: self.is_up and self.is_loaded)
    @rule()
    def admit(self) -> None:
        """Its golden prompts were answered: no write."""
        assert self.disk.trial is not None
        self.serves = self.disk.trial.candidate

    @precondition(lambda self: self.is_up and self.is_loaded and self.serves != self.disk.current)
    @rule()
    def confirm(self) -> None:
        self.disk = confirmed(self.disk, now_s=0)
        self.proven.add(self._current())
        self.is_loaded = False

    @precondition(lambda self: self.is_up and self.is_loaded)
    @rule()
    def fail(self) -> None:
        self.disk = reverted(self.disk, "it is sick", now_s=0)
        self.serves, self.is_loaded = self.disk.current, False

    @precondition(lambda self: self.is_up and self.disk.trial is None)
    @rule()
    def roll_back(self) -> None:
        if self.disk.previous is None:
            with pytest.raises(InvalidRequest):
                swapped(self.disk, "asked", now_s=0)
        else:
            self.disk = swapped(self.disk, "asked", now_s=0)
            self.serves = self.disk.current

    @precondition(lambda self: self.is_up)
    @rule()
    def stop(self) -> None:
        self.disk = paused(self.disk, served_s=0.5)
        self.is_up = False

    @precondition(lambda self: self.is_up)
    @rule()
    def cut(self) -> None:
        """What was written is there, and nothing else."""
        if self.disk.trial is not None and self.disk.trial.is_open:
            self.doomed.add(self.disk.trial.candidate)
        self.is_up = False

    @precondition(lambda self: not self.is_up)
    @rule()
    def start(self) -> None:
        self.disk = recovered(self.disk, now_s=0)
        self.serves, self.is_up, self.is_loaded = self.disk.current, True, False
        if self.disk.trial is not None:
            assert self.disk.trial.num_starts < MAX_STARTS
            self.disk = started(self.disk)
            self.is_loaded = True

    def _current(self) -> Digest:
        assert self.disk.current is not None
        return self.disk.current

    @invariant()
    def a_version_serves(self) -> None:
        if self.is_up and self.proven:
            assert self.serves is not None
            assert self.serves in self.disk.digests(), "its bytes may be collected"

    @invariant()
    def only_proven_versions_are_fallen_back_to(self) -> None:
        assert self.disk.current is None or self.disk.current in self.proven
        assert self.disk.previous is None or self.disk.previous in self.proven

    @invariant()
    def what_took_the_device_down_is_not_tried_again(self) -> None:
        assert not (self.is_up and self.disk.trial and self.disk.trial.candidate in self.doomed)

    @invariant()
    def every_version_has_a_name(self) -> None:
        assert {*self.disk.digests()} <= {*self.disk.names}
        assert len(self.disk.names) <= len(VERSIONS)


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


A, B = VERSIONS[:2]
SERVING = Slot(current=A, names={A: "a:x"})
CHANGES: list[tuple[str, Callable[[Slot], Slot]]] = [
    ("begun", lambda slot: begun(slot, B, "b:x", trial_s=600)),
    ("paused", lambda slot: paused(slot, served_s=10)),
    ("started", started),
    ("confirmed", lambda slot: confirmed(slot, now_s=1)),
    ("swapped", lambda slot: swapped(slot, "asked", now_s=2)),
]


def test_a_cut_between_any_two_writes_leaves_a_version(tmp_path: Path) -> None:
    for num in range(len(CHANGES) + 1):
        slot = SERVING
        for _, change in CHANGES[:num]:
            slot = change(slot)
        write_slots(tmp_path, {"chat": slot}, FileOps())
        found = recovered(read_slots(tmp_path)["chat"], now_s=3)
        assert found.current in (A, B)
        assert found.current == (B if num == 4 else A), CHANGES[:num]
        assert (found.trial is None) == (num != 2), "a trial goes on only after an end in order"


def test_what_was_rolled_back_is_told_with_its_reason() -> None:
    slot = reverted(begun(SERVING, B, "b:x", trial_s=600), "signal 6", now_s=5)
    assert slot.trial is None
    assert slot.current == A
    assert slot.last is not None
    assert (slot.last.digest, slot.last.outcome, slot.last.reason) == (B, "rolled_back", "signal 6")
    assert slot.names == {A: "a:x", B: "b:x"}


def test_a_trial_that_is_stopped_again_and_again_ends() -> None:
    slot = begun(SERVING, B, "b:x", trial_s=600)
    for _ in range(MAX_STARTS - 1):
        slot = started(recovered(paused(slot, served_s=1), now_s=0))
        assert slot.trial is not None
    assert recovered(paused(slot, served_s=1), now_s=0).trial is None
