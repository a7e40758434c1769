"""Slots where memory is enough for one version only, where the power goes, and what keys may do with them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from edge.config import Settings
from edge.errors import ActivationFailed, DoesNotFit, EdgeError, InvalidRequest, SlotBusy, StoreError, WorkerDied
from edge.store.activation import CUT_OFF
from edge.store.digest import Digest
from edge.store.goldens import Goldens, GoldenText
from edge.store.models import ModelStore
from edge.store.slots import Slot
from runtime import wire
from runtime.activation import Activation
from runtime.host import ModelHost
from runtime.pool import Pool
from runtime.request import SamplingParams
from tests.integration.test_activation import BOMBS, CHAT, activate, put, slot
from tests.support import DEFAULT_MODEL, SEED, chat_body, run_edge, running_appliance, start_appliance, stop, wait_until

WRONG = Goldens(texts=[GoldenText(tokens=[1, 2, 3], logprobs=[0.0, 0.0])])
EMBEDDER = "minilm:l6-v2"


class Askers:
    """Ask the slot one after the other, as the API does: what an engine dropped is asked again."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.answered: list[Digest] = []
        self.failed: list[EdgeError] = []
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(3)]

    async def _ask(self) -> None:
        while True:
            try:
                self.answered.append(await self._answer())
            except EdgeError as e:
                self.failed.append(e)
            await asyncio.sleep(0.01)

    async def _answer(self) -> Digest:
        for attempts_left in (2, 1, 0):
            try:
                host = await self._pool.ready("chat")
                generation = await host.start(greeting, timeout_s=60, allowed_s=60)
                assert [p async for p in generation.steps()]
            except WorkerDied:
                if not attempts_left:
                    raise
            else:
                return host.model.digest
        raise AssertionError

    async def have_asked(self, digest: Digest) -> None:
        """Wait until two more were answered by that version."""
        before = self.answered.count(digest)
        async with asyncio.timeout(60):
            while self.answered.count(digest) < before + 2:
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def greeting(number: int) -> wire.Generate:
    return wire.Generate(number, None, "Hi", SamplingParams(temperature=0), 2, [])


@pytest.fixture
def store(home: Path) -> ModelStore:
    store = ModelStore(home / "store", seed=SEED)
    weights = store.get(DEFAULT_MODEL).weights
    put(store, "good:v2", weights)
    put(store, "wrong:x", weights, WRONG)
    return store


