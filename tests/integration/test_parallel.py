"""Many streams at once answer as each does alone, and clients that leave take nothing with them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import SCHEMA, json_schema
from tests.support import (
    DEFAULT_MODEL,
    GreedyLaw,
    RunningAppliance,
    chat_body,
    model_info,
    running_appliance,
    sse_events,
    wait_until,
)

CHAT = "/v1/chat/completions"
TOPICS = ("rain", "bread", "the sea", "bicycles", "winter", "a small dog", "glass", "music")
BRIEF = "You are the assistant of a harbour, and answer in one sentence. " * 6
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object", "properties": {"mood": {"enum": ["glad", "sad"]}}, "required": ["mood"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
CALLS = frozenset({'note {"mood":"glad"}', 'note {"mood":"sad"}'})
NUM_STREAMS = 32
NUM_LEAVING = 100


def mixed(number: int) -> dict[str, Any]:
    """A streamed request: plain, with a form, two answers, behind a shared prefix, with a tool."""
    body = chat_body(f"Write one sentence about {TOPICS[number % 8]}, number {number}.", max_tokens=24, stream=True)
    match number % 5:
        case 0:
            return body | {"response_format": json_schema(SCHEMA)}
        case 1:
            return body | {"n": 2}
        case 2:
            return body | {"messages": [{"role": "system", "content": BRIEF}, *body["messages"]]}
        case 3:
            return body | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        case _:
            return body


def texts_of(appliance: RunningAppliance, body: dict[str, Any]) -> list[str]:
    """The texts of the answers to a streamed request, or the calls of each."""
    texts: dict[int, str] = {}
    with appliance.client() as http, http.stream("POST", CHAT, json=body) as reply:
        for event in sse_events(reply.raise_for_status().iter_lines()):
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + text_of(choice["delta"])
    return [texts[index] for index in sorted(texts)]


def text_of(delta: dict[str, Any]) -> str:
    calls = [call["function"] for call in delta.get("tool_calls", [])]
    return (delta.get("content") or "") + "".join(
        (f"{call['name']} " if "name" in call else "") + call.get("arguments", "") for call in calls
    )


def prompt_of(appliance: RunningAppliance, body: dict[str, Any]) -> list[int]:
    """The tokens of its prompt."""
    asked = {"model": DEFAULT_MODEL, "messages": body["messages"], "max_tokens": 1, "return_token_ids": True}
    with appliance.client() as http:
        return http.post(CHAT, json=asked).raise_for_status().json()["prompt_token_ids"]


def parts_at_a_near_tie(law: GreedyLaw, prompt: list[int], one: str, other: str) -> bool:
    """Whether two greedy answers, perhaps of a form, go on alike until two tokens that are about equally good."""
    tokenizer = law.backend.tokenizer
    end = min(tokenizer.eog_tokens)
    ours, theirs = ([*tokenizer.encode(t, add_special=False, parse_special=False), end] for t in (one, other))
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    after = law.scores([*prompt, *ours[:at]])[-1]
    return abs(float(after[ours[at]] - after[theirs[at]])) <= law.epsilon


def test_32_mixed_streams_answer_as_each_does_alone(appliance: RunningAppliance, law: GreedyLaw) -> None:
    bodies = [mixed(number) for number in range(NUM_STREAMS)]
    alone = [texts_of(appliance, body) for body in bodies]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        together = list(pool.map(partial(texts_of, appliance), bodies))
    pairs = [
        (body, a, b) for body, one, many in zip(bodies, alone, together, strict=True)
        for a, b in zip(one, many, strict=True)
    ]  # fmt: skip
    calls = [text.replace(": ", ":") for body, *texts in pairs if "tools" in body for text in texts]
    assert calls
    assert CALLS.issuperset(calls), "nobody is told the text of a call: one that parts is held to its form"
    parted = [(body, a, b) for body, a, b in pairs if a != b and "tools" not in body]
    print(f"greedy law: {sum(a == b for _, a, b in pairs)} of {len(pairs)} answers equal, epsilon {law.epsilon:.3f}")
    assert all(parts_at_a_near_tie(law, prompt_of(appliance, body), a, b) for body, a, b in parted)


def leave(appliance: RunningAppliance, number: int) -> None:
    """Send a request and go away: in its head or body, before the answer, or after some of it."""
    rng = random.Random(number)
    asked = chat_body(f"Tell story {number}.", max_tokens=2000, ignore_eos=True)
    body = json.dumps(asked | {"stream": rng.random() < 0.7, "n": rng.choice((1, 1, 2))}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", appliance.port), timeout=20) as connection:
        whole = head + body
        sent = whole[: rng.randrange(1, len(whole))] if rng.random() < 0.2 else whole
        connection.sendall(sent)
        connection.settimeout(rng.choice((0.01, 0.1, 1.0)))
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(rng.randrange(6)):
                if not connection.recv(256):
                    return
        if rng.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def held(pid: int) -> tuple[int, int]:
    """Threads and open files of a process."""
    process = psutil.Process(pid)
    return process.num_threads(), process.num_fds()


def test_100_clients_that_leave_leave_nothing_behind(tmp_path: Path) -> None:
    with running_appliance(tmp_path / "home", "--context-tokens", "4096", "--max-sequences", "8") as appliance:
        warm = [chat_body(f"Count to {i}.", max_tokens=2) for i in range(24)]

        def ask(body: dict[str, Any]) -> int:
            with appliance.client() as http:
                return http.post(CHAT, json=body).status_code

        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(ask, warm)) == {200}
        (worker,) = appliance.worker_pids()
        front = psutil.Process(appliance.process.pid)
        wait_until(lambda: any(f.path.endswith("state.db") for f in front.open_files()), what="usage to be written")
        before = {pid: held(pid) for pid in (appliance.process.pid, worker)}
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(partial(leave, appliance), range(NUM_LEAVING)))
        with appliance.client() as http:
            wait_until(lambda: is_quiet(model_info(http)), what="every request to be dropped")
        for pid, (threads, files) in before.items():
            wait_until(lambda pid=pid, files=files: held(pid)[1] <= files, what="files to be closed")
            # asyncio's executor begins threads as it needs them, up to this; of a leak there would be a hundred
            assert held(pid)[0] <= threads + (os.cpu_count() or 1) + 4
        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(ask, warm)) == {200}, "every slot is free"
        assert appliance.worker_pids() == [worker]


def is_quiet(info: dict[str, Any]) -> bool:
    return not info["requests_active"] and not info["requests_waiting"]
