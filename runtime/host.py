"""One model and the worker that serves it: start, watch, restart. One event loop owns it; nothing here blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Literal

import psutil
from typing_extensions import override

from edge import __version__
from edge.config import Settings
from edge.errors import (
    BackendError,
    DeadlineExceeded,
    EdgeError,
    InvalidRequest,
    ModelLoading,
    QueueFull,
    RequestPoisoned,
    ServerStopping,
    StoreError,
    WorkerDied,
)
from edge.hardware.memory import oom_kills
from edge.store.digest import Digest
from edge.store.drafts import DraftChoice
from edge.store.models import StoredModel
from runtime import wire
from runtime.blackbox import BlackBox
from runtime.fair_shares import may_wait
from runtime.generation import Generation, error_from_wire
from runtime.poison import PoisonCabinet, case_of
from runtime.process import WorkerProcess, log_path, open_log
from runtime.quarantine import Fingerprint, Quarantine, Suspect, fingerprint
from runtime.tuning import Tuning, load_tuning

log = logging.getLogger("edge.host")

LOAD_TIMEOUT_S = 300.0
"""A load that shows no progress for this long has failed."""
STOP_TIMEOUT_S = 10.0
SILENCE_S = 120.0
"""A worker that holds requests and completes no step for this long is hung; a step takes seconds at worst."""
MIN_SILENCE_S = 10.0
"""No worker is given up sooner: a busy machine may keep it waiting."""
LOOK_S = 1.0
"""How often a worker is looked at; twice as often on probation."""
PROBATION_SILENCE_S = 4.0
"""The same for one on probation, with another that answers in its place; a load may be silent for twice as long."""
SLOWNESS = 10.0
"""How many times slower than the slowest step so far, by its width, a step may be before it counts as hung."""
DRAIN_S = 20.0
"""How long a suspect waits for the requests under way to end, before it runs beside them."""
MAX_UNSENT_BYTES = 64 << 20
"""Requests that the worker has not read yet; it is far behind, or hung."""
PINS_S = 60.0
"""A worker tells of its pins between two steps."""
ACCEPT_S = 60.0
"""A prompt whose template and tokens take this long has caught the worker's text thread in a loop."""
LONG_LIFE_S = 60.0
HALF_LIFE_S = 600.0
MAX_LOAD_DEATHS = 3
"""Crashes in a row, each before the model was ready, after which the model counts as failed."""
BACKOFF_S = (0.1, 0.5, 2.0, 5.0)
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


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ended.

    Attributes:
        reason: In words.
        is_fault: Whether a request may have caused it; false for what came from outside.
    """

    reason: str
    is_fault: bool
    hint: str | None = None


class ModelHost:
    """One model of the store and the worker that serves it, if one does.

    Args:
        poison: Requests that are refused, of all models.
        reserved_bytes: Gives the memory that other models are about to take.
        find_draft: Gives the model that shall guess for it, if one shall. Reads the store.
        lease: Keeps manifests from being collected while they are loaded. Writes to the store.
        check: Looks at the model before each start of its worker, and raises to refuse it. Reads the store.
    """

    def __init__(
        self,
        settings: Settings,
        model: StoredModel,
        poison: PoisonCabinet,
        *,
        reserved_bytes: Callable[[], int] = lambda: 0,
        find_draft: Callable[[], DraftChoice | None] = lambda: None,
        lease: Callable[[Digest], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
        check: Callable[[StoredModel], object] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.ref = str(model.ref)
        self.state: State = "unloaded"
        self.error: EdgeError | None = None
        self.ready: wire.Ready | None = None
        self.heartbeat: wire.Heartbeat | None = None
        self.promised_bytes = 0
        """Memory that looks free but is for its cells that nobody used yet."""
        self.num_restarts = 0
        self.ready_since: float | None = None
        self._ready_at: float | None = None
        """When the present worker became ready, also after its end."""
        self.last_used = time.monotonic()
        self.keep_alive_s: float | None = None
        """How long the model stays loaded unused, where a request said so since it was loaded; negative is for ever."""
        self.probation: Callable[[EdgeError], None] | None = None
        """Where it is set, the worker is not started again: this is told why it ended, before those hear of it who
        waited for it, so that they may find another model in its place."""
        self._uses = 0.0
        self._reserved_bytes = reserved_bytes
        self._find_draft, self._check = find_draft, check
        self._guesser: StoredModel | None = None
        self._lease, self._held = lease, contextlib.ExitStack()
        self._samples: deque[Sample] = deque()
        self._generations: dict[int, Generation] = {}
        self._next_id = 0
        self._process: WorkerProcess | None = None
        self._waiting_process: WorkerProcess | None = None
        self._load: wire.Load | None = None
        """What the present worker was told to load."""
        self._transport: asyncio.Transport | None = None
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._stop, self._told = asyncio.Event(), asyncio.Event()
        self._is_sick = False
        self._last_progress = self._last_beat = 0.0
        self._last_steps: int = -1
        self._num_read = 0
        self._poison = poison
        # What an upgrade may have mended gets another chance.
        self._engine_id = f"{model.digest} {__version__} {version('llama-cpp-python')}"
        self._quarantine = Quarantine()
        self._box: BlackBox | None = None
        self._oom_kills: deque[int | None] = deque(maxlen=3)
        """What the kernel counted at the last looks: a death is seen a little later than it is counted."""
        self._num_waiting: Counter[str] = Counter()
        """Requests of each tenant that wait for the worker to be ready, or at the door."""
        self._pins_asked: dict[int, asyncio.Future[wire.Pins]] = {}
        self._leaving: dict[int, Generation] = {}
        """Cancelled while the worker was at them: it may still be."""
        self._door = asyncio.Lock()
        """Held while a suspect runs alone; others wait in line."""
        self._alone: tuple[int, Fingerprint, Suspect] | None = None
        self._emptied = asyncio.Event()
        self._num_answered = 0
        """Requests that the present worker answered to the end."""

    # ------------------------------------------------------------------ what others ask

    @property
    def num_active(self) -> int:
        """Requests in the worker, running or waiting."""
        return len(self._generations)

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody waits for anything of it."""
        return self.state == "ready" and not self._generations and not self._num_waiting.total()

    def uses(self) -> float:
        """Requests so far, each half as much after `HALF_LIFE_S`."""
        return self._uses * 0.5 ** ((time.monotonic() - self.last_used) / HALF_LIFE_S)

    def _touch(self, *, uses: int = 0) -> None:
        """Somebody wants it, or wanted it until now."""
        self._uses, self.last_used = self.uses() + uses, time.monotonic()

    def worth(self) -> float:
        """What it is worth to stay loaded: the seconds of loading that it saves, for each byte that it takes."""
        load_s = self.ready.load_s if self.ready is not None else 0.0
        return self.uses() * load_s / max(1, self.memory_bytes)

    @property
    def memory_bytes(self) -> int:
        """What it takes, or its weights where it has not said so yet."""
        beat = self.heartbeat
        return beat.memory_bytes + self.promised_bytes if beat is not None else self.model.size_bytes

    @property
    def draft_bytes(self) -> int:
        """Of the draft model's files, while there is one."""
        return self._guesser.size_bytes if self._guesser is not None else 0

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

    async def wait_ready(self, timeout_s: float, *, tenant: str = "") -> None:
        """Start the worker if there is none, and wait until it answers.

        Raises:
            ModelLoading: It is not ready in time.
            QueueFull: Too much is waiting.
            EdgeError: The load failed.
        """
        self._touch()
        try:
            with self.waiting(tenant):
                async with asyncio.timeout(timeout_s):
                    await self._start_supervisor()
                    while self.state == "loading":
                        await self._changed.wait()
        except TimeoutError as e:
            raise ModelLoading(self.ref, retry_after_s=10) from e
        if self.state != "ready":
            raise self.error.copy() if self.error is not None else ServerStopping("The model was unloaded.")

    async def _start_supervisor(self) -> None:
        while self._supervisor is not None and not self._supervisor.done():
            if not self._stop.is_set():
                return
            await asyncio.wait([self._supervisor])  # an unload is under way
        self._stop, self._told, self._is_sick = asyncio.Event(), asyncio.Event(), False
        self._set_state("loading")
        self._supervisor = asyncio.create_task(self._supervise(self._stop), name=f"worker {self.ref}")

    async def plan(self) -> wire.Load:
        """What the worker was told to load, or would be."""
        return self._load or await asyncio.to_thread(self._load_message, self._reserved_bytes())

    async def begin_load(self, process: WorkerProcess | None) -> None:
        """Start the worker, and return once it knows what to load, or could not be started.

        Args:
            process: One that waits to be told; owned from now on.
        """
        self._waiting_process = process
        await self._start_supervisor()
        await _wait(self._told, STOP_TIMEOUT_S)

    async def start(
        self, make: Callable[[int], wire.Ask], *, timeout_s: float, allowed_s: float, tenant: str = ""
    ) -> Generation:
        """Send a request to the worker. One that may have ended it before waits until it can run alone.

        Args:
            make: The request, under an id.
            timeout_s: What is left of the time it may take.
            allowed_s: All of that time, for the error that says so.
            tenant: Whose it is: tenants share the queue.

        Raises:
            InvalidRequest: It is larger than any message to a worker.
            RequestPoisoned: It ended the worker twice.
            QueueFull: Too much is waiting.
            DeadlineExceeded: It could not be sent in time.
            EdgeError: The worker is gone and does not come back.
        """
        self._next_id += 1
        message = make(self._next_id)
        suspect = self._judge(message)
        if suspect is None and self.state == "ready" and not self._door.locked():
            return self._submit(message, timeout_s=timeout_s, allowed_s=allowed_s, tenant=tenant)
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                suspect = await self._pass_door(message, tenant)
        except TimeoutError as e:
            raise DeadlineExceeded(timeout_s=allowed_s) from e
        try:
            left_s = deadline - time.monotonic()
            generation = self._submit(message, timeout_s=left_s, allowed_s=allowed_s, tenant=tenant)
        except BaseException:
            self._door.release()
            raise
        if suspect is None:
            self._door.release()
        else:
            self._alone = (message.id, *suspect)
        return generation

    def _judge(self, message: wire.Ask) -> tuple[Fingerprint, Suspect] | None:
        """What is known against a request, if something is."""
        if self._quarantine.is_empty and not self._poison.num_refused:
            return None
        who = fingerprint(message, engine=self._engine_id)
        self._poison.check(who)
        suspect = self._quarantine.suspect(who)
        return None if suspect is None else (who, suspect)

    async def _pass_door(self, message: wire.Ask, tenant: str) -> tuple[Fingerprint, Suspect] | None:
        """Wait in line, hold the door, and see that the worker is ready, and empty where a suspect comes. What is known
        against the request is asked at the door: meanwhile one that is the same may have been judged."""
        with self.waiting(tenant):
            await self._door.acquire()
        try:
            suspect = self._judge(message)
            if suspect is not None and self._generations:
                self._emptied.clear()
                await _wait(self._emptied, DRAIN_S)
            await self.wait_ready(LOAD_TIMEOUT_S, tenant=tenant)
        except BaseException:
            self._door.release()
            raise
        return suspect

    @contextlib.contextmanager
    def waiting(self, tenant: str) -> Generator[None]:
        """Count a request of this tenant among those that wait.

        Raises:
            QueueFull: Too much is waiting.
        """
        self._check_room(tenant)
        self._num_waiting[tenant] += 1
        try:
            yield
        finally:
            self._num_waiting -= Counter((tenant,))

    @property
    def _capacity(self) -> int:
        """Requests that may be here, of all tenants; one alone may have half."""
        return 2 * (self.settings.max_queue + self.settings.max_sequences)

    def _check_room(self, tenant: str) -> None:
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        own = self._num_waiting[tenant] + sum(g.tenant == tenant for g in self._generations.values())
        held = self._num_waiting.total() + len(self._generations)
        if not may_wait(own, held, self._capacity) or unsent > MAX_UNSENT_BYTES:
            raise QueueFull(retry_after_s=5)

    def _submit(self, message: wire.Ask, *, timeout_s: float, allowed_s: float, tenant: str) -> Generation:
        if self._transport is None or self.state != "ready":
            raise WorkerDied(self.ref, reason="it is not running")
        self._check_room(tenant)
        frame = wire.encode_frame(message)
        if len(frame) > wire.MAX_FRAME_BYTES:  # no worker would read it
            raise InvalidRequest(f"The request is larger than {wire.MAX_FRAME_BYTES:,} bytes.", hint="Send less.")
        self._touch(uses=1)
        if not self._generations:
            self._last_progress = self.last_used  # the clock of a hang starts with work
        generation = Generation(message, self._cancel, self._set_held, tenant=tenant)
        error = DeadlineExceeded(timeout_s=allowed_s)
        generation.expiry = asyncio.get_running_loop().call_later(timeout_s, partial(self._expire, generation, error))
        self._generations[message.id] = generation
        self._transport.write(frame)
        return generation

    async def pins(self, *, remove: str = "") -> wire.Pins:
        """What is pinned in the worker, after `remove`, where it is given, was let go.

        Raises:
            WorkerDied: There is no worker, or it ended.
            DeadlineExceeded: It did not say so in time.
        """
        if self._transport is None or self.state != "ready":
            raise WorkerDied(self.ref, reason="it is not running")
        self._next_id += 1
        asked = self._pins_asked[self._next_id] = asyncio.get_running_loop().create_future()
        self._send(wire.AskPins(self._next_id, remove))
        try:
            async with asyncio.timeout(PINS_S):
                return await asked
        except TimeoutError as e:
            raise DeadlineExceeded(timeout_s=PINS_S) from e
        finally:
            self._pins_asked = {i: f for i, f in self._pins_asked.items() if f is not asked}

    def _expire(self, generation: Generation, error: DeadlineExceeded) -> None:
        self._cancel(generation.id)
        generation.fail(error)

    def has(self, blob: Digest) -> bool:
        """Whether the model consists of this file, among others."""
        return any(file.digest == blob for file in self.model.files)

    async def unload(self, *, sick: EdgeError | None = None) -> None:
        """End the worker and give its memory back. Requests it still holds end with an error.

        Args:
            sick: Why nobody waits for it to end in order; what it holds ends with this.
        """
        self._is_sick = sick is not None
        self._stop.set()
        if self._supervisor is None or self._supervisor.done():
            self._set_state("unloaded")
        else:
            self._fail_all(sick or self._unloaded())
            await asyncio.wait([self._supervisor])

    def _unloaded(self) -> EdgeError:
        return ServerStopping(f"The model '{self.ref}' was unloaded.")

    # ------------------------------------------------------------------ the process

    async def _supervise(self, stop: asyncio.Event) -> None:
        """Keep a worker running until `stop` is set. A load that fails, or crashes again and again, ends it."""
        try:
            await self._keep_running(stop)
        finally:
            self._held.close()
            self._drop_box()
            waiting, self._waiting_process = self._waiting_process, None
            if waiting is not None:  # once: the number of its file may be a client's by the next time
                waiting.discard()
            if stop.is_set():  # here, and not where it was asked for: by then it may be loading again
                self._fail_all(self._unloaded())
                self._set_state("unloaded")

    async def _keep_running(self, stop: asyncio.Event) -> None:
        deaths = load_deaths = 0
        while not stop.is_set():
            self._set_state("loading")
            try:
                await self._start_process(await asyncio.to_thread(self._begin_load, self._reserved_bytes()))
            except EdgeError as e:
                self._give_up(e)
                return
            except OSError as e:
                self._give_up(BackendError(f"The engine of '{self.ref}' cannot be started: {e}."))
                return
            ending = await self._watch(stop)
            if stop.is_set() or self.state == "failed":
                return
            reason = ending.reason
            deaths = 1 if self._num_answered or self._lived_s() > LONG_LIFE_S else deaths + 1
            load_deaths = load_deaths + 1 if self._ready_at is None else 0
            self.num_restarts += 1
            log.error("the worker of %s ended: %s", self.ref, reason)
            await self._find_guilty(ending)
            if self.probation is not None:
                self._give_up(WorkerDied(self.ref, reason=reason, hint=ending.hint))
                return
            if load_deaths >= MAX_LOAD_DEATHS:
                hint = f"Its log: {log_path(self.settings.logs_dir, self.ref)}. Check the file: edge verify {self.ref}."
                self._give_up(BackendError(f"The engine of '{self.ref}' ends while it loads ({reason}).", hint=hint))
                return
            self._set_state("loading")
            self._fail_all(WorkerDied(self.ref, reason=reason, hint=ending.hint))
            await _wait(stop, BACKOFF_S[min(deaths - 1, len(BACKOFF_S) - 1)])

    async def _find_guilty(self, ending: Ending) -> None:
        """Suspect who was in the step that died; refuse, and keep on the disk, who did it twice."""
        box, self._box = self._box, None
        if box is None:
            return
        touched = box.read().ids
        box.close()
        held = self._leaving | self._generations
        present = {i: fingerprint(held[i].message, engine=self._engine_id) for i in touched if i in held}
        if not ending.is_fault or not present:
            return
        step = {who: held[i].num_output for i, who in present.items()}
        convicted = self._quarantine.blame(step, reason=ending.reason)
        if convicted is None:
            log.warning("%d requests were in that step; they run alone when they come again", len(step))
            return
        (number, who), *_ = present.items()
        log.error("the request %s ended the worker of %s twice: see `edge replay %s`", who, self.ref, who)
        case = case_of(
            who, held[number].message, model=self.ref, digest=str(self.model.digest),
            reasons=list(convicted.reasons), time=time.time(),
        )  # fmt: skip
        await asyncio.to_thread(self._poison.keep, case)
        if (generation := self._take(number)) is not None:
            generation.fail(RequestPoisoned(who))

    def _give_up(self, error: EdgeError) -> None:
        self._told.set()
        self._tell_probation(error)
        self.error = error
        self._fail_all(error)
        self._set_state("failed")

    def _tell_probation(self, error: EdgeError) -> None:
        if self.probation is not None:
            self.probation(error)

    def _lived_s(self) -> float:
        return time.monotonic() - self._ready_at if self._ready_at is not None else 0.0

    async def _start_process(self, load: wire.Load) -> None:
        self._drop_box()
        process, self._waiting_process = self._waiting_process, None
        if process is None:
            with await asyncio.to_thread(open_log, log_path(self.settings.logs_dir, self.ref)) as log_file:
                process = WorkerProcess(log_file)
        self._process, self._box = process, process.box
        self._transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: _FrameProtocol(self._on_message, self._on_lost), sock=process.sock
        )
        self._last_progress, self._last_steps, self._ready_at = time.monotonic(), -1, None
        self._num_answered = 0
        self._oom_kills.clear()
        self._oom_kills.append(oom_kills())
        self._load = load
        self._send(load)
        self._told.set()

    def _drop_box(self) -> None:
        if self._box is not None:
            self._box.close()
            self._box = None

    def _begin_load(self, reserved_bytes: int) -> wire.Load:
        """What to load, kept from being collected until the worker is gone for good."""
        self._check(self.model)
        load = self._load_message(reserved_bytes)
        before, self._held = self._held, contextlib.ExitStack()
        with before:
            for model in (self.model, self._guesser):
                if model is not None:
                    self._hold(model)
        return load

    def _hold(self, model: StoredModel) -> None:
        try:
            self._held.enter_context(self._lease(model.digest))
        except StoreError as e:  # what is loaded outlives its name anyhow; the next load may not find it
            log.warning("%s is loaded without a lease: %s", model.ref, e)

    def _load_message(self, reserved_bytes: int) -> wire.Load:
        """What to load and how. Reads files."""
        s = self.settings
        draft = self._find_draft() if s.speculation != "off" else None
        guesser = self._guesser = draft.model if draft is not None else None
        tuned = Tuning() if s.threads else load_tuning(s.tuning_dir, str(self.model.digest)) or Tuning()
        return wire.Load(
            path=str(self.model.weights), ref=self.ref, threads=s.threads or tuned.prefill_threads,
            num_slots=s.max_sequences, step_tokens=s.step_tokens, context_tokens=s.context_tokens,
            max_queue=self._capacity, state_bytes=s.state_bytes, reserved_bytes=reserved_bytes,
            speculation=s.speculation, token_interval_ms=s.token_interval_ms, decode_threads=tuned.decode_threads,
            ubatch_tokens=tuned.ubatch_tokens, flash_attention=tuned.flash_attention,
            home=str(s.home), weights_digest=self.model.weights.name, state_disk_bytes=s.state_disk_bytes,
            pooling=self.model.details.pooling or "", draft=draft.name if draft is not None else "",
            draft_path=str(guesser.weights) if guesser is not None else "",
            draft_problem=draft.problem if draft is not None else "",
            projector=str(self.model.projector or ""),
            template=self.model.details.template, template_digest=self.model.details.template_digest,
        )  # fmt: skip

    async def _watch(self, stop: asyncio.Event) -> Ending:
        """Wait for the process to end, and end it where it hangs or is not wanted."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        stopped = asyncio.create_task(stop.wait())
        why: str | None = None
        suspicion = None
        while not ended.done() and why is None:
            look_s = LOOK_S if self.probation is None else LOOK_S / 2
            await asyncio.wait([ended, stopped], timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
            # Twice in a row: the first look after this process itself was held up judges by what it has not read yet.
            before, suspicion = suspicion, self._hung()
            why = "it was unloaded" if stopped.done() else suspicion and before
        stopped.cancel()
        from_outside = why is not None and self._is_stopped()
        await self._end_process(kindly=stop.is_set() and self.state == "ready" and not self._is_sick)
        await ended
        if why is not None:
            return Ending(f"{why}, it was stopped from outside" if from_outside else why, not from_outside)
        return self._ending(self._process.returncode or 0)

    def _ending(self, code: int) -> Ending:
        if code != -signal.SIGKILL:
            return Ending(f"signal {-code}" if code < 0 else f"exit code {code}", code != 0)
        if (now := oom_kills()) is not None and now != self._oom_kills[0]:
            hint = "It is being restarted. Unload a model, or set fewer context_tokens, where this comes again."
            # Nobody's fault: one that eats memory meets the worker's own limit first.
            return Ending("the kernel ended it for lack of memory", False, hint)
        return Ending(f"signal {signal.SIGKILL}, from outside", False)

    def _hung(self) -> str | None:
        """Why the worker counts as hung, if it does."""
        self._oom_kills.append(oom_kills())
        now = time.monotonic()
        quiet = now - self._last_progress
        patience_s = MIN_SILENCE_S if self.probation is None else PROBATION_SILENCE_S
        if self.state == "loading":
            limit = patience_s if self._is_stopped() else self._load_patience_s()
            return f"no progress of the load in {limit:.0f} s" if quiet > limit else None
        if self.state != "ready" or self._box is None:
            return None
        if now - self._last_beat > patience_s:
            return f"no sign of life in {patience_s:.0f} s"
        return self._stuck(now, quiet, patience_s)

    def _load_patience_s(self) -> float:
        """How long a load may show no progress. On probation, what it reads from the disk counts as such."""
        if self.probation is None:
            return LOAD_TIMEOUT_S
        before, self._num_read = self._num_read, self._read_bytes()
        if before != self._num_read:
            self._last_progress = time.monotonic()
        return 2 * PROBATION_SILENCE_S

    def _read_bytes(self) -> int:
        """What the worker had the disk read, pages of mapped files included."""
        try:
            return 0 if self._process is None else psutil.Process(self._process.pid).io_counters().read_bytes
        except psutil.Error:
            return 0

    def _stuck(self, now: float, quiet: float, patience_s: float) -> str | None:
        assert self._box is not None
        doing = self._box.read()
        self._leaving = {i: g for i, g in self._leaving.items() if i in doing.ids}
        limit = SILENCE_S
        if doing.slowest_token_s:
            limit = min(SILENCE_S, max(patience_s, SLOWNESS * doing.step_tokens * doing.slowest_token_s))
        if doing.step_began and now - doing.step_began > limit:
            return f"a step was not done in {limit:.0f} s"
        if doing.text_began and now - doing.text_began > ACCEPT_S:
            return f"a prompt was not prepared in {ACCEPT_S:.0f} s"
        if quiet > SILENCE_S and not all(g.is_held for g in self._generations.values()):
            return f"no step in {SILENCE_S:.0f} s"
        return None

    def _is_stopped(self) -> bool:
        """Whether somebody stopped the process (SIGSTOP, a debugger)."""
        try:
            return self._process is not None and psutil.Process(self._process.pid).status() in (
                psutil.STATUS_STOPPED,
                psutil.STATUS_TRACING_STOP,
            )
        except psutil.NoSuchProcess:
            return False

    async def _end_process(self, *, kindly: bool) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            if kindly:
                self._send(wire.Stop())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await process.wait()
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
        if (generation := self._take(request_id)) is not None:
            self._leaving[request_id] = generation
        self._send(wire.Cancel(request_id))

    def _set_held(self, request_id: int, is_held: bool) -> None:
        if is_held and self._alone is not None and self._alone[0] == request_id:
            return  # all others wait until it is past the point of the death
        self._last_progress = time.monotonic()  # none was expected while nobody read
        self._send(wire.Hold(request_id, is_held))

    def _take(self, request_id: int) -> Generation | None:
        """Let go of a request: it is over."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self._touch()
            if generation.expiry is not None:
                generation.expiry.cancel()
        if not self._generations:
            self._emptied.set()
        self._open_door(request_id)
        return generation

    def _open_door(self, request_id: int) -> None:
        """Let others in, if this one had to be alone."""
        if self._alone is not None and self._alone[0] == request_id:
            self._alone = None
            self._door.release()

    def _acquit(self, request_id: int, *, num_output: int, is_finished: bool) -> None:
        """Let others in as soon as the one that had to be alone is past the point of the death."""
        if self._alone is not None and self._alone[0] == request_id:
            _, who, suspect = self._alone
            if is_finished or num_output >= suspect.alone_until:
                self._quarantine.clear(who)
                self._open_door(request_id)

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
            case wire.Pins():
                if (asked := self._pins_asked.pop(message.id, None)) and not asked.done():
                    asked.set_result(message)
            case wire.Loading():
                self._last_progress = time.monotonic()
                self.promised_bytes = message.promised_bytes
            case wire.Ready():
                now = time.monotonic()
                self.ready, self.ready_since, self._ready_at = message, now, now
                self._last_progress = self._last_beat = now
                self._samples.clear()
                self._set_state("ready")
                log.info("%s is ready after %.2f s", self.ref, message.load_s)

    def _on_step(self, step: wire.Step) -> None:
        for piece in step.pieces:
            if generation := self._generations.get(piece.id):
                is_finished = piece.finish_reason is not None
                self._acquit(piece.id, num_output=piece.num_output, is_finished=is_finished)
                if is_finished:
                    self._num_answered += 1
                    self._take(piece.id)
                generation.push(piece)
        for failure in step.failures:
            error = error_from_wire(failure, ref=self.ref)
            if self.probation is not None and failure.code == BackendError.code and failure.id:
                error = WorkerDied(self.ref, reason=error.message)  # the request may be answered by another
                self.probation(error)
            if failure.id == 0:
                self._tell_probation(error)
                self.error = error
                self._set_state("failed")
            elif generation := self._take(failure.id):
                generation.fail(error)

    def _on_heartbeat(self, beat: wire.Heartbeat) -> None:
        self.heartbeat, self.promised_bytes = beat, beat.promised_bytes
        now = self._last_beat = time.monotonic()
        if beat.steps != self._last_steps:
            self._last_steps, self._last_progress = beat.steps, now
        self._samples.append(Sample(now, beat.prompt_tokens, beat.output_tokens))
        while now - self._samples[0].at > RATE_WINDOW_S:
            self._samples.popleft()

    def _fail_all(self, error: EdgeError) -> None:
        self._leaving.clear()
        for asked in self._pins_asked.values():
            if not asked.done():
                asked.set_exception(error.copy())
        self._pins_asked = {}
        for request_id in list(self._generations):
            if generation := self._take(request_id):
                generation.fail(error)

    def _set_state(self, state: State) -> None:
        self.state = state
        if state != "failed":
            self.error = None
        if state in ("unloaded", "failed"):
            self.keep_alive_s = self._load = None
        if state != "ready":
            self.ready = self.heartbeat = self.ready_since = None
            self.promised_bytes = 0
            self._samples.clear()
        self._changed.set()
        self._changed = asyncio.Event()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, at most this long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
