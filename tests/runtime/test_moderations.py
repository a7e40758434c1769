"""A classifier that hangs, and those who ask it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge.errors import ClassifierBusy, ModerationUnavailable
from runtime.api import moderations
from runtime.api.moderations import MAX_AT_ONCE, MAX_HELD, Moderator
from runtime.moderation import Judgement


class Hanging:
    """Judges when it is let go."""

    name = "hanging"

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def judge(self, texts: Sequence[str]) -> Sequence[Judgement]:
        """In its own time."""
        self.go_on.wait(20)
        return [Judgement({"violence": 0.5}) for _ in texts]


def find(classifier: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this one be installed."""

    def load(name: str) -> Hanging:
        return classifier

    monkeypatch.setattr(moderations, "load_classifier", load)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging()
    find(made, monkeypatch)
    yield made
    made.go_on.set()


async def test_a_classifier_that_hangs_holds_up_its_own_callers_only(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderator = Moderator("hanging")
    await moderator.classifier()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    asked = [asyncio.create_task(moderator.judge(["x"])) for _ in range(MAX_HELD)]
    async with asyncio.timeout(10):
        while sum(t.name.startswith("moderation_") for t in threading.enumerate()) < MAX_AT_ONCE:
            await asyncio.sleep(0)
        with pytest.raises(ClassifierBusy):
            await moderator.judge(["one too many"])
        await asyncio.to_thread(bool)
        hanging.go_on.set()
        assert [len(j) for j in await asyncio.gather(*asked)] == [1] * MAX_HELD
        assert len(await moderator.judge(["x", "y"])) == 2


async def test_who_waits_too_long_is_told_to_come_back(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    moderator = Moderator("hanging")
    await moderator.classifier()
    monkeypatch.setattr(moderations, "JUDGE_S", 0.01)
    with pytest.raises(ClassifierBusy) as caught:
        await moderator.judge(["x"])
    assert caught.value.retry_after_s > 0


async def test_a_classifier_that_is_not_there_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moderator = Moderator("")
    for _ in range(2):
        with pytest.raises(ModerationUnavailable):
            await moderator.classifier()
    find(Hanging(), monkeypatch)
    assert (await moderator.classifier()).name == "hanging"
