"""The loop: schedule, decode, sample, update. One thread owns it and the backend."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, ConstraintFailed, ContextOverflow, EdgeError, NoRoomToPin, QueueFull
from runtime.adapters import ResidentAdapters
from runtime.backends.base import Backend, StateRefused
from runtime.batch import Batch, Chunk
from runtime.governor import Governor
from runtime.grammar import Guide
from runtime.images import cut, next_unencoded, shown_ids
from runtime.logprobs import Logprobs, PromptEcho
from runtime.loop import Inbox, Observer, StepGuard
from runtime.request import Echo, FinishReason, Pin, Request, RequestId, TokenId, TokenLogprob
from runtime.sampler import Sampler
from runtime.scheduler import Limits, Scheduler, SchedulerStats
from runtime.sequence import Sequence
from runtime.speculate import SpeculationStats, Speculator
from runtime.states import LoadState, RemoveState, SavedState, Scope, StoreState
from runtime.step_budget import BudgetTuner, ahead_s
from runtime.step_cost import StepCosts
from runtime.tokenizer import Detokenizer, StopMatcher

log = logging.getLogger("edge.engine")

ENCODING_TOKENS = 1 << 20
"""As how wide a step the encoding of a tile counts: what an encoder takes does not follow from what tokens take, so it
has all the time that any step may have."""
STEPS_PER_CHORE = 8
"""Under load, a chore of some milliseconds comes between so many steps."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Of one request, in seconds since it reached the engine."""

    queue_s: float
    """Until its first token of prompt was computed."""
    prefill_s: float
    """From then until its first token."""
    total_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step gave one request. The first says that it was accepted, and holds what its grammar forces at once.

    Attributes:
        text: Text that became certain; may be empty.
        num_output: Tokens generated so far.
        finish_reason: Set on the last delta.
        num_cached: Prompt tokens that were reused.
        timings: Set on the last delta.
        tokens: Prompt and answer as token ids, on the last delta of who asked for them.
        logprobs: Of tokens whose text is certain, for who asked for them.
        echo: The prompt, once, for who asked for it: before any of the answer.
        num_accepted: Guesses that proved right, on the last delta.
        num_rejected: Guesses that proved wrong; they are no part of the answer.
        num_dropped: Tokens left out of the prompt, on the last delta.
        stop: The stop string that ended the answer, on the last delta; empty where it ended otherwise.
    """

    request_id: RequestId
    text: str
    num_output: int
    num_prompt: int
    num_cached: int
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    tokens: tuple[TokenId, ...] | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    echo: Echo | None = None
    num_accepted: int = 0
    num_rejected: int = 0
    num_dropped: int = 0
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request ended without an answer."""

    request_id: RequestId
    error: EdgeError


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the queues now."""

    queues: SchedulerStats
    steps: int
    prompt_tokens: int
    output_tokens: int
    speculation: SpeculationStats


class Disk(Protocol):
    """Where states go that shall outlive the process. Returns at once; what comes of it comes on any thread."""

    def write(self, state: SavedState, data: memoryview, done: Callable[[bool], None]) -> None:
        """Write a state; `done` hears whether it is on the disk."""
        ...

    def read(self, state: SavedState, done: Callable[[memoryview | None], None]) -> None:
        """Read a state; `done` gets its bytes, or None where there are none to be trusted."""
        ...

    def remove(self, scope: Scope, tokens: list[TokenId]) -> None:
        """Remove a state."""
        ...


class Sink(Protocol):
    """Where answers go. Called on the engine's thread, once a step; must not block."""

    def deliver(self, deltas: list[Delta], failures: list[Failure]) -> None:
        """Take the results of a step."""
        ...


