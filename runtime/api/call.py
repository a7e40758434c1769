"""One request through the appliance."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.types import Receive

from edge.errors import EdgeError, InvalidRequest, WorkerDied
from edge.store.details import ModelDetails
from edge.telemetry.span import Operation, RequestRecord
from runtime import wire
from runtime.api.access import UNSTATED_TOKENS, tokens_of
from runtime.api.appliance import Appliance
from runtime.api.guard import meter_of
from runtime.api.openai_schema import OutputDetails, SamplingFields, TokenDetails, Usage
from runtime.api.responses import until_disconnect
from runtime.api.tools import Promise, kept
from runtime.generation import SILENCE_S, Generation
from runtime.host import ModelHost
from runtime.pool import READY_WAIT_S
from runtime.request import Adapter, Constraint, SamplingParams
from runtime.selection import Selection

MAX_ATTEMPTS = 3
"""How often a request is given to the engine, where that ends before anything of the answer was passed on."""

_PREFIXES: dict[Operation, str] = {
    "chat": "chatcmpl",
    "text_completion": "cmpl",
    "embeddings": "embd",
    "rerank": "rerank",
    "count": "count",
    "tokenize": "tokens",
}
HttpRequest = Request[object, object, State]
Make = Callable[[int, SamplingParams], wire.Ask]
Steps = AsyncGenerator[list[wire.Piece]]


class Call:
    """Its identity, its way into the engine, and its telemetry record. Each of `n` answers has its own: the engine
    sees `n` requests.

    Args:
        prompt_number: Which of the prompts it is the answer to.
        draw: Which of the answers to that.
        promise: What is checked before the answer ends.
        first_image: Where in the request its first image stands; empty where it has none.
    """

    def __init__(
        self, appliance: Appliance, http: HttpRequest, body: SamplingFields, *, operation: Operation, max_tokens: int,
        prompt_number: int = 0, draw: int = 0, promise: Promise | None = None, first_image: str = "",
    ) -> None:  # fmt: skip
        self._promise = promise
        self._first_image = first_image
        self.appliance = appliance
        self.body = body
        self.prompt_number = prompt_number
        self._draw = draw
        self.index = prompt_number * body.num_draws + draw
        meter = meter_of(http.scope)
        meter.answers.append(self)
        if operation in ("chat", "text_completion"):
            meter.hold(max_tokens or UNSTATED_TOKENS)
        self.caller = meter.caller
        self.error_type: str | None = None
        """Code of what ended it before its end; set when it is over."""
        self.known_model = ""
        """The model's whole name, once it is found."""
        self.operation: Operation = operation
        self.max_tokens = max_tokens
        self.stream = bool(body.stream)
        self.id = f"{_PREFIXES[operation]}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = body.model
        self.fingerprint = ""
        self._trace_parent = http.headers.get("traceparent")
        self._started_ns = time.time_ns()
        self._started = time.perf_counter()
        self.allowed_s = min(body.timeout_s or math.inf, appliance.settings.request_timeout_s)
        self._first_token: float | None = None
        self._last: wire.Piece | None = None
        self.params = SamplingParams()
        """How its tokens are drawn, once it is started."""
        self._generation: Generation | None = None
        self._finished = False
        self._first: asyncio.Task[list[wire.Piece]] | None = None
        self.load_s = 0.0
        """How long it waited for its model to be loaded."""
        self.host: ModelHost | None = None
        """Of the model, once it is loaded."""

    @property
    def constraint(self) -> Constraint | None:
        """The form that the answer shall have, for the decoder."""
        structure = self._promise.structure if self._promise is not None else None
        return structure.constraint if structure is not None else None

    async def start(self, make: Make) -> Steps:
        """Hand the request to the engine and wait until it is accepted. A stream begins without that after `SILENCE_S`,
        with pings, so that nobody on the way takes it for dead; its status is spent then.

        Args:
            make: The request under an id, with these sampling parameters.

        Returns:
            What each step gives, to be read to its end or closed.

        Raises:
            EdgeError: The model cannot be had, or the engine refuses the request.
        """
        try:
            steps = self._steps(make)
            if self._promise is not None:
                steps = kept(steps, self._promise)
            self._first = asyncio.create_task(first_of(steps))
            return await started(self._first, steps, patience_s=SILENCE_S if self.stream else None)
        except BaseException as e:
            self.finish(e)
            raise

    async def _steps(self, make: Make) -> AsyncGenerator[list[wire.Piece]]:
        """What each step gives. Where the engine ends, for another's fault most likely, and nothing of the answer was
        passed on yet, the request starts again; so an answer that is not streamed comes in one piece."""
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            is_passed_on = False
            held: list[wire.Piece] = []
            try:
                async with contextlib.aclosing(self._watched(await self._submit(make))) as steps:
                    async for pieces in steps:
                        if self.stream:
                            is_passed_on = is_passed_on or any(p.num_output or p.echo for p in pieces)
                            yield pieces
                        else:
                            held += pieces
            except WorkerDied:
                if is_passed_on or not attempts_left:
                    raise
            else:
                if held:
                    yield held
                return

    async def _submit(self, make: Make) -> Generation:
        wanted = [(asked.name, asked.scale) for asked in self.body.lora or ()]
        limits = self.caller.limits
        await self.appliance.check_allowed(limits, self.body.model, *(name for name, _ in wanted))
        selection = await self.appliance.pool.select(self.body.model, wanted)
        self.known_model = await self.appliance.check_purpose(selection.model, self.operation, limits)
        if self._first_image:
            await self.appliance.check_vision(selection.model, limits, field=self._first_image)
        asked_for = time.perf_counter()
        wait_s = min(READY_WAIT_S, self._left_s())
        host = await self.appliance.pool.ready(
            selection.model, timeout_s=wait_s, tenant=self.caller.id, may_make_room=not self.caller.is_background
        )
        self.load_s += time.perf_counter() - asked_for
        if selection.digest not in (None, host.model.digest):
            raise WorkerDied(host.ref, reason="another version took its place")
        self._adopt(host, selection)
        params = self.body.params(host.model.details.sampling)
        if params.seed is not None:
            params = dataclasses.replace(params, seed=params.seed + self._draw)
        self.params = params
        self._generation = await host.start(
            lambda request_id: _completed(make(request_id, params), selection.adapters, host.model.details),
            timeout_s=self._left_s(),
            allowed_s=self.allowed_s,
            tenant=self.caller.id,
        )
        return self._generation

    def _left_s(self) -> float:
        return max(0.0, self.allowed_s - (time.perf_counter() - self._started))

    def _adopt(self, host: ModelHost, selection: Selection) -> None:
        self.host = host
        self.model = selection.name or host.ref
        self.fingerprint = f"fp_{host.model.digest.hex[:12]}"

    async def _watched(self, generation: Generation) -> AsyncGenerator[list[wire.Piece]]:
        async for pieces in generation.steps():
            if pieces:
                self._last = pieces[-1]
                if self._first_token is None and pieces[-1].num_output:
                    self._first_token = time.perf_counter()
            yield pieces

    @property
    def last(self) -> wire.Piece | None:
        """What came last."""
        return self._last

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of the prompt, those of it that were cached, and of the answer, so far: also those that nobody read."""
        p, written = self._last, self._generation.num_output if self._generation is not None else 0
        return (p.num_prompt, p.num_cached, max(p.num_output, written)) if p else (0, 0, written)

    def rows(self) -> tuple[bytes, tuple[int, ...]]:
        """What became of the texts of an `Embed`, and which were cut, once the answer is there."""
        p = self._last
        assert p is not None
        assert p.rows is not None
        return p.rows, p.truncated

    def prompt_ids(self) -> list[int] | msgspec.UnsetType:
        """Token ids of the prompt, once the answer is over and if they were asked for."""
        p = self._last
        return list(p.tokens[: p.num_prompt]) if p and p.tokens is not None else msgspec.UNSET

    def answer_ids(self) -> list[int] | msgspec.UnsetType:
        """Token ids of the answer, likewise."""
        p = self._last
        return list(p.tokens[p.num_prompt :]) if p and p.tokens is not None else msgspec.UNSET

    def finish(self, error: BaseException | None) -> None:
        """End the request in the engine if it is still there, and record it. Only the first call does anything."""
        if self._finished:
            return
        self._finished = True
        if self._first is not None:
            self._first.cancel()  # where the client left while the model was loaded
            self._first = None
        if self._generation is not None:
            self._generation.cancel()
        p = self._last
        self.error_type = _error_type(error, finished=bool(p and p.finish_reason))
        ended = time.perf_counter()
        self.appliance.record(
            RequestRecord(
                operation=self.operation,
                request_model=self.body.model,
                response_model=self.model,
                known_model=self.known_model,
                started_unix_ns=self._started_ns,
                duration_s=ended - self._started,
                queue_s=p.queue_s if p else 0.0,
                prefill_s=p.prefill_s if p else 0.0,
                ttft_s=self._first_token - self._started if self._first_token else None,
                input_tokens=p.num_prompt if p else 0,
                output_tokens=p.num_output if p else 0,
                cached_tokens=p.num_cached if p else 0,
                finish_reasons=(p.finish_reason,) if p and p.finish_reason else (),
                response_id=self.id,
                stream=self.stream,
                error_type=self.error_type,
                temperature=self.body.temperature,
                top_p=self.body.top_p,
                max_tokens=self.max_tokens or None,
                seed=self.body.seed,
                trace_parent=self._trace_parent,
                key_id=self.caller.id or None,
            )
        )


async def start_all(calls: Sequence[Call], receive: Receive, make: Make) -> list[Steps]:
    """Start the answers of one request together, so that they read its prompt once; see :meth:`Call.start`.

    Raises:
        EdgeError: One of them cannot start, or the client goes away; then none goes on.
    """
    return await start_each(calls, receive, [make] * len(calls))


async def start_each(calls: Sequence[Call], receive: Receive, makes: Sequence[Make]) -> list[Steps]:
    """The same for answers to several prompts: how each is asked for."""
    return await until_disconnect(receive, _start_each(calls, makes))


async def _start_each(calls: Sequence[Call], makes: Sequence[Make]) -> list[Steps]:
    tasks = [asyncio.create_task(c.start(make)) for c, make in zip(calls, makes, strict=True)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException as e:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for call in calls:
            call.finish(e)
        raise


async def merged(streams: Sequence[Steps]) -> AsyncGenerator[tuple[int, list[wire.Piece]]]:
    """What each step gives which of the answers, until all are over; the first error ends all."""
    if len(streams) == 1:
        async for pieces in streams[0]:
            yield 0, pieces
        return
    arrived: asyncio.Queue[tuple[int, list[wire.Piece]] | None] = asyncio.Queue()
    room = asyncio.Semaphore(len(streams))  # where nobody reads, what waits is held, and bounded, in one place

    async def forward(index: int, steps: Steps) -> None:
        async with contextlib.aclosing(steps):
            async for pieces in steps:
                await room.acquire()
                arrived.put_nowait((index, pieces))

    tasks = [asyncio.create_task(forward(i, s)) for i, s in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        for _ in streams:
            while (item := await arrived.get()) is not None:
                room.release()
                yield item
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(calls: Sequence[Call]) -> Usage:
    """Tokens so far: of each prompt, which its answers share, once; of the answers together."""
    last = [c.last for c in calls if c.last is not None]
    firsts = {c.prompt_number: c.last for c in reversed(calls) if c.last is not None}.values()
    prompt, cached, output = tokens_of(calls)
    thinks = any(c.host is not None and c.host.ready is not None and c.host.ready.thinks for c in calls)
    thought = sum(p.num_reasoning for p in last)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=TokenDetails(
            cached_tokens=cached, dropped_tokens=sum(p.num_dropped for p in firsts) or msgspec.UNSET
        ),
        completion_tokens_details=OutputDetails(
            reasoning_tokens=thought if thinks else msgspec.UNSET,
            accepted_prediction_tokens=sum(p.num_accepted for p in last),
            rejected_prediction_tokens=sum(p.num_rejected for p in last),
        ),
    )


def _completed(message: wire.Ask, adapters: tuple[Adapter, ...], details: ModelDetails) -> wire.Ask:
    """The request with its adapters; what it leaves open is as the model's package says."""
    match message:
        case wire.Embed() if adapters:
            raise InvalidRequest("Adapters change models that make text, and no others.", field="model")
        case wire.Embed() | wire.Spell():
            return message
        case wire.Render():
            return msgspec.structs.replace(message, asked=_filled(message.asked, adapters, details))
        case wire.Generate():
            return _filled(message, adapters, details)


