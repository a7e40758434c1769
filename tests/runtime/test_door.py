"""Who is let in, and who goes where room is short."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from runtime.door import Door, Manners, Pace
from runtime.listener import peer_of, room_for


@dataclass(eq=False)
class Visitor:
    """A connection that notes what becomes of it."""

    peer: str
    leisure: tuple[int, float] | None
    is_dropped: bool = False
    is_dismissed: bool = False
    checked_at: float | None = None

    def check(self, now: float) -> None:
        self.checked_at = now

    def drop(self) -> None:
        self.is_dropped = True

    def dismiss(self) -> None:
        self.is_dismissed = True


LEISURES = st.one_of(st.none(), st.tuples(st.integers(0, 3), st.floats(0, 9)))
COMINGS = st.lists(st.tuples(st.sampled_from(["", "10.0.0.1", "10.0.0.2"]), LEISURES), max_size=60)


@given(COMINGS, st.integers(1, 20), st.integers(1, 20))
def test_the_bounds_hold_and_nobody_goes_who_is_served(
    comings: list[tuple[str, tuple[int, float] | None]], most: int, most_of_peer: int
) -> None:
    door, inside = Door(Manners(most, most_of_peer)), list[Visitor]()
    for peer, leisure in comings:
        if door.has_room(peer, now=0.0):
            visitor = Visitor(peer, leisure)
            inside.append(visitor)
            door.enter(visitor)
        open_now = [v for v in inside if not v.is_dropped]
        assert door.guests() == open_now
        assert len(door) == len(open_now) <= most
        assert all(sum(v.peer == p for v in open_now) <= most_of_peer for p in ("10.0.0.1", "10.0.0.2"))
    assert all(v.leisure is not None for v in inside if v.is_dropped)


@given(st.lists(LEISURES, min_size=1, max_size=30), st.integers(1, 8))
def test_those_go_first_who_could_go_best(leisures: list[tuple[int, float] | None], num: int) -> None:
    door, inside = Door(Manners(100, 100)), [Visitor("", leisure) for leisure in leisures]
    for visitor in inside:
        door.enter(visitor)
    door.make_room(num)
    gone = sorted(v.leisure for v in inside if v.is_dropped and v.leisure)
    assert gone == sorted(v.leisure for v in inside if v.leisure)[:num]


def test_one_address_makes_room_for_itself_only() -> None:
    door = Door(Manners(100, 2))
    mine, other = [Visitor("10.0.0.1", (1, float(i))) for i in range(2)], Visitor("10.0.0.2", (0, 0.0))
    for visitor in (*mine, other):
        door.enter(visitor)
    assert door.has_room("10.0.0.1", now=0.0)
    assert [v.is_dropped for v in (*mine, other)] == [True, False, False]
    busy = Visitor("10.0.0.1", None)
    door.enter(busy)
    mine[1].leisure = None
    assert not door.has_room("10.0.0.1", now=0.0)
    assert door.has_room("", now=0.0)


@pytest.mark.parametrize("manners", [Manners(2, 9), Manners(9, 2)])
def test_where_nobody_could_go_is_not_looked_again_at_once(manners: Manners) -> None:
    door, inside = Door(manners), [Visitor("10.0.0.1", None) for _ in range(2)]
    for visitor in inside:
        door.enter(visitor)
    assert not door.has_room("10.0.0.1", now=5.0)
    inside[0].leisure = (2, 0.0)
    assert not door.has_room("10.0.0.1", now=5.09)
    assert door.has_room("10.0.0.2", now=5.09) == (manners.max_connections > 2), "of others is"
    assert door.has_room("10.0.0.1", now=5.11)
    assert inside[0].is_dropped


def test_leaving_twice_is_leaving_once() -> None:
    door, visitor = Door(Manners(2, 1)), Visitor("10.0.0.1", None)
    door.enter(visitor)
    for _ in range(2):
        door.leave(visitor)
    assert len(door) == 0
    assert door.has_room("10.0.0.1", now=0.0)


def test_a_guest_that_cannot_be_looked_after_goes_and_the_others_are(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass(eq=False)
    class Broken(Visitor):
        @override
        def check(self, now: float) -> None:
            raise RuntimeError("out of luck")

        @override
        def drop(self) -> None:
            super().drop()
            raise RuntimeError("twice")

    door = Door(Manners(9, 9))
    broken, well = Broken("", None), Visitor("", None)
    for visitor in (broken, well):
        door.enter(visitor)
    door.sweep(5.0)
    assert (broken.is_dropped, well.checked_at) == (True, 5.0)
    assert door.guests() == [well]
    assert "out of luck" in caplog.text


def test_all_are_told_that_it_stops() -> None:
    door, inside = Door(Manners(9, 9)), [Visitor("", None) for _ in range(3)]
    for visitor in inside:
        door.enter(visitor)
    door.drain()
    assert door.is_draining
    assert all(v.is_dismissed for v in inside)


@given(st.lists(st.tuples(st.floats(0.1, 20), st.integers(0, 2000)), max_size=50))
def test_a_pace_is_kept_by_who_does_enough_in_each_window(parts: list[tuple[float, int]]) -> None:
    pace, now, done = Pace(30.0, 1000, 0.0), 0.0, 0
    kept_at, kept = 0.0, 0
    for seconds, num_bytes in parts:
        now, done = now + seconds, done + num_bytes
        if done - kept >= 1000:
            kept_at, kept = now, done
        assert pace.is_too_slow(now, done) == (now - kept_at > 30)


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("", ""),
        (("127.0.0.1", 5), ""),
        (("127.8.0.1", 5), ""),
        (("::1", 5, 0, 0), ""),
        (("::ffff:127.0.0.1", 5, 0, 0), ""),
        (("10.0.0.7", 5), "10.0.0.7"),
        (("::ffff:10.0.0.7", 5, 0, 0), "10.0.0.7"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
    ],
)
def test_programs_of_this_machine_share_no_bound(address: object, peer: str) -> None:
    assert peer_of(address) == peer


@pytest.mark.parametrize(("max_fds", "room"), [(65536, 1024), (1024, 768), (300, 150)])
def test_descriptors_are_left_for_others(max_fds: int, room: int) -> None:
    assert room_for(1024, max_fds=max_fds) == room
