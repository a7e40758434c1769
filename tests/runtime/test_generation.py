"""A request as the front holds it: what failed is forgotten at once, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest

from edge.errors import DoesNotFit, EdgeError, QueueFull, SlowReader, WorkerDied
from runtime import wire
from runtime.generation import HELD_PIECES, Generation
from runtime.request import SamplingParams, TokenLogprob


def a_generation() -> Generation:
    return Generation(wire.Generate(1, None, "Hi", SamplingParams(), 4, []), lambda _: None)


async def read(generation: Generation) -> EdgeError:
    with pytest.raises(WorkerDied) as caught:
        async for _ in generation.steps():
            pass
    return caught.value


def test_a_request_that_failed_is_not_kept_by_its_error() -> None:
    async def fail() -> weakref.ref[Generation]:
        generation = a_generation()
        generation.fail(WorkerDied("m", reason="signal 9"))
        with suppress(WorkerDied):
            async for _ in generation.steps():
                pass
        return weakref.ref(generation)

    gc.disable()
    try:
        assert asyncio.run(fail())() is None
    finally:
        gc.enable()


def test_one_error_of_many_requests_keeps_none_of_them() -> None:
    error = WorkerDied("m", reason="signal 9", hint="Wait.")

    async def fail() -> list[EdgeError]:
        generations = [a_generation() for _ in range(5)]
        for generation in generations:
            generation.fail(error)
        return [await read(generation) for generation in (*generations, generations[0])]

    raised = asyncio.run(fail())
    assert error.__traceback__ is None
    assert [str(e) for e in raised] == [str(error)] * 6
    assert len({id(e) for e in raised}) == 6


def test_a_copy_says_what_the_error_says() -> None:
    for error in (
        QueueFull(retry_after_s=5), DoesNotFit("It", required_bytes=2, available_bytes=1), WorkerDied("m", reason="r"),
    ):  # fmt: skip
        try:
            raise error
        except EdgeError as e:
            copy = e.copy()
        assert type(copy) is type(error)
        assert (copy.args, vars(copy), copy.__traceback__) == (error.args, vars(error), None)


def piece(num_output: int, *, finish: bool = False, top: int = 0) -> wire.Piece:
    logprobs = (TokenLogprob(b"a", -1.0, ((b"a", -1.0),) * top, 0),) if top else None
    return wire.Piece(1, "a", num_output, 3, 0, "stop" if finish else None, logprobs=logprobs)


def test_who_reads_far_too_slowly_loses_the_rest_and_the_engine_is_freed() -> None:
    async def lag(top: int) -> tuple[int, list[int]]:
        cancelled: list[int] = []
        generation = Generation(wire.Generate(1, None, "Hi", SamplingParams(), 4, []), cancelled.append)
        num_pushed = 0
        while not cancelled:
            generation.push(piece(num_pushed := num_pushed + 1, top=top))
        steps = generation.steps()
        read = await anext(steps)
        with pytest.raises(SlowReader):
            await anext(steps)
        assert len(read) == num_pushed == generation.num_output, "what was held is read, and all is counted"
        return num_pushed, cancelled

    plain, cancelled = asyncio.run(lag(0))
    assert cancelled == [1]
    assert 10_000 < plain < 20_000
    assert asyncio.run(lag(20))[0] < 2000


def test_who_reads_may_read_for_ever() -> None:
    async def keep_up() -> int:
        generation, num_read = a_generation(), 0
        steps = generation.steps()
        for i in range(200):
            for j in range(200):
                generation.push(piece(200 * i + j, finish=i == j == 199))
            num_read += len(await anext(steps))
        return num_read

    assert asyncio.run(keep_up()) == 40_000


def test_the_engine_waits_for_who_does_not_read_and_goes_on_when_he_does() -> None:
    async def stall() -> list[tuple[int, bool]]:
        told: list[tuple[int, bool]] = []
        message = wire.Generate(1, None, "Hi", SamplingParams(), 4, [])
        generation = Generation(message, lambda _: None, lambda i, is_held: told.append((i, is_held)))
        for i in range(3 * HELD_PIECES):
            generation.push(piece(i + 1))
        assert generation.is_held
        steps = generation.steps()
        await anext(steps)
        assert not generation.is_held
        for i in range(HELD_PIECES):
            generation.push(piece(i + 1, finish=i == HELD_PIECES - 1))
        await anext(steps)
        return told

    assert asyncio.run(stall()) == [(1, True), (1, False)], "what is over needs nobody to wait"