def _filled(message: wire.Generate, adapters: tuple[Adapter, ...], details: ModelDetails) -> wire.Generate:
    messages, advised = message.messages, details.sampling
    if messages is not None and details.system and all(m.role != "system" for m in messages):
        messages = [wire.ChatMessage("system", details.system), *messages]
    return msgspec.structs.replace(
        message,
        adapters=adapters,
        messages=messages,
        stop=message.stop or [*(advised.stop or ())],
        max_tokens=message.max_tokens or advised.max_tokens or 0,
        cuts_max_tokens=message.cuts_max_tokens or not message.max_tokens,
    )


def _error_type(error: BaseException | None, *, finished: bool) -> str | None:
    if isinstance(error, EdgeError):
        return error.code
    if error is not None:
        return "cancelled" if not isinstance(error, Exception) or isinstance(error, GeneratorExit) else "internal_error"
    return None if finished else "cancelled"


async def first_of(steps: Steps) -> list[wire.Piece]:
    """What comes first, but for signs of life."""
    while not (first := await anext(steps)):
        pass
    return first


async def started(first: asyncio.Task[list[wire.Piece]], steps: Steps, *, patience_s: float | None) -> Steps:
    """The steps, once the engine accepted the request, which the first tells, or has not for so long."""
    try:
        await asyncio.wait({first}, timeout=patience_s)
        return _with_first(first.result(), steps) if first.done() else _late(first, steps, every_s=patience_s)
    finally:
        del first  # else its error would hold this frame, which holds it


async def _late(first: asyncio.Task[list[wire.Piece]], steps: Steps, *, every_s: float | None) -> Steps:
    """Nothing again and again while the first is awaited, then as it comes."""
    async with contextlib.aclosing(steps):
        try:
            while not first.done():
                yield []
                await asyncio.wait({first}, timeout=every_s)
            yield first.result()
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            del first  # as above
        async for pieces in steps:
            yield pieces


async def _with_first(
    first: list[wire.Piece], rest: AsyncGenerator[list[wire.Piece]]
) -> AsyncGenerator[list[wire.Piece]]:
    async with contextlib.aclosing(rest):
        yield first
        async for pieces in rest:
            yield pieces