@dataclass(slots=True)
class _Answer:
    """The engine's side of one request: sampler, grammar, text, times."""

    sequence: Sequence
    sampler: Sampler
    stops: StopMatcher
    arrived: float
    guide: Guide | None
    logprobs: Logprobs | None
    echo: PromptEcho | None
    num_certain: int = 0
    """Characters of the answer that were passed on."""
    detokenizer: Detokenizer = field(default_factory=Detokenizer)
    started: float | None = None
    first_token: float | None = None
    num_accepted: int = 0
    num_rejected: int = 0

    def last_text(self) -> str:
        """What was held back and comes out at the end, unless a stop string is in it."""
        tail = self.stops.push(self.detokenizer.finish())
        return tail.text + ("" if tail.stopped else self.stops.finish())

    def take_logprobs(self, text: str, reason: FinishReason | None) -> tuple[TokenLogprob, ...] | None:
        """What became certain with a step's text. Of an answer that is over, each token with text in it is reported,
        also one that a stop string cut in two; the token that ended it is not."""
        if self.logprobs is None:
            return None
        self.num_certain += len(text)
        if reason is FinishReason.STOP:
            return self.logprobs.finish(num_certain=self.num_certain)
        return self.logprobs.take(num_known=self.stops.num_known, num_certain=self.num_certain)

    def take_echo(self) -> Echo | None:
        """The prompt, for who asked: once, as soon as all is known of it."""
        if self.echo is None or not self.echo.is_complete:
            return None
        echo, self.echo = self.echo.echo(), None
        return echo


@dataclass(slots=True)
class _Pinning:
    """A request whose prompt is computed and is to be pinned; its answer is told when that is done."""

    slot: int
    request: Request
    delta: Delta
    state: SavedState | None = None


PinsAnswer = Callable[[list[Pin], bool], None]
"""Gets what is pinned, and whether what was to be removed was there."""


