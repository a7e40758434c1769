"""What kept responses bring to a request: bounded by what a request could bring itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from edge.access.quota import TokenDay
from edge.errors import InvalidRequest, RateLimited, ResponseNotFound
from edge.responses import ResponseStore
from runtime.api import responses_kept
from runtime.api.access import Caller, Meter
from runtime.api.responses_items import item_id, named
from runtime.api.responses_kept import Kept
from runtime.api.responses_schema import Item
from tests.runtime.test_responses import response

MAX_BYTES = 100_000
NOBODY = Caller(None, "unix")


@pytest.fixture
def store(tmp_path: Path) -> Generator[ResponseStore]:
    with closing(ResponseStore(tmp_path / "responses.db", limit_bytes=1 << 20)) as store:
        yield store


@pytest.fixture
def kept(store: ResponseStore) -> Kept:
    return Kept(store, Meter(NOBODY), MAX_BYTES)


async def said(kept: Kept, number: int, *texts: str, previous: str | None = None) -> str:
    """A response is kept; its id."""
    made = response()
    made.id, made.previous_response_id = f"resp_{number:032x}", previous
    assert await kept.keep(made, named([Item(role="user", content=t) for t in texts], made.id)) is None
    return made.id


def references(response_id: str, numbers: Sequence[int]) -> list[Item]:
    return [Item(id=item_id(response_id, "message", n, is_input=True)) for n in numbers]


async def test_an_item_counts_as_often_as_it_is_named(kept: Kept) -> None:
    made = await said(kept, 1, "x" * 30_000, "y")
    assert len(await kept.resolved(references(made, [0, 0, 0, 1]))) == 4
    with pytest.raises(InvalidRequest, match="more than 32 responses or 100,000 bytes"):
        await kept.resolved(references(made, [0, 0, 0, 0]))
    with pytest.raises(InvalidRequest, match="more than"):
        await kept.resolved(references(made, [1] * 5000))


async def test_what_is_gone_on_from_is_held_of_the_day_as_if_it_were_sent(store: ResponseStore) -> None:
    def asking(day: TokenDay) -> Kept:
        return Kept(store, Meter(NOBODY, day=day), MAX_BYTES)

    first = await said(asking(TokenDay(1, now_s=0.0)), 1, "x" * 30_000)
    last = await said(asking(TokenDay(1, now_s=0.0)), 2, "y", previous=first)
    asks: list[Callable[[Kept], Awaitable[list[Item]]]] = [
        lambda kept: kept.conversation(last, with_answer=True),
        lambda kept: kept.resolved(references(first, [0])),
        lambda kept: kept.resolved(references(last, [0] * 200)),
    ]
    for ask in asks:
        day = TokenDay(18_000, now_s=0.0)
        await ask(asking(day))
        await ask(asking(day))
        with pytest.raises(RateLimited):
            await ask(asking(day))


class HeldClock:
    """One that a store waits for: its disk is slow."""

    def __init__(self) -> None:
        self.is_going = Event()
        self.is_going.set()

    def __call__(self) -> float:
        self.is_going.wait(20)
        return 0.0


async def test_what_comes_to_the_disk_too_late_does_not_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HeldClock()
    with closing(ResponseStore(tmp_path / "responses.db", limit_bytes=1 << 20, clock=clock)) as store:
        kept = Kept(store, Meter(NOBODY), MAX_BYTES)
        before = await said(kept, 1, "x")
        clock.is_going.clear()
        monkeypatch.setattr(responses_kept, "KEEP_S", 0.2)
        made = response()
        problem = await kept.keep(made, [])
        clock.is_going.set()
        assert problem is not None
        assert "did not take it" in problem
        with pytest.raises(ResponseNotFound):
            await kept.get(made.id)
        assert (await kept.get(before)).id == before
