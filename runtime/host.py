"""One model and the worker that serves it: start, watch, restart. One event loop owns it; nothing here blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from typing_extensions import override

from edge.config import Settings
from edge.errors import BackendError, EdgeError, ModelLoading, ServerStopping, WorkerDied
from edge.store.models import StoredModel
from runtime import wire
from runtime.generation import Generation, error_from_wire

log = logging.getLogger("edge.host")

LOAD_TIMEOUT_S = 300.0
"""A load that shows no progress for this long has failed."""
STOP_TIMEOUT_S = 10.0
SILENCE_S = 120.0
"""A worker that holds requests and completes no step for this long is hung; a step takes seconds at worst."""
ACCEPT_S = 60.0
"""A prompt whose template and tokens take this long has caught the worker's text thread in a loop."""
LONG_LIFE_S = 60.0
MAX_LOAD_DEATHS = 3
"""Crashes in a row, each before the model was ready, after which the model counts as failed."""
BACKOFF_S = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
MAX_LOG_BYTES = 4 << 20
RATE_WINDOW_S = 5.0

State = Literal["unloaded", "loading", "ready", "failed"]


class _FrameProtocol(asyncio.Protocol):
    """Cuts the byte stream from a worker into messages."""

    def __init__(self, on_message: Callable[[wire.ToFront], None], on_lost: Callable[[], None]) -> None:
        self._buffer = bytearray()
        self._on_message = on_message
        self._on_lost = on_lost

    @override
    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= wire.HEADER_BYTES:
            start = at + wire.HEADER_BYTES
            end = start + wire.frame_length(bytes(buffer[at:start]))
            if len(buffer) < end:
                break
            self._on_message(wire.to_front_decoder.decode(memoryview(buffer)[start:end].tobytes()))
            at = end
        del buffer[:at]

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at one heartbeat."""

    at: float
    prompt_tokens: int
    output_tokens: int


class ModelHost:
    """One model of the store and the worker that serves it, if one does."""

    def __init__(self, settings: Settings, model: StoredModel) -> None:
        self.settings = settings
        self.model = model
        self.ref = str(model.ref)
        self.state: State = "unloaded"
        self.error: EdgeError | None = None
        self.ready: wire.Ready | None = None
        self.heartbeat: wire.Heartbeat | None = None
        self.num_restarts = 0
        self.ready_since: float | None = None
        self._ready_at: float | None = None
        """When the present worker became ready, also after its end."""
        self.last_used = time.monotonic()
        self._samples: deque[Sample] = deque()
        self._generations: dict[int, Generation] = {}
        self._next_id = 0
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._last_progress = self._last_accepted = 0.0
        self._last_steps: int = -1

    # ------------------------------------------------------------------ what others ask

    @property
    def num_active(self) -> int:
        """Requests in the worker, running or waiting."""
        return len(self._generations)

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._process.pid if self._process is not None else None

    def rates(self) -> tuple[float, float]:
        """Tokens per second read and generated over the last few seconds."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        first, last = self._samples[0], self._samples[-1]
        span = max(last.at - first.at, 1e-6)
        return (last.prompt_tokens - first.prompt_tokens) / span, (last.output_tokens - first.output_tokens) / span

    async def wait_ready(self, timeout_s: float) -> None:
        """Start the worker if there is none, and wait until it answers.

        Raises:
            ModelLoading: It is not ready in time.
            EdgeError: The load failed.
        """
        self.last_used = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._start_supervisor()
                while self.state == "loading":
                    await self._changed.wait()
        except TimeoutError as e:
            raise ModelLoading(self.ref, retry_after_s=10) from e
        if self.state != "ready":
            raise self.error or ServerStopping("The model was unloaded.")

    async def _start_supervisor(self) -> None:
        while self._supervisor is not None and not self._supervisor.done():
            if not self._stop.is_set():
                return
            await asyncio.wait([self._supervisor])  # an unload is under way
        self._stop = asyncio.Event()
        self._set_state("loading")
        self._supervisor = asyncio.create_task(self._supervise(self._stop), name=f"worker {self.ref}")

    def submit(self, make: Callable[[int], wire.Generate]) -> Generation:
        """Send a request to the worker, which must be ready.

        Raises:
            WorkerDied: It ended a moment ago.
        """
        if self._transport is None or self.state != "ready":
            raise WorkerDied(self.ref, reason="it is not running")
        self._next_id += 1
        frame = wire.encode_frame(make(self._next_id))
        self.last_used = time.monotonic()
        if not self._generations:
            self._last_progress = self.last_used  # the clock of a hang starts with work
        generation = Generation(self._next_id, self._cancel)
        self._generations[self._next_id] = generation
        self._transport.write(frame)
        return generation

    async def unload(self) -> None:
        """End the worker and give its memory back. Requests it still holds end with an error."""
        self._stop.set()
        self._fail_all(ServerStopping(f"The model '{self.ref}' was unloaded."))
        if self._supervisor is not None:
            await asyncio.wait([self._supervisor])
        self._fail_all(ServerStopping(f"The model '{self.ref}' was unloaded."))
        self._set_state("unloaded")

    # ------------------------------------------------------------------ the process

    async def _supervise(self, stop: asyncio.Event) -> None:
        """Keep a worker running until `stop` is set. A load that fails, or crashes again and again, ends it."""
        deaths = 0
        while not stop.is_set():
            self._set_state("loading")
            try:
                await self._start_process(self._load_message())
            except EdgeError as e:
                self._give_up(e)
                return
            except OSError as e:
                self._give_up(BackendError(f"The engine of '{self.ref}' cannot be started: {e}."))
                return
            reason = await self._watch(stop)
            if stop.is_set() or self.state == "failed":
                return
            deaths = 1 if self._lived_s() > LONG_LIFE_S else deaths + 1
            died_loading = self._ready_at is None
            self.num_restarts += 1
            log.error("the worker of %s ended: %s", self.ref, reason)
            if died_loading and deaths >= MAX_LOAD_DEATHS:
                hint = f"Its log: {self._log_path()}. Check the file: edge verify {self.ref}."
                self._give_up(BackendError(f"The engine of '{self.ref}' ends while it loads ({reason}).", hint=hint))
                return
            self._set_state("loading")
            self._fail_all(WorkerDied(self.ref, reason=reason))
            await _wait(stop, BACKOFF_S[min(deaths - 1, len(BACKOFF_S) - 1)])

    def _give_up(self, error: EdgeError) -> None:
        self.error = error
        self._fail_all(error)
        self._set_state("failed")

    def _lived_s(self) -> float:
        return time.monotonic() - self._ready_at if self._ready_at is not None else 0.0

    async def _start_process(self, load: wire.Load) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            with _open_log(self._log_path()) as log_file:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "runtime.worker", str(theirs.fileno()), str(os.getpid()),
                    pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=log_file, stderr=log_file,
                )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._transport, _ = await loop.create_connection(
            lambda: _FrameProtocol(self._on_message, self._on_lost), sock=ours
        )
        self._last_progress, self._last_steps, self._ready_at = time.monotonic(), -1, None
        self._send(load)

    def _log_path(self) -> Path:
        return self.settings.logs_dir / f"worker-{self.ref.replace(':', '-').replace('/', '-')}.log"

    def _load_message(self) -> wire.Load:
        s = self.settings
        return wire.Load(
            path=str(self.model.weights), ref=self.ref, threads=s.threads, num_slots=s.max_sequences,
            step_tokens=s.step_tokens, context_tokens=s.context_tokens, max_queue=s.max_queue,
            state_bytes=s.state_bytes,
        )  # fmt: skip

    async def _watch(self, stop: asyncio.Event) -> str:
        """Wait for the process to end, and end it where it hangs or is not wanted. Why it ended, in words."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        stopped = asyncio.create_task(stop.wait())
        why: str | None = None
        while not ended.done() and why is None:
            await asyncio.wait([ended, stopped], timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            why = "it was unloaded" if stopped.done() else self._hung()
        stopped.cancel()
        await self._end_process(kindly=stop.is_set())
        await ended
        code = self._process.returncode
        return why or (f"signal {-code}" if code is not None and code < 0 else f"exit code {code}")

    def _hung(self) -> str | None:
        quiet = time.monotonic() - self._last_progress
        if self.state == "loading" and quiet > LOAD_TIMEOUT_S:
            return f"no progress of the load in {LOAD_TIMEOUT_S:.0f} s"
        if self.state == "ready" and self._generations and quiet > SILENCE_S:
            return f"no step in {SILENCE_S:.0f} s"
        waiting = [g.made for g in self._generations.values() if not g.is_accepted]
        if waiting and time.monotonic() - max(min(waiting), self._last_accepted) > ACCEPT_S:
            return f"a prompt was not prepared in {ACCEPT_S:.0f} s"
        return None

    async def _end_process(self, *, kindly: bool) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            if kindly:
                self._send(wire.Stop())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await process.wait()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        self._close_transport()

    def _close_transport(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # ------------------------------------------------------------------ messages

    def _send(self, message: wire.ToWorker) -> None:
        if self._transport is not None:
            self._transport.write(wire.encode_frame(message))

    def _cancel(self, request_id: int) -> None:
        self._generations.pop(request_id, None)
        self._send(wire.Cancel(request_id))

    def _on_lost(self) -> None:
        """The worker closed its end: it is gone or going. Who comes now waits for the next one."""
        self._transport = None
        if self.state == "ready":
            self._set_state("loading")

    def _on_message(self, message: wire.ToFront) -> None:
        match message:
            case wire.Step():
                self._last_progress = time.monotonic()
                self._on_step(message)
            case wire.Heartbeat():
                self._on_heartbeat(message)
            case wire.Loading():
                self._last_progress = time.monotonic()
            case wire.Ready():
                now = time.monotonic()
                self.ready, self.ready_since, self._ready_at, self._last_progress = message, now, now, now
                self._samples.clear()
                self._set_state("ready")
                log.info("%s is ready after %.2f s", self.ref, message.load_s)

    def _on_step(self, step: wire.Step) -> None:
        for piece in step.pieces:
            if generation := self._generations.get(piece.id):
                if piece.finish_reason is not None:
                    del self._generations[piece.id]
                if not generation.is_accepted:
                    self._last_accepted = time.monotonic()
                generation.push(piece)
        for failure in step.failures:
            error = error_from_wire(failure, ref=self.ref)
            if failure.id == 0:
                self.error = error
                self._set_state("failed")
            elif generation := self._generations.pop(failure.id, None):
                self._last_accepted = time.monotonic()
                generation.fail(error)

    def _on_heartbeat(self, beat: wire.Heartbeat) -> None:
        self.heartbeat = beat
        now = time.monotonic()
        if beat.steps != self._last_steps:
            self._last_steps, self._last_progress = beat.steps, now
        self._samples.append(Sample(now, beat.prompt_tokens, beat.output_tokens))
        while now - self._samples[0].at > RATE_WINDOW_S:
            self._samples.popleft()

    def _fail_all(self, error: EdgeError) -> None:
        generations, self._generations = self._generations, {}
        for generation in generations.values():
            generation.fail(error)

    def _set_state(self, state: State) -> None:
        self.state = state
        if state != "failed":
            self.error = None
        if state != "ready":
            self.ready = self.heartbeat = self.ready_since = None
            self._samples.clear()
        self._changed.set()
        self._changed = asyncio.Event()


def _open_log(path: Path) -> BinaryIO:
    """The worker's log; where the disk takes none, its words are lost rather than its work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")
    except OSError:
        return Path(os.devnull).open("ab")


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, at most this long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
