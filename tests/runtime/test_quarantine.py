"""Who is suspected, who is convicted, and that company is no guilt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import InvalidReference, RequestPoisoned
from runtime import poison, wire
from runtime.blackbox import BlackBox
from runtime.poison import PoisonCabinet, case_of
from runtime.quarantine import WINDOW_S, Fingerprint, Quarantine, fingerprint
from runtime.request import SamplingParams


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def generate(text: str = "hi", *, id: int = 1, seed: int | None = None) -> wire.Generate:
    return wire.Generate(id, None, text, SamplingParams(seed=seed), 8, [])


def test_a_fingerprint_is_of_all_but_the_id() -> None:
    same = fingerprint(generate(id=1), engine="sha256:a")
    assert fingerprint(generate(id=2), engine="sha256:a") == same
    others = [
        fingerprint(generate("ho"), engine="sha256:a"),
        fingerprint(generate(seed=1), engine="sha256:a"),
        fingerprint(generate(), engine="sha256:b"),
    ]
    assert len({same, *others}) == 4


def test_what_renders_the_same_prompt_is_the_same() -> None:
    asked = [generate(id=i) for i in (1, 2)]
    first, second = (wire.Render(a.id, msgspec.structs.replace(a, tenant=str(a.id))) for a in asked)
    assert fingerprint(first, engine="a") == fingerprint(second, engine="a") != fingerprint(asked[0], engine="a")


def test_two_deaths_alone_convict() -> None:
    quarantine = Quarantine()
    bomb = Fingerprint("bomb")
    assert quarantine.blame({bomb: 0}, reason="signal 6") is None
    convicted = quarantine.blame({bomb: 3}, reason="signal 11")
    assert convicted is not None
    assert convicted.reasons == ("signal 6", "signal 11")


def test_suspicion_fades() -> None:
    clock = Clock()
    quarantine = Quarantine(clock=clock)
    bomb = Fingerprint("bomb")
    quarantine.blame({bomb: 0}, reason="signal 6")
    clock.now += WINDOW_S + 1
    assert quarantine.suspect(bomb) is None
    assert quarantine.blame({bomb: 0}, reason="signal 6") is None


@given(st.integers(2, 40), st.data())
def test_one_bomb_in_a_crowd_is_found_at_the_second_death(num: int, data: st.DataObject) -> None:
    """As the host goes about it: every suspect alone, in any order, until it is past its point."""
    bomb = Fingerprint(str(data.draw(st.integers(0, num - 1))))
    crowd = {Fingerprint(str(i)): data.draw(st.integers(0, 50)) for i in range(num)}
    quarantine = Quarantine()
    assert quarantine.blame(crowd, reason="signal 6") is None
    for who in data.draw(st.permutations(sorted(crowd))):
        suspect = quarantine.suspect(who)
        assert suspect is not None
        if who == bomb:
            assert quarantine.blame({who: crowd[who]}, reason="signal 6") is not None
        else:
            assert suspect.alone_until > crowd[who]
            quarantine.clear(who)
    assert quarantine.is_empty


@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=2), max_size=20))
def test_company_is_never_guilt(deaths: list[set[str]]) -> None:
    quarantine = Quarantine()
    for step in deaths:
        assert quarantine.blame({Fingerprint(who): 0 for who in step}, reason="signal 6") is None


@pytest.fixture
def box() -> Iterator[BlackBox]:
    box = BlackBox.create()
    yield box
    box.close()


def test_a_black_box_tells_what_was_under_way(box: BlackBox) -> None:
    assert box.read().ids == frozenset()
    box.begin_step([3, 1 << 40], 17)
    box.begin_text(9)
    seen = box.read()
    assert (seen.ids, seen.step_tokens, seen.text_id) == (frozenset({3, 1 << 40, 9}), 17, 9)
    box.end_text()
    assert box.read().ids == {3, 1 << 40}
    box.idle()
    assert box.read().ids == frozenset()


def test_a_black_box_measures_steps_by_their_width(box: BlackBox) -> None:
    clock = Clock()
    slow = BlackBox(BlackBox.create().fd, clock=clock)
    slow.begin_step([1], 10)
    clock.now += 5.0
    slow.begin_step([1], 1)
    assert abs(slow.read().slowest_token_s - 0.5) < 1e-9
    clock.now += 0.01
    slow.begin_step([1], 1)
    assert 0.4 < slow.read().slowest_token_s < 0.5
    slow.close()


def test_more_requests_than_a_black_box_names(box: BlackBox) -> None:
    box.begin_step(list(range(1000)), 1000)
    assert box.read().ids == frozenset(range(256))


def keep(cabinet: PoisonCabinet, text: str) -> str:
    message = generate(text)
    who = fingerprint(message, engine="sha256:a")
    cabinet.keep(case_of(who, message, model="m:x", digest="sha256:a", reasons=["signal 6"], time=1.0))
    return who


def test_a_kept_request_is_refused_after_a_restart_until_it_is_removed(tmp_path: Path) -> None:
    who = keep(PoisonCabinet(tmp_path / "poison"), "boom")
    cabinet = PoisonCabinet(tmp_path / "poison")
    with pytest.raises(RequestPoisoned, match=who):
        cabinet.check(who)
    case = cabinet.get(who)
    assert case.request(7) == generate("boom", id=7)
    assert oct((tmp_path / "poison" / f"{who}.msgpack").stat().st_mode)[-3:] == "600"
    PoisonCabinet(tmp_path / "poison").remove(who)
    cabinet.check(who)
    assert cabinet.num_refused == 0


def test_the_cabinet_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "MAX_CASES", 5)
    monkeypatch.setattr(poison, "MAX_CASES_BYTES", 4000)
    cabinet = PoisonCabinet(tmp_path)
    for i in range(9):
        keep(cabinet, str(i))
    assert len(cabinet.cases()) == 5
    last = keep(cabinet, "x" * 5000)
    assert [c.id for c in cabinet.cases()] == [last]


def test_a_disk_that_takes_nothing_does_not_let_it_pass(tmp_path: Path) -> None:
    (tmp_path / "poison").write_text("a file")
    cabinet = PoisonCabinet(tmp_path / "poison")
    who = keep(cabinet, "boom")
    with pytest.raises(RequestPoisoned):
        cabinet.check(who)


@pytest.mark.parametrize("name", ["../../etc/passwd", "0f4c", "0F4C2A9D6B1E8375", "0f4c2a9d6b1e8375"])
def test_ids_that_name_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidReference):
        PoisonCabinet(tmp_path).get(name)


def test_a_damaged_case_is_passed_over(tmp_path: Path) -> None:
    cabinet = PoisonCabinet(tmp_path)
    kept = keep(cabinet, "boom")
    (tmp_path / "0f4c2a9d6b1e8375.msgpack").write_bytes(b"\xff")
    assert [c.id for c in cabinet.cases()] == [kept]
