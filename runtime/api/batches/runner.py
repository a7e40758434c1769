"""Works through batches: validated, answered line by line, written out. What was done is on the disk, so that each
line is answered once whatever ends in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from functools import partial

from edge.config import Settings
from edge.errors import KeyNotFound, StorageFull, StoreError
from edge.store.digest import digest_file
from runtime.api.threads import BackgroundThreads, until_stopped

from .answers import Answer, answer_of, wait_before_retry_s
from .gate import Gate, lines_at_once
from .inside import Reply
from .lines import LINE_EXTRA_BYTES, Line, check_lines, raw_lines, unanswered
from .outputs import Ending, finish, write_outputs
from .schema import Batch, BatchError, BatchStatus
from .store import StoreThread

log = logging.getLogger("edge.batches")

RETRY_S, MAX_RETRY_S = 10.0, 600.0
"""Until a batch goes on whose disk or database failed; twice as long each time."""
GRACE_S = 3600.0
"""How long after its end a batch is tried to be written out, before it fails without its answers."""
CANCELLED_TRIES = 3
"""The same for one that was cancelled."""
Ask = Callable[[str, str, bytes], Awaitable[Reply]]
"""Sends a body to a path as the key of this id."""
_ENDINGS: dict[BatchStatus, Ending] = {"finalizing": "completed", "cancelling": "cancelled", "in_progress": "expired"}


@dataclass(slots=True)
class _Job:
    id: str
    key: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    num_failures: int = 0


class Runner:
    """Owned by the event loop. A key's batches are answered one after the other; those of several take turns.

    Args:
        ask: Raises `KeyNotFound` where the key does not hold any more.
    """

    def __init__(self, settings: Settings, store: StoreThread, gate: Gate, ask: Ask) -> None:
        self._settings, self._store, self._gate, self._ask = settings, store, gate, ask
        self._max_line_bytes = settings.max_body_bytes + LINE_EXTRA_BYTES
        self._is_closed = False
        self._thread = BackgroundThreads(1, name="batch-files")
        self._stop = threading.Event()
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._checking = asyncio.Lock()

    def add(self, batch_id: str, key: str) -> None:
        """Begin with a batch, or go on with it where it is. One that is known or comes too late is left alone."""
        if batch_id in self._jobs or self._is_closed:
            return
        job = self._jobs[batch_id] = _Job(batch_id, key)
        task = asyncio.create_task(self._supervise(job), name=f"batch {batch_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self, batch_id: str) -> None:
        """Have a batch see that it is being cancelled: what is under way of it is given up."""
        if (job := self._jobs.get(batch_id)) is not None:
            job.stop.set()

    async def close(self) -> None:
        """Let go of everything; it goes on at the next start."""
        self._is_closed = True
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.close()

    async def _supervise(self, job: _Job) -> None:
        try:
            for wait_s in _waits_s():
                if await self._worked_through(job):
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await job.stop.wait()
                job.stop.clear()  # its status says so too
        finally:
            self._jobs.pop(job.id, None)

    async def _worked_through(self, job: _Job) -> bool:
        """Whether the batch is over; if not, it is worth another try."""
        try:
            await self._work(job)
        except FileNotFoundError:
            return await self._failed(job, BatchError(code="file_damaged", message="The file of this batch is gone."))
        except (StoreError, OSError) as e:
            log.error("batch %s waits: %s", job.id, e)
            return await self._gave_up(job, e)
        except KeyNotFound:
            return await self._failed(job, BatchError(code="key_revoked", message="The key of this batch was revoked."))
        except Exception:  # the supervisor of a task: the batch fails, the appliance goes on
            log.exception("batch %s failed", job.id)
            return await self._failed(
                job, BatchError(code="internal_error", message="The appliance failed; see its log.")
            )
        return True

    async def _gave_up(self, job: _Job, why: StoreError | OSError) -> bool:
        """Whether a batch ends without its answers: it was cancelled, or its time was over long ago."""
        job.num_failures += 1
        try:
            batch = await self._store.run(lambda s: s.batches.find(job.id))
            left_s = await self._store.run(lambda s: s.batches.left_s(job.id))
        except StoreError:
            return False
        if left_s > -GRACE_S and (batch.status != "cancelling" or job.num_failures < CANCELLED_TRIES):
            return False
        code = why.code if isinstance(why, StoreError) else "storage_failed"
        return await self._failed(job, BatchError(code=code, message=f"The answers could not be written out: {why}"))

    async def _failed(self, job: _Job, *errors: BatchError) -> bool:
        try:
            await self._store.run(lambda s: s.batches.fail(job.id, errors, now_s=time.time()))
        except StoreError as e:
            log.error("batch %s waits: %s", job.id, e)
            return False
        return True

    async def _work(self, job: _Job) -> None:
        batch = await self._store.run(lambda s: s.batches.find(job.id))
        if batch.status == "validating":
            batch = await self._validated(job, batch)
        if batch.status == "in_progress":
            batch = await self._answered(job, batch)
        if not batch.is_over:
            await self._write_out(job, batch)

    async def _validated(self, job: _Job, batch: Batch) -> Batch:
        digest = await self._store.run(lambda s: s.files.digest(batch.input_file_id))
        async with self._checking:
            total, errors = await self._thread.run(lambda: self._check(batch, digest))
        if errors:
            await self._store.run(lambda s: s.batches.fail(job.id, errors, now_s=time.time()))
            return await self._store.run(lambda s: s.batches.find(job.id))
        return await self._moved(job, "in_progress", since="validating", total=total)

    def _check(self, batch: Batch, digest: str) -> tuple[int, list[BatchError]]:
        path = self._settings.files_dir / batch.input_file_id
        if digest_file(path) != digest:
            return 0, [BatchError(code="file_damaged", message="The file is not as it was sent. Send it again.")]
        with path.open("rb") as file:
            lines = raw_lines(file, max_bytes=self._max_line_bytes)
            return check_lines(until_stopped(lines, self._stop), batch.endpoint)

    async def _moved(self, job: _Job, to: BatchStatus, *, since: BatchStatus, total: int | None = None) -> Batch:
        return await self._store.run(
            lambda s: s.batches.move(job.id, to, since=(since,), now_s=time.time(), total=total)
        )

    async def _answered(self, job: _Job, batch: Batch) -> Batch:
        """The batch when all its lines are answered, it is cancelled, or its time is over."""
        left_s = max(0.0, await self._store.run(lambda s: s.batches.left_s(job.id)))
        work, stopped = asyncio.create_task(self._answer_all(job, batch)), asyncio.create_task(job.stop.wait())
        try:
            await asyncio.wait({work, stopped}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return await self._store.run(lambda s: s.batches.find(job.id))
            work.result()
        except StorageFull as e:
            error = BatchError(code=e.code, message=f"The answers have no room: {e}")
            return await self._store.run(lambda s: s.batches.give_up(job.id, error, now_s=time.time()))
        finally:
            work.cancel()
            stopped.cancel()
            await asyncio.wait({work, stopped})
        return await self._moved(job, "finalizing", since="in_progress")

    async def _answer_all(self, job: _Job, batch: Batch) -> None:
        async with self._turns[job.key]:
            answered = await self._store.run(lambda s: s.batches.answered(job.id))
            path = self._settings.files_dir / batch.input_file_id
            asked = unanswered(path, batch.endpoint, answered, max_bytes=self._max_line_bytes)
            lines = _Lines(asked, self._thread)
            num = lines_at_once(self._settings.max_sequences)
            tasks = [asyncio.create_task(self._answer_some(job, batch, lines)) for _ in range(num)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_some(self, job: _Job, batch: Batch, lines: _Lines) -> None:
        while (line := await lines.next()) is not None:
            answer = await self._answer(job, batch, line)
            await self._record(job, answer)

    async def _record(self, job: _Job, answer: Answer) -> None:
        """Keep an answer, whenever the disk takes it: it was computed and counted, and need not be again.

        Raises:
            StorageFull: The key has no room for it.
        """
        for wait_s in _waits_s():
            try:
                await self._store.run(lambda s: s.batches.record(job.id, answer))
            except StoreError as e:
                log.error("batch %s waits: %s", job.id, e)
                await asyncio.sleep(wait_s)
            else:
                break

    async def _answer(self, job: _Job, batch: Batch, line: Line) -> Answer:
        for num_tries in itertools.count(1):
            async with self._gate.passed():
                reply = await self._ask(job.key, batch.endpoint, line.body)
            wait_s = wait_before_retry_s(reply, num_tries=num_tries)
            if wait_s is None:
                return answer_of(line, reply)
            await asyncio.sleep(wait_s)
        raise AssertionError("counting has no end")

    async def _write_out(self, job: _Job, batch: Batch) -> None:
        ending = "failed" if batch.errors is not None else _ENDINGS[batch.status]
        # After this no answer is on its way to the disk any more: they went the same way, before it.
        answered = await self._store.run(lambda s: s.batches.answered(job.id))
        write = partial(write_outputs, max_line_bytes=self._max_line_bytes, stop=self._stop)
        outputs = await self._thread.run(lambda: write(self._settings, batch, ending, answered))
        try:
            await self._store.run(lambda s: finish(s, batch, job.key, outputs, ending, now_s=time.time()))
        except StoreError:
            await self._thread.run(outputs.discard)
            raise


def _waits_s() -> Generator[float]:
    wait_s = RETRY_S
    while True:
        yield wait_s
        wait_s = min(MAX_RETRY_S, 2 * wait_s)


class _Lines:
    """Lines that several take from, read on a thread."""

    def __init__(self, lines: Generator[Line], thread: BackgroundThreads) -> None:
        self._lines, self._thread = lines, thread
        self._reading = asyncio.Lock()

    async def next(self) -> Line | None:
        """The next; None after the last."""
        async with self._reading:
            return await self._thread.run(lambda: next(self._lines, None))
