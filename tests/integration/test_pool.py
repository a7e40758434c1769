"""Several models at once: each is served by its own worker, and none waits for another."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typing_extensions import override

from edge.config import Settings
from edge.errors import DoesNotFit
from edge.store.details import ModelDetails
from edge.store.models import ModelStore, PackageFile
from runtime import wire
from runtime.host import ModelHost
from runtime.pool import Pool
from runtime.request import SamplingParams
from runtime.tuning import tuning_path
from tests.support import DEFAULT_MODEL, SEED, chat_body, running_appliance, sse_events

SECOND = "second:x"


def two_models(home: Path) -> ModelStore:
    """A store with the default model under two names."""
    store = ModelStore(home / "store", seed=SEED)
    store.add(SECOND, [PackageFile(store.get(DEFAULT_MODEL).weights, "model.gguf")], ModelDetails())
    return store


@pytest.fixture
async def pool(home: Path) -> AsyncIterator[Pool]:
    pool = Pool(Settings(home=home, keep_alive_s=0.0, context_tokens=1024), two_models(home))
    yield pool
    await pool.close()


async def test_a_pinned_model_stays_and_an_idle_one_goes(pool: Pool, home: Path) -> None:
    first, second = await pool.ready(DEFAULT_MODEL), await pool.ready(SECOND)
    ModelStore(home / "store").pin(SECOND)
    await pool.unload_idle()
    assert (first.state, second.state) == ("unloaded", "ready")
    ModelStore(home / "store").pin(SECOND, is_pinned=False)
    await pool.unload_idle()
    assert second.state == "unloaded"


async def test_a_model_is_unused_since_its_last_answer_and_not_its_last_request(home: Path) -> None:
    pool = Pool(Settings(home=home, keep_alive_s=60.0, context_tokens=1024), two_models(home))
    try:
        host = await pool.ready(DEFAULT_MODEL)
        generation = await host.start(greeting, timeout_s=30, allowed_s=30)
        before = host.uses()
        host.last_used -= 3600  # the answer takes an hour
        uses = host.uses()
        assert uses < before / 2
        assert [p async for p in generation.steps()]
        await pool.unload_idle()
        assert host.state == "ready"
        assert abs(host.uses() - uses) < 0.01, "what it is worth goes on from there"
        host.last_used -= 3600
        await pool.unload_idle()
        assert host.state == "unloaded"
    finally:
        await pool.close()


def greeting(number: int) -> wire.Generate:
    return wire.Generate(number, None, "Hi", SamplingParams(temperature=0), 1, [])


async def test_what_was_asked_more_often_is_worth_more(pool: Pool) -> None:
    first, second = await pool.ready(DEFAULT_MODEL), await pool.ready(SECOND)
    assert first.worth() == second.worth() == 0
    for host, times in ((first, 3), (second, 1)):
        for _ in range(times):
            generation = await host.start(greeting, timeout_s=30, allowed_s=30)
            assert [p async for p in generation.steps()]
    assert first.uses() > second.uses() > 0


class CrowdedPool(Pool):
    """Where others are about to take all memory that there could be, whenever the second model is loaded."""

    @override
    def _reserved_bytes(self, *, but: str) -> int:
        return 1 << 50 if but == SECOND else 0


async def test_idle_models_give_way_only_where_that_helps(home: Path) -> None:
    pool = CrowdedPool(Settings(home=home, context_tokens=1024), two_models(home))
    try:
        first = await pool.ready(DEFAULT_MODEL)
        await first_heartbeat(first)
        with pytest.raises(DoesNotFit):
            await pool.ready(SECOND)
        second = await pool.host(SECOND)
        assert (first.state, second.state) == ("ready", "failed")
        assert not await pool.make_room(second, missing_bytes=first.memory_bytes + 1)
        assert first.state == "ready"
        assert await pool.make_room(second, missing_bytes=first.memory_bytes // 2)
        assert first.state == "unloaded"
        assert not await pool.make_room(second, missing_bytes=0)
    finally:
        await pool.close()


async def test_who_is_not_waited_for_never_makes_room_and_pauses_where_others_lack_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await pool.ready(DEFAULT_MODEL), await pool.host(SECOND)
    wait_ready = second.wait_ready

    async def lacks_a_byte(timeout_s: float, *, tenant: str = "") -> None:
        if first.state == "ready":
            raise DoesNotFit("It", required_bytes=2, available_bytes=1)
        await wait_ready(timeout_s, tenant=tenant)

    monkeypatch.setattr(second, "wait_ready", lacks_a_byte)
    with pytest.raises(DoesNotFit):
        await pool.ready(SECOND, may_make_room=False)
    assert (first.state, pool.is_crowded) == ("ready", False)
    generation = await first.start(greeting, timeout_s=30, allowed_s=30)
    with pytest.raises(DoesNotFit):
        await pool.ready(SECOND)
    assert pool.is_crowded, "the first is busy"
    assert [p async for p in generation.steps()]
    await pool.ready(SECOND)
    assert (first.state, second.state, pool.is_crowded) == ("unloaded", "ready", False)


async def test_unused_cells_are_reserved_as_soon_as_a_model_is_ready(pool: Pool) -> None:
    await pool.ready(DEFAULT_MODEL)
    assert pool._reserved_bytes(but=SECOND) > 20 << 20  # pyright: ignore[reportPrivateUsage]  # what a load is told
    await pool.forget(DEFAULT_MODEL)
    assert pool._reserved_bytes(but=SECOND) == 0  # pyright: ignore[reportPrivateUsage]  # as above


async def first_heartbeat(host: ModelHost) -> None:
    """Wait until it said what memory it takes."""
    async with asyncio.timeout(30):
        while host.heartbeat is None:
            await asyncio.sleep(0.01)


async def test_a_disk_that_does_not_answer_holds_nobody_else(pool: Pool, home: Path) -> None:
    """What a load reads is read on a thread: here a pipe that nobody has written to yet."""
    host = await pool.host(DEFAULT_MODEL)
    path = tuning_path(Settings(home=home).tuning_dir, str(host.model.digest))
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    held_up = threading.Event()

    def let_go() -> None:
        held_up.set()
        path.write_bytes(b"")

    rescue = threading.Timer(10, let_go)
    rescue.start()
    loading = asyncio.create_task(host.wait_ready(60))
    while not (is_read := has_reader(path)) and not held_up.is_set():
        await asyncio.sleep(0.01)
    rescue.cancel()
    await loading
    assert is_read


def has_reader(path: Path) -> bool:
    """Whether somebody reads a named pipe; who does reads its end."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_loads_and_unloads_of_one_model_do_not_hold_another(home: Path) -> None:
    two_models(home)
    with running_appliance(home, EDGE_CONTEXT_TOKENS="2048") as appliance, appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).raise_for_status()
        done = threading.Event()
        reasons: list[str | None] = []

        def stream() -> None:
            body = chat_body("Tell me everything.", max_tokens=60, ignore_eos=True, stream=True)
            with appliance.client() as own, own.stream("POST", "/v1/chat/completions", json=body) as r:
                reasons.extend(e["choices"][0]["finish_reason"] for e in sse_events(r.iter_lines()))
            done.set()

        streaming = threading.Thread(target=stream)
        streaming.start()
        num_swaps = 0
        while not done.is_set():
            http.post("/edge/v1/models/load", json={"model": SECOND}).raise_for_status()
            http.post("/edge/v1/models/unload", json={"model": SECOND}).raise_for_status()
            num_swaps += 1
        streaming.join()
        assert num_swaps > 0
        assert reasons[-1] == "length"
        infos = {m["ref"]: m for m in http.get("/edge/v1/models").json()["models"]}
        assert infos[DEFAULT_MODEL]["num_restarts"] == 0
