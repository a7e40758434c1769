"""The load generator against a small server that speaks as the real ones do, and as they should not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from benchmarks.loadgen import run
from benchmarks.plan import Answer, Ask, Outcome, Plan

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Reply = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def text_event(text: str) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "text": text}]}) + b"\n\n"


COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
USAGE = b"data: " + msgspec.json.encode({"choices": [], "usage": COUNTS}) + b"\n\n"
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(reply: Reply) -> AsyncGenerator[int]:
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            body = msgspec.json.decode(await reader.readexactly(length), type=dict[str, object])
            await reply(body, writer)
        finally:
            writer.close()
            await asyncio.wait([asyncio.ensure_future(writer.wait_closed())])

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.create_task(handle(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port: int = server.sockets[0].getsockname()[1]
        yield port
        for task in handlers:
            task.cancel()
        await asyncio.wait(handlers)


async def outcome_of(reply: Reply, clients: list[list[Ask]], *, limit_s: float = 5.0) -> Outcome:
    async with serving(reply) as port:
        return await run(Plan(port, "m", clients, limit_s))


async def answer_of(reply: Reply, **how: float) -> Answer:
    return (await outcome_of(reply, [[Ask("hello", 3)]], **how)).answers[0]


async def test_reads_a_stream_of_events() -> None:
    async def reply(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("hello", 3, True, 0)
        writer.write(HEAD + chunk(text_event("")) + chunk(text_event("a")))
        await asyncio.sleep(0.05)
        writer.write(chunk(text_event("b") + text_event("ö")) + chunk(USAGE + DONE) + b"0\r\n\r\n")

    answer = await answer_of(reply)
    assert (answer.text, answer.num_prompt, answer.num_cached, answer.num_output) == ("abö", 7, 2, 3)
    assert not answer.error
    assert len(answer.arrivals) == 3, "an event without text is no token"
    assert answer.gaps_s[0] >= 0.04
    assert answer.gaps_s[1] < 0.04


async def test_events_may_be_cut_anywhere() -> None:
    stream = text_event("a") + text_event("b") + USAGE + DONE

    async def reply(_body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        pieces = [stream[i : i + 7] for i in range(0, len(stream), 7)]
        writer.write(HEAD + b"".join(map(chunk, pieces)) + b"0\r\n\r\n")

    assert (await answer_of(reply)).text == "ab"


async def test_a_conversation_carries_its_history() -> None:
    seen: list[object] = []

    async def reply(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        seen.append(body["messages"])
        event = msgspec.json.encode({"choices": [{"delta": {"content": f"answer {len(seen)}"}}]})
        writer.write(HEAD + chunk(b"data: " + event + b"\n\n" + DONE) + b"0\r\n\r\n")

    await outcome_of(reply, [[Ask("one", 3, is_turn=True), Ask("two", 3, is_turn=True)]])
    first = {"role": "user", "content": "one"}
    assert seen == [
        [first],
        [first, {"role": "assistant", "content": "answer 1"}, {"role": "user", "content": "two"}],
    ]


async def test_what_takes_too_long_is_cut_off_and_counts_as_it_is() -> None:
    async def reply(_body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(text_event("a")))
        await asyncio.sleep(1.0)

    outcome = await outcome_of(reply, [[Ask("hello", 3), Ask("never sent", 3)]], limit_s=0.2)
    assert [(a.text, a.num_output, a.error) for a in outcome.answers] == [("a", 1, "cut off after 0.2 s")]
    assert outcome.wall_s < 0.8


async def test_errors_are_told() -> None:
    async def refuse(_body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 7\r\n\r\nloading")

    async def fail(_body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(b'data: {"error":{"message":"broken"}}\n\n') + b"0\r\n\r\n")

    async def hang_up(_body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"ff\r\nda")

    assert "503: loading" in (await answer_of(refuse)).error
    assert "broken" in (await answer_of(fail)).error
    assert "IncompleteRead" in (await answer_of(hang_up)).error
