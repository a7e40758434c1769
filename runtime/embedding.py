"""Embeddings and reranking: whole texts through an encoder, many in a step. One thread owns engine and backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, EdgeError, QueueFull
from runtime.backends.encoder import Encoder, EncoderText
from runtime.engine import EngineStats, Failure, Timings
from runtime.governor import Governor
from runtime.loop import Inbox, Observer, StepGuard
from runtime.packing import Packer, Place
from runtime.request import RequestId
from runtime.scheduler import SchedulerStats
from runtime.speculate import SpeculationStats

MAX_WAITING_BYTES = 64 << 20
"""Of all requests together, tokens and what becomes of them; beyond that the queue is full."""
_TEXT_BYTES = 512
"""What a text takes beside its numbers."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts to read.

    Attributes:
        id: Unique within the engine.
        texts: At least one.
        truncated: Indices of texts that were cut to fit.
        dimensions: Numbers to keep of each vector; 0 keeps all.
        raw_scores: A ranker's own score, else a probability.
    """

    id: RequestId
    texts: Sequence[EncoderText]
    truncated: tuple[int, ...] = ()
    dimensions: int = 0
    raw_scores: bool = False


@dataclass(frozen=True, slots=True)
class Embedded:
    """What became of a request. The first says that it was accepted: no rows.

    Attributes:
        num_tokens: Of all its texts.
        rows: Float32, little-endian, one row after the other in the order of the texts; None before it is done.
    """

    request_id: RequestId
    num_tokens: int
    rows: bytes | None = None
    truncated: tuple[int, ...] = ()
    timings: Timings | None = None


class EmbedSink(Protocol):
    """Where results go. Called on the engine's thread; must not block."""

    def deliver(self, results: list[Embedded], failures: list[Failure]) -> None:
        """Take what a step finished."""
        ...


@dataclass(slots=True)
class _Job:
    """The engine's side of one request."""

    request: EmbedRequest
    arrived: float
    size_bytes: int
    num_tokens: int
    values: NDArray[np.float32]
    num_left: int
    started: float | None = None


def normalized(vectors: NDArray[np.float32], dimensions: int = 0) -> NDArray[np.float32]:
    """Each row cut to its first numbers and scaled to length 1; a row of zeros stays one. Shape ``(n, dimensions)``."""
    kept = vectors[:, :dimensions] if dimensions else vectors
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return np.divide(kept, lengths, out=np.zeros_like(kept), where=lengths > 0)


def scores(values: NDArray[np.float32], *, raw: bool) -> NDArray[np.float32]:
    """A ranker's judgement of each pair, shape ``(n, 1)``: the logistic function of its one number, as sentence-
    transformers and the hosted rerankers give it. Models with several outputs give probabilities themselves."""
    first = values[:, :1]
    if raw or values.shape[1] > 1:
        return first
    return (0.5 * (1 + np.tanh(first / 2))).astype(np.float32)  # the logistic function, without overflow


