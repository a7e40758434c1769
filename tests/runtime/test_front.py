"""The end of the appliance, where something in it fails."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from edge.config import Settings
from edge.store.models import ModelStore
from runtime.front import answer
from runtime.logs import RecentLines
from runtime.pool import Pool


def failing(*_: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarDeprecationWarning")
def test_the_appliance_ends_also_where_a_part_of_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Pool, "drain", failing)
    ended: list[str] = []

    async def close(_: Pool) -> None:
        ended.append("pool")

    monkeypatch.setattr(Pool, "close", close)

    async def live() -> None:
        settings, store = Settings(home=tmp_path), ModelStore(tmp_path / "store")
        async with asyncio.timeout(20):
            await answer(
                settings, store, Pool(settings, store), RecentLines(), [], None,
                lambda: signal.raise_signal(signal.SIGTERM),
            )  # fmt: skip

    asyncio.run(live())
    assert ended[:1] == ["pool"]
    assert "out of luck" in caplog.text
