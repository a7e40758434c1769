"""Long work that the appliance does for somebody: kept in memory, watched by anyone, cancelled by anyone."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from edge.errors import EdgeError, JobNotFound, QueueFull
from runtime.api.schema import Job

log = logging.getLogger("edge.jobs")

MAX_JOBS = 200
MAX_AT_ONCE = 2
MAX_UNFINISHED = 16
_RATE_WINDOW_S = 3.0


class JobControl:
    """What the work itself sees: where to report, and whether to stop. Used on the work's thread."""

    def __init__(self, job: Job, changed: Callable[[], object]) -> None:
        self._job = job
        self._changed = changed
        self._stop = threading.Event()
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def report(self, done_bytes: int, total_bytes: int | None, message: str) -> None:
        """Say how far the work is."""
        now = time.monotonic()
        self._seen.append((now, done_bytes))
        while now - self._seen[0][0] > _RATE_WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        (then, before), job = self._seen[0], self._job
        job.rate_bytes_s = max(0.0, (done_bytes - before) / (now - then)) if now > then else 0.0
        job.done_bytes, job.total_bytes, job.message = done_bytes, total_bytes, message
        self._changed()

    def is_cancelled(self) -> bool:
        """Whether somebody wants it to stop."""
        return self._stop.is_set()

    def cancel(self) -> None:
        """Ask the work to stop."""
        self._stop.set()


class Jobs:
    """The jobs of this process. Owned by the event loop; the work runs on threads.

    Args:
        changed: Called on the event loop whenever a job changed.
    """

    def __init__(self, changed: Callable[[Job], None]) -> None:
        self._changed = changed
        self._jobs: dict[str, Job] = {}
        self._controls: dict[str, JobControl] = {}
        self._errors: dict[str, EdgeError] = {}
        self._owners: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Threads of their own: a pull that waits for a dead server must not hold what the API runs on.
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="job")

    def list(self, owner: str | None = None) -> list[Job]:
        """Every job, or those of one owner; the newest first."""
        jobs = (j for j in self._jobs.values() if owner is None or self._owners[j.id] == owner)
        return sorted(jobs, key=lambda j: j.created, reverse=True)

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """One job.

        Raises:
            JobNotFound: It is unknown, another's than `owner`'s, or so old that it was forgotten.
        """
        if job_id not in self._jobs or owner not in (None, self._owners[job_id]):
            raise JobNotFound(f"There is no job '{job_id}'.", hint="GET /edge/v1/jobs lists them.")
        return self._jobs[job_id]

    def error(self, job_id: str) -> EdgeError | None:
        """What ended a job before its end, if something did."""
        return self._errors.get(job_id)

    def owner(self, job_id: str) -> str:
        """Id of the key that asked for a job; empty where none did."""
        return self._owners.get(job_id, "")

    def start(self, kind: str, subject: str, work: Callable[[JobControl], str], *, owner: str = "") -> Job:
        """Run `work` on a thread, when one is free. What it returns is the job's last message.

        Args:
            owner: Id of the key that asked for it.

        Raises:
            QueueFull: `MAX_UNFINISHED` jobs are not over yet.
        """
        if len(self._tasks) >= MAX_UNFINISHED:
            raise QueueFull(retry_after_s=30)
        loop = asyncio.get_running_loop()
        job = Job(id=secrets.token_hex(6), kind=kind, subject=subject, state="queued", created=time.time())
        control = JobControl(job, lambda: loop.call_soon_threadsafe(self._changed, job))
        self._jobs[job.id], self._controls[job.id], self._owners[job.id] = job, control, owner
        self._forget_old()
        task = asyncio.create_task(self._run(job, control, work), name=f"job {job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Ask a job to stop; one that is over stays as it ended."""
        job = self.get(job_id, owner)
        if job.state in ("queued", "running"):
            self._controls[job_id].cancel()
        return job

    async def close(self) -> None:
        """Ask every job to stop and wait for them."""
        for control in self._controls.values():
            control.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, job: Job, control: JobControl, work: Callable[[JobControl], str]) -> None:
        def begin() -> str:
            job.state = "running"
            return "" if control.is_cancelled() else work(control)

        try:
            job.message = await asyncio.get_running_loop().run_in_executor(self._threads, begin)
            job.state = "cancelled" if control.is_cancelled() and not job.message else "done"
        except EdgeError as e:
            job.state = "cancelled" if control.is_cancelled() else "failed"
            job.error = None if control.is_cancelled() else str(e)
            self._errors[job.id] = e
        except Exception as e:  # the supervisor of a task: the job fails, the process goes on
            log.exception("job %s failed", job.id)
            job.state, job.error = "failed", f"{type(e).__name__}: {e}"
            self._errors[job.id] = EdgeError("The job failed; the log says how.")
        job.finished, job.rate_bytes_s = time.time(), 0.0
        self._controls.pop(job.id, None)
        self._changed(job)

    def _forget_old(self) -> None:
        over = [j for j in self.list() if j.state not in ("running", "queued")]
        for job in over[MAX_JOBS:]:
            del self._jobs[job.id], self._owners[job.id]
            self._errors.pop(job.id, None)
