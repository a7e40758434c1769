"""How the answers of a request come together, and what a stream gets while nothing comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from edge.errors import ModelNotFound
from runtime import wire
from runtime.api.call import Steps, first_of, merged, started


def piece(num_output: int) -> wire.Piece:
    return wire.Piece(1, "a", num_output, 3, 0)


async def begun(steps: Steps, *, patience_s: float) -> Steps:
    """A stream, once it is accepted or the patience is over."""
    return await started(asyncio.create_task(first_of(steps)), steps, patience_s=patience_s)


async def counted(taken: list[int], *, pause_s: float = 0.0, most: int = 1000) -> Steps:
    """Steps that note how many were taken."""
    for i in range(most):
        await asyncio.sleep(pause_s if i == 0 else 0)
        taken.append(i)
        yield [piece(i)]


async def emptied(steps: Steps) -> None:
    async for pieces in steps:
        assert pieces == []


def test_answers_that_nobody_reads_are_not_taken_from_where_they_are_bounded() -> None:
    async def read() -> Sequence[int]:
        taken: list[list[int]] = [[] for _ in range(4)]
        async with aclosing(merged([counted(t) for t in taken])) as answers:
            for _ in range(10):
                await anext(answers)
            for _ in range(500):
                await asyncio.sleep(0)
            return [len(t) for t in taken]

    assert sum(asyncio.run(read())) <= 10 + 4 + 4 + 4


def test_merged_answers_are_whole() -> None:
    async def read() -> list[tuple[int, int]]:
        streams = [counted([], most=50) for _ in range(3)]
        return [(i, p.num_output) async for i, pieces in merged(streams) for p in pieces]

    got = asyncio.run(read())
    assert sorted(got) == [(i, n) for i in range(3) for n in range(50)]
    assert all([n for j, n in got if j == i] == list(range(50)) for i in range(3))


def test_a_stream_that_does_not_begin_gets_signs_of_life_and_then_its_answer() -> None:
    async def read() -> list[list[wire.Piece]]:
        steps = counted([], pause_s=0.05, most=3)
        return [pieces async for pieces in await begun(steps, patience_s=0.005)]

    got = asyncio.run(read())
    assert got[0] == []
    assert [p[0].num_output for p in got if p] == [0, 1, 2]
    assert got[-3:] == [[piece(0)], [piece(1)], [piece(2)]]


def test_what_is_wrong_at_once_is_told_before_the_stream_begins_and_later_in_it() -> None:
    async def fails(pause_s: float) -> Steps:
        await asyncio.sleep(pause_s)
        raise ModelNotFound("none")
        yield []

    async def at_once() -> None:
        with pytest.raises(ModelNotFound):
            await begun(fails(0), patience_s=5)

    async def later() -> None:
        steps = await begun(fails(0.05), patience_s=0.005)
        assert await anext(steps) == []
        with pytest.raises(ModelNotFound):
            await emptied(steps)

    asyncio.run(at_once())
    asyncio.run(later())


def test_a_stream_that_is_left_before_it_begins_is_over() -> None:
    is_ended: list[bool] = []

    async def waits() -> AsyncGenerator[list[wire.Piece]]:
        try:
            await asyncio.sleep(60)
            yield []
        finally:
            is_ended.append(True)

    async def leave() -> None:
        steps = await begun(waits(), patience_s=0.005)
        assert await anext(steps) == []
        await steps.aclose()

    asyncio.run(leave())
    assert is_ended == [True]