class EmbedEngine:
    """Runs requests on an encoder. `cancel` and `stop` may come from any thread; `run` blocks its own.

    Args:
        max_queue: Requests that may wait before others fail with `QueueFull`.
        governor: Chooses the threads of each step; without one they stay as the backend was opened.
        observer: Hears of each step before it is computed.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, backend: Encoder, sink: EmbedSink, *, max_queue: int, governor: Governor | None = None,
        observer: Observer | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        can = backend.capabilities
        self._backend = backend
        self._sink = sink
        self._clock = clock
        self._guard = StepGuard(backend.set_threads, governor, observer)
        self._max_queue = max_queue
        self._packer = Packer(can.max_step_tokens, can.max_step_texts)
        self._inbox = Inbox(clock)
        self._jobs: dict[RequestId, _Job] = {}
        self._results: list[Embedded] = []
        self._failures: list[Failure] = []
        # Requests and their bytes, as counts that one thread each adds to: also those that wait in the inbox.
        self._num_in = self._bytes_in = self._num_out = self._bytes_out = 0
        self._steps = self._num_tokens = 0

    def submit(self, request: EmbedRequest) -> None:
        """Queue a request. Its results come to the sink. One thread submits.

        Raises:
            QueueFull: As many requests as may, or as many bytes, are waiting.
        """
        size = self._size_bytes(request)
        num_waiting = self._num_in - self._num_out
        has_room = self._bytes_in - self._bytes_out + size <= MAX_WAITING_BYTES
        if num_waiting and (num_waiting >= self._max_queue or not has_room):
            raise QueueFull(retry_after_s=5)
        self._num_in += 1
        self._bytes_in += size
        self._inbox.put(self._accept, request, size, self._clock())

    def _size_bytes(self, request: EmbedRequest) -> int:
        num_tokens = sum(len(text.tokens) for text in request.texts)
        return 4 * num_tokens + len(request.texts) * (4 * self._backend.capabilities.width + _TEXT_BYTES)

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request before the next step. Nothing more comes for it; unknown ones are ignored."""
        self._inbox.put(self._drop, request_id)

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._inbox.close()

    def stats(self) -> EngineStats:
        """Counters; safe from any thread, each number by itself."""
        running = sum(job.started is not None for job in tuple(self._jobs.values()))
        queues = SchedulerStats(len(self._jobs) - running, running, 0, 0, 0)
        return EngineStats(queues, self._steps, self._num_tokens, 0, SpeculationStats())

    def run(self) -> None:
        """Serve until `stop`.

        Raises:
            BackendError: The backend failed `MAX_CONSECUTIVE_FAILURES` times in a row.
        """
        while not self._inbox.is_closed:
            if not self._jobs:
                self._guard.idle()
                self._inbox.wait(self._has_room)
            self.advance()

    def advance(self) -> bool:
        """Take what has arrived, then compute and deliver one step. False if there was nothing to compute."""
        self._inbox.take_all()
        self._flush()  # who was accepted or refused hears it before the step
        self._inbox.note(len(self._jobs))
        places = self._packer.next_step()
        if places:
            self._compute(places)
            self._flush()
        return bool(places)

    def _has_room(self) -> bool:
        """Whether the next step could take more: one step for all of a burst is shorter than one each."""
        return bool(self._jobs) and self._packer.num_tokens < self._packer.max_tokens

    def _flush(self) -> None:
        if self._results or self._failures:
            results, failures, self._results, self._failures = self._results, self._failures, [], []
            self._sink.deliver(results, failures)

    def _accept(self, request: EmbedRequest, size_bytes: int, arrived: float) -> None:
        lengths = [len(text.tokens) for text in request.texts]
        num_tokens = sum(lengths)
        values = np.empty((len(lengths), self._backend.capabilities.width), np.float32)
        self._jobs[request.id] = _Job(request, arrived, size_bytes, num_tokens, values, len(lengths))
        self._packer.add(request.id, lengths)
        self._results.append(Embedded(request.id, num_tokens))

    def _drop(self, request_id: RequestId) -> None:
        self._packer.cancel(request_id)
        if (job := self._jobs.pop(request_id, None)) is not None:
            self._num_out += 1
            self._bytes_out += job.size_bytes

    def _compute(self, places: list[Place]) -> None:
        now = self._clock()
        texts = [self._jobs[place.request_id].request.texts[place.index] for place in places]
        jobs = {place.request_id: self._jobs[place.request_id] for place in places}
        for job in jobs.values():
            job.started = now if job.started is None else job.started
        num_tokens = sum(len(text.tokens) for text in texts)
        self._guard.begin(list(jobs), num_tokens)
        self._guard.govern(now)
        try:
            values = self._backend.encode(texts)
        except BackendError as e:
            self._fail(list(jobs), e)
            return
        self._steps += 1
        self._num_tokens += num_tokens
        self._guard.succeeded()
        self._book(places, values)

    def _fail(self, request_ids: list[RequestId], error: BackendError) -> None:
        for request_id in request_ids:
            self._drop(request_id)
            self._failures.append(Failure(request_id, error))
        self._flush()
        self._guard.failed(error)

    def _book(self, places: list[Place], values: NDArray[np.float32]) -> None:
        for place, row in zip(places, values, strict=True):
            job = self._jobs[place.request_id]
            job.values[place.index] = row
            job.num_left -= 1
            if not job.num_left:
                self._finish(job)

    def _finish(self, job: _Job) -> None:
        request = job.request
        self._drop(request.id)
        if not np.isfinite(job.values).all():
            error: EdgeError = BackendError("The model's answer holds numbers that are not finite.")
            self._failures.append(Failure(request.id, error))
            return
        if self._backend.capabilities.is_ranker:
            rows = scores(job.values, raw=request.raw_scores)
        else:
            rows = normalized(job.values, request.dimensions)
        now = self._clock()
        started = job.started or now
        timings = Timings(started - job.arrived, now - started, now - job.arrived)
        data = rows.astype("<f4").tobytes()
        self._results.append(Embedded(request.id, job.num_tokens, data, request.truncated, timings))
