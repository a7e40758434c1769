"""The load generator: a process of its own, `python -m benchmarks.loadgen`, a Plan on stdin, an Outcome on stdout.

Raw HTTP/1.1 over asyncio streams: it shares two cores with the server that it measures, so it decodes nothing until a
request is over. Loopback only.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec

from .plan import MAX_CLIENTS, MAX_REQUESTS, Answer, Ask, Outcome, Plan

HOST = "127.0.0.1"
MAX_CHUNK_BYTES = 1 << 20
MAX_EVENTS = 1 << 16


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def added(self) -> str:
        return self.text or (self.delta.content if self.delta else None) or ""


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode_event = msgspec.json.Decoder(_Event).decode


class BadResponse(Exception):
    """The server answered with something else than a stream of events."""


@dataclass(slots=True)
class _Received:
    """The events of one answer, not yet looked into."""

    sent_s: float
    events: list[tuple[float, bytes]] = field(default_factory=list[tuple[float, bytes]])
    error: str = ""


def _is_chat(ask: Ask) -> bool:
    return ask.is_turn or bool(ask.schema)


def body_of(ask: Ask, model: str, history: list[dict[str, str]]) -> bytes:
    """The JSON of a request: greedy, streamed, of a fixed length unless it may end. The same for every server."""
    prompt = {"messages": [*history, {"role": "user", "content": ask.text}]} if _is_chat(ask) else {"prompt": ask.text}
    schema = {"name": "answer", "strict": True, "schema": msgspec.Raw(ask.schema.encode())}
    form = {"response_format": {"type": "json_schema", "json_schema": schema}} if ask.schema else {}
    return msgspec.json.encode(
        {"model": model, **prompt, "max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": not ask.may_end,
         "stream": True,
         "stream_options": {"include_usage": True}, **form}
    )  # fmt: skip


def head_of(ask: Ask, port: int, length: int) -> bytes:
    """The request line and headers."""
    path = "/v1/chat/completions" if _is_chat(ask) else "/v1/completions"
    return (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, with names in lower case.

    Raises:
        BadResponse: It is not HTTP.
    """
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = lines[0].split(" ", 2)
    if len(fields) < 2 or not fields[1].isdecimal():
        raise BadResponse(f"not HTTP: {lines[0][:80]!r}")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(fields[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes]:
    """The body, in the pieces in which it came (RFC 9112, section 7.1)."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        while data := await reader.read(1 << 16):
            yield data
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        if size > MAX_CHUNK_BYTES:
            raise BadResponse(f"a chunk of {size} bytes")
        yield (await reader.readexactly(size + 2))[:-2]


async def _exchange(plan: Plan, ask: Ask, history: list[dict[str, str]], received: _Received, start: float) -> None:
    reader, writer = await asyncio.open_connection(HOST, plan.port, limit=MAX_CHUNK_BYTES)
    try:
        body = body_of(ask, plan.model, history)
        writer.write(head_of(ask, plan.port, len(body)) + body)
        status, headers = await read_head(reader)
        rest = b""
        async for data in read_body(reader, headers):
            now = time.perf_counter() - start
            *whole, rest = (rest + data).split(b"\n\n")
            received.events += [(now, e[6:]) for e in whole if e.startswith(b"data: ")]
            if len(received.events) > MAX_EVENTS:
                raise BadResponse("more events than tokens were asked for")
        if status != 200:
            raise BadResponse(f"status {status}: {rest[:300].decode('utf-8', 'replace')}")
    finally:
        writer.close()


def answer_of(client: int, received: _Received) -> Answer:
    """Look into the events."""
    arrivals, texts, usage, error = list[float](), list[str](), _Usage(), received.error
    for at, data in received.events:
        if data.strip() == b"[DONE]":
            continue
        event = _decode_event(data)
        usage = event.usage or usage
        error = error or bytes(event.error).decode("utf-8", "replace")[:300]
        if text := "".join(c.added for c in event.choices):
            arrivals.append(at)
            texts.append(text)
    details = usage.prompt_tokens_details or _Details()
    return Answer(
        client, received.sent_s, arrivals, "".join(texts), usage.prompt_tokens, details.cached_tokens,
        usage.completion_tokens or len(arrivals), error,
    )  # fmt: skip


async def _client(plan: Plan, number: int, start: float, answers: list[Answer]) -> None:
    history: list[dict[str, str]] = []
    for ask in plan.clients[number]:
        received = _Received(time.perf_counter() - start)
        try:
            async with asyncio.timeout(max(0.01, plan.limit_s - received.sent_s)):
                await _exchange(plan, ask, history, received, start)
        except TimeoutError:
            received.error = f"cut off after {plan.limit_s:g} s"
        except (OSError, EOFError, ValueError, BadResponse) as e:
            received.error = f"{type(e).__name__}: {e}"
        answer = answer_of(number, received)
        answers.append(answer)
        if answer.error:
            return
        if ask.is_turn:
            history += [{"role": "user", "content": ask.text}, {"role": "assistant", "content": answer.text}]


async def run(plan: Plan) -> Outcome:
    """Send a plan's requests and wait for their answers, at most `plan.limit_s`.

    Raises:
        ValueError: The plan is larger than `MAX_CLIENTS` and `MAX_REQUESTS` allow.
    """
    if len(plan.clients) > MAX_CLIENTS or sum(map(len, plan.clients)) > MAX_REQUESTS:
        raise ValueError(f"at most {MAX_CLIENTS} clients and {MAX_REQUESTS} requests")
    answers: list[list[Answer]] = [[] for _ in plan.clients]
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, mine in enumerate(answers):
            group.create_task(_client(plan, number, start, mine))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    flat = [a for mine in answers for a in mine]
    return Outcome(flat, time.perf_counter() - start, usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Read the plan, run it, write the outcome."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(run(plan))))


if __name__ == "__main__":
    main()
