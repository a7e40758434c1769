"""Batches that are worked through while the disk fails, is full, or they are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from edge.config import Settings
from edge.errors import DiskFull, StoreError
from runtime.api.batches import runner
from runtime.api.batches.answers import Answer
from runtime.api.batches.gate import Gate
from runtime.api.batches.inside import Reply
from runtime.api.batches.ledger import Ledger
from runtime.api.batches.schema import Batch
from runtime.api.batches.store import StoreThread
from runtime.api.batches.uploads import Upload
from runtime.api.threads import Stopped

CHAT = "/v1/chat/completions"


class Work:
    """A runner, its store, and a model that answers at once."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.store = settings, StoreThread(settings)
        self.runner = runner.Runner(settings, self.store, Gate(lambda own: own < 4), self._ask)
        self.num_asked = 0
        self.answer = b"{}"

    async def _ask(self, key: str, path: str, body: bytes) -> Reply:
        self.num_asked += 1
        return Reply(200, self.answer)

    async def begin(self, num_lines: int) -> None:
        """Begin `batch_1`."""
        await self.store.run(lambda s: s.files.check_room("k", 0))
        upload = Upload(self.settings.files_dir, limit_bytes=1 << 20)
        for i in range(num_lines):
            line: dict[str, object] = {"custom_id": str(i), "method": "POST", "url": CHAT, "body": {}}
            upload.write(msgspec.json.encode(line) + b"\n")
        upload.keep()
        file = await self.store.run(lambda s: s.files.add("k", upload, name="f", now_s=0.0, expires_s=None))
        batch = Batch(id="batch_1", endpoint=CHAT, input_file_id=file.id, created_at=0, expires_at=86_400)
        await self.store.run(lambda s: s.create_batch("k", batch))
        self.runner.add("batch_1", "k")

    async def batch(self) -> Batch:
        """As it is."""
        return await self.store.run(lambda s: s.batches.find("batch_1"))

    async def until(self, reached: Callable[[Batch], bool]) -> Batch:
        """The batch when it is as wanted."""
        async with asyncio.timeout(20):
            while not reached(batch := await self.batch()):
                await asyncio.sleep(0.01)
        return batch


@pytest.fixture
async def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Work]:
    monkeypatch.setattr(runner, "RETRY_S", 0.01)
    made = Work(Settings(home=tmp_path, max_file_bytes=4096))
    yield made
    await made.runner.close()
    await made.store.close()


async def test_an_answer_that_the_disk_refuses_is_not_computed_again(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, num_refused = Ledger.record, 0

    def refusing(self: Ledger, batch_id: str, answer: Answer) -> None:
        nonlocal num_refused
        if num_refused < 5:
            num_refused += 1
            raise StoreError("Input/output error")
        record(self, batch_id, answer)

    monkeypatch.setattr(Ledger, "record", refusing)
    await work.begin(3)
    batch = await work.until(lambda b: b.is_over)
    assert (batch.status, batch.request_counts.completed, work.num_asked, num_refused) == ("completed", 3, 3, 5)


async def test_a_batch_whose_key_has_no_more_room_ends_with_what_it_has(work: Work) -> None:
    work.answer = msgspec.json.encode("x" * 9000)
    await work.begin(8)
    batch = await work.until(lambda b: b.is_over)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data] == ["storage_full"]
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 5)
    output, errors = batch.output_file_id, batch.error_file_id
    assert output is not None
    assert errors is not None
    assert len((work.settings.files_dir / output).read_bytes().splitlines()) == 3
    assert (work.settings.files_dir / errors).read_bytes().count(b"storage_full") == 5


async def test_a_batch_that_cannot_be_written_out_can_be_cancelled(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tries = 0

    def full(*_: object, **__: object) -> None:
        nonlocal num_tries
        num_tries += 1
        raise DiskFull(required_bytes=2, available_bytes=1)

    monkeypatch.setattr(runner, "write_outputs", full)
    await work.begin(2)
    await work.until(lambda b: b.status == "finalizing" and num_tries > 1)
    cancelled = await work.store.run(lambda s: s.batches.cancel("k", "batch_1", now_s=0.0))
    assert cancelled.status == "cancelling"
    work.runner.stop("batch_1")
    batch = await work.until(lambda b: b.is_over)
    assert batch.errors is not None
    assert (batch.status, [e.code for e in batch.errors.data]) == ("failed", ["disk_full"])
    await work.store.run(lambda s: s.files.check_room("k", 4096))


async def test_a_batch_that_cannot_be_written_out_ends_some_time(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(runner, "write_outputs", broken)
    monkeypatch.setattr(runner, "GRACE_S", -90_000.0)
    await work.begin(2)
    batch = await work.until(lambda b: b.is_over)
    assert batch.errors is not None
    assert (batch.status, [e.code for e in batch.errors.data]) == ("failed", ["storage_failed"])


async def test_files_are_read_and_written_on_a_thread_of_their_own(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes, asyncio's threads are others', and nobody waits for it at the end."""
    is_writing, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: object, **__: object) -> None:
        loop.call_soon_threadsafe(is_writing.set)
        go_on.wait(20)
        raise Stopped

    monkeypatch.setattr(runner, "write_outputs", slow)
    loop.set_default_executor(ThreadPoolExecutor(1))
    await work.begin(2)
    try:
        async with asyncio.timeout(10):
            await is_writing.wait()
            await asyncio.to_thread(bool)
            await work.runner.close()
    finally:
        go_on.set()