@pytest.fixture
async def pool(home: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    """One that has memory for one model."""
    pool = Pool(Settings(home=home, context_tokens=1024), store)
    wait_ready = ModelHost.wait_ready

    async def where_it_fits(self: ModelHost, timeout_s: float, *, tenant: str = "") -> None:
        if any(h is not self and h.pid is not None and h.state in ("ready", "loading") for h in pool.hosts()):
            raise DoesNotFit("It", required_bytes=2, available_bytes=1)
        await wait_ready(self, timeout_s, tenant=tenant)

    monkeypatch.setattr(ModelHost, "wait_ready", where_it_fits)
    yield pool
    await pool.close()


@pytest.fixture
async def activation(home: Path, store: ModelStore, pool: Pool) -> AsyncIterator[Activation]:
    activation = Activation(Settings(home=home), store, pool)
    await activation.start()
    await activation.activate("chat", DEFAULT_MODEL)
    yield activation
    await activation.close()


async def test_where_memory_is_enough_for_one_requests_wait_and_none_is_lost(
    activation: Activation, pool: Pool, store: ModelStore
) -> None:
    old, new = (store.get(name).digest for name in (DEFAULT_MODEL, "good:v2"))
    askers = Askers(pool)
    try:
        await askers.have_asked(old)
        with pytest.raises(ActivationFailed, match="its answers are wrong"):
            await activation.activate("chat", "wrong:x")
        await askers.have_asked(old)
        await activation.activate("chat", "good:v2")
        await askers.have_asked(new)
        await activation.roll_back("chat")
        await askers.have_asked(old)
        await activation.activate("chat", "good:v2")
        await askers.have_asked(new)
        pid = (await pool.host("chat")).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await askers.have_asked(old)
        await activation.activate("chat", "good:v2", trial_s=0)
        await askers.have_asked(new)
        await activation.roll_back("chat")
        await askers.have_asked(old)
    finally:
        await askers.end()
    assert askers.failed == []
    assert {*askers.answered} == {old, new}


@pytest.mark.parametrize("missing_bytes", [1 << 50, 1])
async def test_what_does_not_fit_leaves_the_old_one_serving(
    activation: Activation, pool: Pool, store: ModelStore, monkeypatch: pytest.MonkeyPatch, missing_bytes: int
) -> None:
    """Far too big, it is refused as it is; a little too big, the old one makes room in vain and is loaded again."""
    wait_ready, new = ModelHost.wait_ready, store.get("good:v2").digest

    async def too_big(self: ModelHost, timeout_s: float, *, tenant: str = "") -> None:
        if self.model.digest == new:
            raise DoesNotFit("It", required_bytes=missing_bytes, available_bytes=0)
        await wait_ready(self, timeout_s, tenant=tenant)

    monkeypatch.setattr(ModelHost, "wait_ready", too_big)
    old = await pool.host("chat")
    pid, askers = old.pid, Askers(pool)
    try:
        await askers.have_asked(old.model.digest)
        with pytest.raises(ActivationFailed, match="MiB of memory"):
            await activation.activate("chat", "good:v2")
        await askers.have_asked(old.model.digest)
    finally:
        await askers.end()
    assert askers.failed == []
    assert (old.pid == pid) == (missing_bytes > 1)


async def test_what_is_busy_makes_no_room(activation: Activation, pool: Pool, home: Path) -> None:
    activation = Activation(Settings(home=home, drain_timeout_s=0.1), ModelStore(home / "store"), pool)
    await activation.start()
    host = await pool.ready("chat")
    generation = await host.start(
        lambda i: wire.Generate(i, None, "Hi", SamplingParams(temperature=0), 500, [], ignore_eos=True),
        timeout_s=60, allowed_s=60,
    )  # fmt: skip
    with pytest.raises(ActivationFailed, match="still answered"):
        await activation.activate("chat", "good:v2")
    generation.cancel()
    assert (await pool.ready("chat")) is host
    await activation.close()


async def test_a_slot_whose_version_is_gone_takes_a_new_one(home: Path, store: ModelStore) -> None:
    pool = Pool(Settings(home=home, context_tokens=1024), store)
    old, new = store.get(DEFAULT_MODEL).digest, store.get("good:v2").digest
    store.write_slots(lambda _: {"chat": Slot(current=old, names={old: "gone:x"})})
    store.blobs.path(old).unlink()
    activation = Activation(Settings(home=home), store, pool)
    try:
        await activation.start()
        with pytest.raises(StoreError):
            await pool.ready("chat")
        await activation.activate("chat", "good:v2")
        assert (await pool.ready("chat")).model.digest == new
        store.remove("good:v2")
        await pool.forget("good:v2")
        assert (await pool.ready("chat")).model.digest == new, "the slot still has it"
    finally:
        await activation.close()
        await pool.close()


async def test_a_slot_takes_one_kind_and_one_change_at_a_time(activation: Activation) -> None:
    with pytest.raises(InvalidRequest, match="is for embeddings"):
        await activation.activate("chat", EMBEDDER)
    with pytest.raises(InvalidRequest, match="no version before"):
        await activation.roll_back("chat")
    results = await asyncio.gather(
        activation.activate("chat", "good:v2"), activation.activate("chat", "good:v2"), return_exceptions=True
    )
    assert {type(r) for r in results} == {type(None), SlotBusy}


def test_what_ends_the_appliance_is_not_tried_again_and_what_was_stopped_in_order_is(home: Path) -> None:
    store = ModelStore(home / "store", seed=SEED)
    weights = store.get(DEFAULT_MODEL).weights
    put(store, "sick:load-hang", weights)
    put(store, "good:v2", weights)
    env = {"PYTHONPATH": BOMBS, "EDGE_CONTEXT_TOKENS": "1024"}
    with running_appliance(home, **env) as appliance, appliance.client() as http:
        activate(http, DEFAULT_MODEL).raise_for_status()

        def hang() -> None:
            with suppress(httpx.TransportError), appliance.client() as own:
                activate(own, "sick:load-hang")

        threading.Thread(target=hang, daemon=True).start()
        wait_until(lambda: store.slots()["chat"].trial is not None, what="the attempt to be counted")
        appliance.process.kill()
        appliance.process.wait()
    appliance = start_appliance(home, env=env)
    try:
        with appliance.client() as http:
            found = slot(http)
            assert (found["state"], found["serves"]) == ("serving", DEFAULT_MODEL)
            assert (found["last"]["ref"], found["last"]["reason"]) == ("sick:load-hang", CUT_OFF)
            assert http.post(CHAT, json=chat_body("Hi", model="chat", max_tokens=1)).json()["model"] == DEFAULT_MODEL
            activate(http, "good:v2").raise_for_status()
        assert stop(appliance.process) == 0
        trial = store.slots()["chat"].trial
        assert trial is not None
        assert trial.served_s > 0
        appliance = start_appliance(home, env=env)
        with appliance.client() as http:
            wait_until(lambda: slot(http)["serves"] == "good:v2", what="the trial to go on")
            assert slot(http)["served_s"] > trial.served_s
            shown = run_edge("slots", home=home)
            assert shown.returncode == 0, shown.stderr
            assert "good:v2" in shown.stdout
            assert "trial" in shown.stdout
            back = run_edge("rollback", "--url", appliance.url, home=home)
            assert back.stdout == f"{DEFAULT_MODEL} serves as 'chat'\n"
            again = run_edge("activate", "good:v2", "--trial", "0", "--url", appliance.url, home=home)
            assert again.stdout == "good:v2 serves as 'chat'\n", again.stderr
            assert run_edge("rollback", "nowhere", "--url", appliance.url, home=home).returncode == 1
            assert run_edge("slots", "--remove", "chat", "--url", appliance.url, home=home).returncode == 0
            assert http.post(CHAT, json=chat_body("Hi", model="chat", max_tokens=1)).status_code == 404
    finally:
        stop(appliance.process)