class Engine:
    """Runs requests on a backend. `submit`, `cancel` and `stop` may come from any thread; `run` blocks its own.

    Args:
        max_queue: Requests that may wait before others fail with `QueueFull`.
        governor: Chooses the threads of each step; without one they stay as the backend was opened.
        speculator: Guesses tokens where the backend can take guesses back.
        observer: Hears of each step before it is computed.
        disk: Keeps states where the backend's limits let it.
        token_interval_s: Longest wanted time between two tokens while prompts are read beside; 0 chooses one.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, backend: Backend, sink: Sink, *, max_queue: int, governor: Governor | None = None,
        speculator: Speculator | None = None, observer: Observer | None = None, token_interval_s: float = 0.0,
        disk: Disk | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        can = backend.capabilities
        self._backend = backend
        self._sink = sink
        self._clock = clock
        self._guard = StepGuard(backend.set_threads, governor, observer)
        self._speculator = speculator if can.states.partial_reuse else None
        self._disk = disk
        self._adapters = ResidentAdapters(can.adapter_bytes)
        self._max_queue = max_queue
        self.context_tokens = can.context_tokens
        self._eog_tokens = list(backend.tokenizer.eog_tokens)
        self._costs = StepCosts()
        self._budget = BudgetTuner(self._costs, interval_s=token_interval_s, ahead_s=self._ahead_s)
        self._scheduler = Scheduler(
            Limits(can.num_slots, can.num_cells, can.max_step_tokens, states=can.states), self._budget.prompt_tokens
        )
        self._inbox = Inbox(clock)
        self._answers: dict[RequestId, _Answer] = {}
        self._deltas: list[Delta] = []
        self._failures: list[Failure] = []
        self._pinning: list[_Pinning] = []
        self._steps = self._prompt_tokens = self._output_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue a request. Its results come to the sink."""
        self._inbox.put(self._accept, request, self._clock())

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request before the next step. Nothing more comes for it; unknown ones are ignored."""
        self._inbox.put(self._drop, request_id)

    def hold(self, request_id: RequestId, *, is_held: bool) -> None:
        """Compute no more of a request, since nobody reads its answer, or go on with it; unknown ones are ignored."""
        self._inbox.put(self._scheduler.hold, request_id, is_held=is_held)

    def ask_pins(self, answer: PinsAnswer, *, remove: str = "") -> None:
        """Tell what is pinned, on the engine's thread, after `remove` was let go."""
        self._inbox.put(self._tell_pins, answer, remove)

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._inbox.close()

    def stats(self) -> EngineStats:
        """Counters; safe from any thread, each number by itself."""
        speculation = self._speculator.stats() if self._speculator is not None else SpeculationStats()
        return EngineStats(
            self._scheduler.stats(), self._steps, self._prompt_tokens, self._output_tokens, speculation
        )  # fmt: skip

    def run(self) -> None:
        """Serve until `stop`.

        Raises:
            BackendError: The backend failed `MAX_CONSECUTIVE_FAILURES` times in a row.
        """
        chores = self._backend.settle()
        while not self._inbox.is_closed:
            if not self._scheduler.has_work:
                self._wait_for_work(chores)
            elif self._steps % STEPS_PER_CHORE == 0:
                next(chores, None)
            if not self.advance() and self._scheduler.has_work:
                self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Who waits for a state to be read, or for a reader, is all there is. A slow disk is no hanging step."""
        self._guard.idle()
        self._inbox.take(0.1)

    def _wait_for_work(self, chores: Iterator[object]) -> None:
        self._guard.idle()
        while self._inbox.is_empty and next(chores, None) is not None:
            pass
        self._inbox.wait(lambda: self._scheduler.has_work)

    def advance(self) -> bool:
        """Take what has arrived, then plan, compute and deliver one step. False if there was nothing to compute."""
        self._inbox.take_all()
        self._flush()  # who was accepted or refused hears it before the step, which may be long
        batch = self._scheduler.schedule(self._guess)
        self._inbox.note(len(self._scheduler.running))
        if batch is not None:
            self._compute(batch)
            self._flush()
        self._use_disk()
        return batch is not None

    def _ahead_s(self) -> float:
        """How long the answers that a prompt holds up may pause before a reader has caught up with one."""
        now = self._clock()
        begun = ((s.num_output, self._answers[s.request.id].first_token) for s in self._scheduler.pausing())
        return min((ahead_s(count, now - first) for count, first in begun if first is not None), default=math.inf)

    def adopt(self, tokens: list[TokenId], scope: Scope, *, uses: int, pin: str) -> bool:
        """Take a state on the disk into the books, before `run`; False where it is of no use."""
        return self._scheduler.cache.adopt(tokens, scope, uses=uses, pin=pin) is not None

    def persist(self) -> None:
        """After `run`: have the disk take all that is worth keeping.

        Raises:
            BackendError: A state cannot be read out of the cache.
        """
        for sequence in list(self._scheduler.sequences()):
            self._scheduler.retire(sequence, reason=None)
        self._scheduler.cache.save_all()
        self._decode(Batch(self._scheduler.cache.take_ops(), ()))
        self._use_disk()

    def _use_disk(self) -> None:
        """Have done what the cache wants of the disk; the backend holds by now what the planned step saved."""
        for op in self._scheduler.cache.take_disk_ops():
            assert self._disk is not None, "without a disk its budget is 0"
            match op:
                case StoreState(state):
                    self._disk.write(state, self._backend.state(state.id), partial(self._on_stored, state))
                case LoadState(state) if not self._backend.has_room(state.size_bytes):
                    self._scheduler.cache.states.unread(state)
                case LoadState(state):
                    self._disk.read(state, partial(self._on_loaded, state))
                case RemoveState(state):
                    self._disk.remove(state.scope, state.tokens)

    def _on_stored(self, state: SavedState, is_stored: bool) -> None:
        self._inbox.put(self._stored, state, is_stored)

    def _on_loaded(self, state: SavedState, data: memoryview | None) -> None:
        self._inbox.put(self._loaded, state, data)

    def _guess(self, step: list[Sequence]) -> None:
        """Have tokens guessed. Beside a prompt none are: its step is long, and what guesses cost in it is not known."""
        if self._speculator is None or not step:
            return
        if any(s.is_prefilling for s in step):
            for sequence in step:
                sequence.draft = []
        else:
            self._speculator.plan(step, costs=self._costs, threads=self._guard.threads)

    def _flush(self) -> None:
        if self._deltas or self._failures:
            deltas, failures, self._deltas, self._failures = self._deltas, self._failures, [], []
            self._sink.deliver(deltas, failures)

    # ------------------------------------------------------------------ inbox

    def _drop(self, request_id: RequestId) -> None:
        self._scheduler.cancel(request_id)
        self._answers.pop(request_id, None)

    def _tell_pins(self, answer: PinsAnswer, remove: str) -> None:
        is_removed = bool(remove) and self._scheduler.cache.unpin(remove)
        answer([_pin_of(s) for s in self._scheduler.cache.states.pins()], is_removed)

    def _stored(self, state: SavedState, is_stored: bool) -> None:
        self._scheduler.cache.states.written(state, is_good=is_stored)
        self._end_pinning()

    def _loaded(self, state: SavedState, data: memoryview | None) -> None:
        if self._scheduler.cache.loaded(state, is_good=data is not None) and data is not None:
            self._backend.put_state(state.id, data)

    def _accept(self, request: Request, arrived: float) -> None:
        try:
            if len(self._scheduler.waiting) >= self._max_queue:
                raise QueueFull(retry_after_s=5)
            if len(request.prompt) + request.max_tokens > self.context_tokens:
                raise ContextOverflow(
                    limit_tokens=self.context_tokens,
                    prompt_tokens=len(request.prompt),
                    completion_tokens=request.max_tokens,
                )
            guide = self._start_guide(request)
            self._load_adapters(request)
            sequence = self._scheduler.add(request)
        except EdgeError as e:
            self._failures.append(Failure(request.id, e))
            return
        sampler = Sampler(request.params, num_prompt=len(request.prompt), breakers=request.breakers)
        num_top, tokenizer = request.params.logprobs, self._backend.tokenizer
        logprobs = None if num_top is None else Logprobs(num_top, tokenizer)
        echo = None if request.echo is None else PromptEcho(request.echo, request.prompt, num_top, tokenizer)
        stops = StopMatcher(request.stop)
        self._answers[request.id] = _Answer(sequence, sampler, stops, arrived, guide, logprobs, echo)
        self._deliver(sequence, *self._append_forced(sequence))

    def _start_guide(self, request: Request) -> Guide | None:
        if request.grammar is None:
            return None
        with self._blaming(request.id):
            return request.grammar.start()

    @contextmanager
    def _blaming(self, request_id: RequestId) -> Generator[None]:
        """A block that is for the observer a step of one request alone: where native code dies of what it brought, it
        is to blame and not who was in the step before."""
        self._guard.begin([request_id], self._scheduler.limits.step_tokens)
        try:
            yield
        finally:
            self._guard.idle()

    def _load_adapters(self, request: Request) -> None:
        """Have a request's adapters in memory as long as it lives; those that nobody uses make room for them."""
        for adapter in request.adapters:
            if self._adapters.use(adapter):
                continue
            holders = [request.adapters, *(a.sequence.request.adapters for a in self._answers.values())]
            leaving = self._adapters.add(adapter, in_use={a.digest for held in holders for a in held})
            for digest in leaving:
                self._backend.free_adapter(digest)
            try:
                with self._blaming(request.id):
                    self._backend.load_adapter(adapter)
            except EdgeError:
                self._adapters.drop(adapter.digest)
                raise

    # ------------------------------------------------------------------ one step

    def _compute(self, batch: Batch) -> None:
        now = self._clock()
        batch = self._with_images(batch)
        self._guard.begin([c.sequence.request.id for c in batch.chunks], batch.num_tokens)
        for chunk in batch.chunks:
            answer = self._answers[chunk.sequence.request.id]
            if answer.started is None:
                answer.started = now
        self._guard.govern(now)
        threads = self._budget.threads = self._guard.threads
        begin = self._clock()
        try:
            logits = self._decode(batch)
            if not batch.chunks:
                return
            seconds = self._clock() - begin
            self._costs.record(batch.num_tokens, threads=threads, seconds=seconds)
            gained = self._book(batch, logits)
            self._pin()
        except StateRefused as e:
            self._start_anew(e)
            return
        except BackendError as e:
            self._fail_all(e)
            return
        self._guard.succeeded()
        if self._speculator is not None and not any(c.num_scored for c in batch.chunks):
            self._speculator.learn(batch, gained, seconds=seconds, costs=self._costs, threads=threads)

    def _decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = self._backend.decode(batch)
        for state_id in self._backend.take_unsaved():
            self._scheduler.cache.states.unsaved(state_id)
        return logits

    def _with_images(self, batch: Batch) -> Batch:
        """The batch without what waits for the encoder, which takes one tile before each step: so who reads images
        delays the others by one tile a step."""
        found = next_unencoded(batch)
        if found is None:
            return batch
        chunk, tile = found
        vision = self._backend.vision
        assert vision is not None, "without one nobody makes tiles"
        # As a step of its request alone, as with an adapter that is loaded.
        self._guard.begin([chunk.sequence.request.id], ENCODING_TOKENS)
        try:
            vision.encode(tile)
        except EdgeError as e:
            self._fail(chunk.sequence, e)
            batch = replace(batch, chunks=tuple(c for c in batch.chunks if c is not chunk))
        return cut(batch)

    def _start_anew(self, error: StateRefused) -> None:
        """A state that the library does not take back is forgotten, its file too, and everybody is computed anew:
        nobody fails for a file."""
        log.warning("%s The cache starts anew.", error)
        self._scheduler.cache.states.discard(error.state)
        self._scheduler.restart()
        self._backend.clear()

    def _fail_all(self, error: BackendError) -> None:
        """A failed step leaves the cache undefined: its requests fail, the cache starts anew."""
        for sequence in list(self._scheduler.running):
            self._scheduler.retire(sequence, reason=None)
            self._answers.pop(sequence.request.id)
            self._failures.append(Failure(sequence.request.id, error))
        self._failures += [Failure(p.request.id, error) for p in self._pinning]
        self._pinning = []
        self._backend.clear()
        self._scheduler.cache.forget()
        self._flush()  # before it may end the engine: who failed is told, and not suspected
        self._guard.failed(error)

    def _book(self, batch: Batch, logits: NDArray[np.float32]) -> list[int]:
        """Draw what a step allows; for each chunk, how many tokens guesses have gained."""
        self._steps += 1
        best: list[TokenId] = logits.argmax(axis=1).tolist() if len(logits) else []
        row, gained = 0, list[int]()
        for chunk in batch.chunks:
            if not chunk.sequence.num_preemptions:
                self._prompt_tokens += max(0, min(len(chunk.tokens), chunk.sequence.num_prompt - chunk.start))
            rows = range(row, row + chunk.num_logits)
            row = rows.stop
            gained.append(self._advance_sequence(chunk, logits, best, rows))
        return gained

    def _advance_sequence(self, chunk: Chunk, logits: NDArray[np.float32], best: list[TokenId], rows: range) -> int:
        """Draw the next token, and one more for each guess that the draw before it confirms.

        A guess never changes what is drawn: each token is drawn from the model's scores after those before it, as
        without guesses (Leviathan et al. 2023, arXiv:2211.17192, for a draft that is certain of its guess).

        Returns:
            The tokens beyond the first, less those that the grammar forced: these come without guesses, too.
        """
        sequence, first = chunk.sequence, len(chunk.sequence.tokens)
        request, answer = sequence.request, self._answers[sequence.request.id]
        rows = self._score_prompt(chunk, logits, rows)
        guesses = chunk.tokens[len(chunk.tokens) - len(rows) + 1 :]
        sequence.draft = []
        text, reason, num_drawn, failure = "", None, 0, None
        try:
            for row in rows if request.max_tokens else ():
                num_drawn += 1
                token = self._draw_reported(sequence, logits[row], best[row])
                more, reason = self._append(sequence, token)
                text += more
                if reason is not None or guesses[num_drawn - 1 : num_drawn] != [token]:
                    break
        except (ConstraintFailed, BackendError) as e:  # of this answer alone: no form, or no score that can be used
            failure = e
        gained = sum(at not in sequence.forced for at in range(first + 1, len(sequence.tokens)))
        num_rejected = len(rows) - max(num_drawn, 1) if rows else 0
        answer.num_accepted += max(0, num_drawn - 1)
        answer.num_rejected += num_rejected
        self._scheduler.update(chunk, num_rejected=num_rejected)
        if failure is not None:
            self._fail(sequence, failure)
        elif rows and not request.max_tokens:
            self._finish(sequence, "", FinishReason.LENGTH)
        elif num_drawn:
            if reason is None:
                more, reason = self._append_forced(sequence)
                text += more
            self._deliver(sequence, text, reason)
        return gained

    def _score_prompt(self, chunk: Chunk, logits: NDArray[np.float32], rows: range) -> range:
        """Note what the model thought of the prompt's own tokens; the rows that are left are drawn from."""
        echo = self._answers[chunk.sequence.request.id].echo
        for i, row in enumerate(rows[: chunk.num_scored]):
            assert echo is not None, "only who asked for the scores has such rows"
            echo.add(logits[row], chunk.start + i + 1)
        return rows[chunk.num_scored :]

    def _draw_reported(self, sequence: Sequence, logits: NDArray[np.float32], best: TokenId) -> TokenId:
        """The next token, and for who asked what the model itself thought of it."""
        answer = self._answers[sequence.request.id]
        if answer.logprobs is None:
            return self._draw(sequence, logits, best)
        scores = logits.copy()
        token = self._draw(sequence, logits, best)
        answer.logprobs.add(scores, token, offset=answer.stops.num_known)
        return token

    def _draw(self, sequence: Sequence, logits: NDArray[np.float32], best: TokenId) -> TokenId:
        """The next token after these scores, which are overwritten, `best` being the best of them."""
        request = sequence.request
        answer = self._answers[request.id]
        guide = answer.guide
        if guide is not None and guide.forced is not None:
            return guide.forced
        if request.ignore_eos and (
            guide is None or guide.is_free
        ):  # forbidden rather than passed over, as llama-server does
            logits[self._eog_tokens] = -np.inf
            best = int(logits.argmax()) if best in self._eog_tokens else best
        # Finding all that is allowed takes ten times as long as asking for the one token that would be drawn.
        if guide is not None and not (request.params.is_greedy and guide.allows(best)):
            guide.mask(logits)
            best = int(logits.argmax())
        if request.params.is_greedy and np.isfinite(logits[best]):
            return best
        return answer.sampler.draw(logits, sequence.tokens)

    def _append(self, sequence: Sequence, token: TokenId) -> tuple[str, FinishReason | None]:
        """Add a token to an answer; the text that became certain, and why the answer ends with it, if it does."""
        request = sequence.request
        answer = self._answers[request.id]
        guide = answer.guide
        if guide is not None:
            if guide.forced is not None:
                sequence.forced.add(len(sequence.tokens))
            guide.consume(token)
        if answer.first_token is None:
            answer.first_token = self._clock()
        sequence.tokens.append(token)
        self._output_tokens += 1
        tokenizer = self._backend.tokenizer
        if token in tokenizer.eog_tokens and not (request.ignore_eos and guide is None):
            return answer.last_text(), FinishReason.STOP
        piece = request.spelled.get(token) or tokenizer.piece(token)
        emission = answer.stops.push(answer.detokenizer.push(piece))
        if emission.stopped:
            return emission.text, FinishReason.STOP
        if guide is not None and guide.is_complete:
            return emission.text + answer.last_text(), FinishReason.STOP
        if sequence.num_output >= request.max_tokens:
            return emission.text + answer.last_text(), FinishReason.LENGTH
        return emission.text, None

    def _append_forced(self, sequence: Sequence) -> tuple[str, FinishReason | None]:
        """Add the tokens that the grammar leaves no choice about: nobody needs the model's scores for them, so the next
        step computes them together (jump-forward, Zheng et al. 2023, arXiv:2312.07104). Who asks for log-probabilities
        does need them; there each is drawn in its turn."""
        text, reason = "", None
        answer = self._answers[sequence.request.id]
        guide = answer.guide if answer.logprobs is None else None
        while guide is not None and reason is None and guide.forced is not None:
            more, reason = self._append(sequence, guide.forced)
            text += more
        return text, reason

    def _deliver(self, sequence: Sequence, text: str, reason: FinishReason | None) -> None:
        if reason is None:
            self._deltas.append(self._delta(self._answers[sequence.request.id], text))
        else:
            self._finish(sequence, text, reason)

    def _fail(self, sequence: Sequence, error: EdgeError) -> None:
        self._scheduler.retire(sequence, reason=None)
        del self._answers[sequence.request.id]
        self._failures.append(Failure(sequence.request.id, error))

    def _finish(self, sequence: Sequence, text: str, reason: FinishReason) -> None:
        answer = self._answers.pop(sequence.request.id)
        now = self._clock()
        started = answer.started or now
        first = max(started, answer.first_token or now)  # what a grammar forces comes before the prompt is read
        timings = Timings(started - answer.arrived, first - started, now - answer.arrived)
        delta = self._delta(answer, text, reason=reason, timings=timings)
        if sequence.request.pin:
            assert sequence.slot is not None, "it was computed in this step"
            self._pinning.append(_Pinning(sequence.slot, sequence.request, delta))
        else:
            self._deltas.append(delta)
        self._scheduler.retire(sequence, reason=reason)

    def _pin(self) -> None:
        """Have the prompts of this step that are to be pinned saved at once: a later step may need their cells."""
        cache = self._scheduler.cache
        new = [p for p in self._pinning if p.state is None]
        for pinning in new:
            pinning.state = cache.pin(cache.slots[pinning.slot], pinning.request.pin)
        if new:
            self._decode(Batch(cache.take_ops(), ()))
            self._end_pinning()

    def _end_pinning(self) -> None:
        """Answer whose prefix is on the disk, or cannot be, or need not be."""
        pinning, self._pinning = self._pinning, []
        for p in pinning:
            if p.state is not None and p.state.on_disk and not p.state.is_written:
                self._pinning.append(p)
            elif (error := self._unpinned(p)) is None:
                self._deltas.append(p.delta)
            else:
                self._failures.append(Failure(p.request.id, error))

    def _unpinned(self, p: _Pinning) -> EdgeError | None:
        """Why a prefix is not pinned, if it is not. One that a restart would drop is not kept where others would be."""
        states = self._scheduler.cache.states
        if p.state is None or not (p.state.in_memory or p.state.on_disk):
            num_tokens = len(p.request.prompt)
            return NoRoomToPin(num_tokens=num_tokens, required_bytes=states.size_bytes(num_tokens))
        if p.state.on_disk or not states.limits.disk_bytes or p.state.pin != p.request.pin:
            return None  # with another name: it was pinned, and another request replaced or removed it since
        self._scheduler.cache.unpin(p.request.pin)
        return BackendError(
            "The prefix could not be written to the disk and is not pinned.",
            hint="The engine's log says why. With EDGE_STATE_DISK_BYTES=0 pins last until the model is unloaded.",
        )

    @staticmethod
    def _delta(
        answer: _Answer, text: str, *, reason: FinishReason | None = None, timings: Timings | None = None
    ) -> Delta:
        sequence = answer.sequence
        delta = Delta(
            sequence.request.id, text, sequence.num_output, sequence.num_prompt, sequence.num_cached, reason, timings,
            logprobs=answer.take_logprobs(text, reason), echo=answer.take_echo(),
        )  # fmt: skip
        if reason is None:
            return delta
        return replace(
            delta, tokens=shown_ids(sequence.tokens) if sequence.request.return_tokens else None,
            num_accepted=answer.num_accepted, num_rejected=answer.num_rejected,
            num_dropped=sequence.request.num_dropped,
            stop=answer.stops.found if reason is FinishReason.STOP else "",
        )  # fmt: skip


def _pin_of(state: SavedState) -> Pin:
    return Pin(state.pin, len(state.tokens), state.size_bytes, state.in_memory, state.is_written, state.uses)
