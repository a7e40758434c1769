"""Pins: told only when they are safe, refused where there is no room, for all until they are removed."""

from __future__ import annotations

from collections.abc import Sequence

from edge.errors import BackendError, NoRoomToPin
from runtime.backends.base import Capabilities
from runtime.engine import Engine
from runtime.request import Pin, Request, RequestId, SamplingParams
from runtime.states import SavedStates, Scope, StateLimits
from tests.support import CollectingSink, ScriptedBackend, ScriptedDisk

PROMPT = tuple(range(1, 81))


class Device:
    """An engine on a disk, driven by hand."""

    def __init__(
        self, drive: ScriptedDisk, *, memory: int = 1000, disk: int = 1000, has_room: Sequence[bool] = ()
    ) -> None:
        limits = StateLimits(memory, disk)
        self.backend = ScriptedBackend(Capabilities(4, 2000, 2000, 64, limits), has_room=has_room)
        self.sink, self.drive = CollectingSink(), drive
        self.engine = Engine(self.backend, self.sink, max_queue=9, disk=drive, clock=self.backend.clock)
        for (scope, tokens), (_, pin) in list(drive.files.items()):
            assert self.engine.adopt(list(tokens), scope, uses=1, pin=pin)
        self._next_id = 0

    def ask(self, prompt: tuple[int, ...], *, pin: str = "", tenant: str = "") -> RequestId:
        self._next_id += 1
        asked = RequestId(self._next_id)
        params = SamplingParams(temperature=0)
        self.engine.submit(Request(asked, prompt, 1, params, ignore_eos=True, tenant=tenant, pin=pin))
        return asked

    def run(self, *, disk_works: bool = True) -> None:
        for _ in range(50):
            self.engine.advance()
            if disk_works:
                self.drive.work()

    def cached(self, prompt: tuple[int, ...], *, tenant: str = "") -> int:
        asked = self.ask(prompt, tenant=tenant)
        self.run()
        return self.sink.last[asked].num_cached

    def is_told(self, asked: RequestId) -> bool:
        return asked in self.sink.failures or self.sink.last[asked].finish_reason is not None

    def pins(self, *, remove: str = "") -> tuple[list[Pin], bool]:
        answers: list[tuple[list[Pin], bool]] = []
        self.engine.ask_pins(lambda pins, is_removed: answers.append((pins, is_removed)), remove=remove)
        self.run()
        return answers[0]


def test_a_pin_is_told_when_it_is_written_and_outlives_a_crash() -> None:
    drive = ScriptedDisk([])
    device = Device(drive)
    asked = device.ask(PROMPT, pin="p")
    device.run(disk_works=False)
    assert not device.is_told(asked)
    device.run()
    assert device.is_told(asked)
    assert device.pins() == ([Pin("p", 80, 80, True, True, 2)], False)
    again = Device(drive)
    assert again.pins() == ([Pin("p", 80, 80, False, True, 1)], False)
    for tenant in ("a", "b"):
        assert again.cached((*PROMPT, 99), tenant=tenant) == 80


def test_a_disk_that_fails_refuses_the_pin() -> None:
    device = Device(ScriptedDisk([False]))
    asked = device.ask(PROMPT, pin="p")
    device.run()
    assert isinstance(device.sink.failures[asked].error, BackendError)
    assert device.pins() == ([], False)


def test_without_a_disk_a_pin_is_in_memory_only() -> None:
    device = Device(ScriptedDisk([]), disk=0)
    asked = device.ask(PROMPT, pin="p")
    device.run()
    assert device.is_told(asked)
    assert device.pins()[0] == [Pin("p", 80, 80, True, False, 2)]


def test_where_there_is_no_room_a_pin_is_refused_and_the_others_stay() -> None:
    for memory, disk in ((300, 1000), (1000, 300)):
        device = Device(ScriptedDisk([]), memory=memory, disk=disk)
        device.ask(PROMPT, pin="first")
        device.run()
        asked = device.ask(tuple(range(100, 180)), pin="second")
        device.run()
        assert isinstance(device.sink.failures[asked].error, NoRoomToPin)
        assert [p.name for p in device.pins()[0]] == ["first"]


def test_a_pin_for_which_memory_lacks_is_refused() -> None:
    for disk in (0, 1000):
        device = Device(ScriptedDisk([]), disk=disk, has_room=[False])
        asked = device.ask(PROMPT, pin="p")
        device.run()
        assert isinstance(device.sink.failures[asked].error, NoRoomToPin)
        assert device.pins() == ([], False)


def test_the_same_name_replaces_and_the_same_prefix_is_renamed() -> None:
    device = Device(ScriptedDisk([]), memory=200, disk=200)
    other = tuple(range(100, 180))
    for prompt, name in ((PROMPT, "p"), (PROMPT, "p"), (PROMPT[:60], "p"), (other, "p"), (other, "q")):
        asked = device.ask(prompt, pin=name)
        device.run()
        assert device.is_told(asked)
        assert asked not in device.sink.failures
        assert [(p.name, p.on_disk) for p in device.pins()[0]] == [(name, True)]
        assert [pin for _, pin in device.drive.files.values()] == [name]
    assert [tokens for _, tokens in device.drive.files] == [other]


def test_what_is_removed_is_for_nobody_any_more() -> None:
    device = Device(ScriptedDisk([]))
    device.ask(PROMPT, pin="p")
    device.run()
    assert device.pins(remove="absent") == (device.pins()[0], False)
    assert device.pins(remove="p") == ([], True)
    assert device.cached((*PROMPT, 99)) == 0
    assert not device.drive.files


def test_what_pins_leave_no_room_for_is_not_waited_for() -> None:
    states = SavedStates(StateLimits(memory_bytes=100, disk_bytes=1000))
    large = list(range(60))
    stored = states.adopt(large, Scope(), uses=1, pin="")
    assert states.find_on_disk(large, Scope(), limit=60) == (stored, 60)
    pinned = states.add(list(range(100, 150)), Scope(None), uses=2)
    assert pinned is not None
    assert states.may_pin(pinned.tokens, pinned.scope, "p")
    states.pin(pinned, "p")
    assert states.find_on_disk(large, Scope(), limit=60) == (None, 0)
