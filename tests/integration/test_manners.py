"""Manners under pressure: the real appliance beside clients that never read, never ask, or are half gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from edge.access.keys import Keys, Limits
from tests.support import RunningAppliance, chat_body, model_info, run_edge, running_appliance, sse_events, wait_until

CHAT = "/v1/chat/completions"
NUM_SLOW, NUM_HALF_CLOSED, ROUNDS = 200, 50, 3
MAX_GROWTH_BYTES = 6 << 20
"""Of the front between the first and the last round: less than 250 connections would keep."""


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance that waits for nobody for more than two seconds."""
    home = tmp_path_factory.mktemp("strict")
    with running_appliance(home, EDGE_HEAD_TIMEOUT_S="2", EDGE_STALL_TIMEOUT_S="1") as running:
        yield running


def raw_socket(appliance: RunningAppliance, sent: bytes, stack: ExitStack, *, buffer_bytes: int = 0) -> socket.socket:
    """A connection on which so much was sent."""
    sock = stack.enter_context(socket.socket())
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", appliance.port))
    sock.sendall(sent)
    return sock


def received(sock: socket.socket, end: bytes) -> bytes:
    """What comes, up to these bytes."""
    got = b""
    while not got.endswith(end):
        part = sock.recv(1 << 16)
        assert part, got
        got += part
    return got


def raw_post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


LONG = chat_body("Write.", max_tokens=7000, stream=True, ignore_eos=True, logprobs=True, top_logprobs=20)
"""An answer of some 20 MB."""


def attack(appliance: RunningAppliance, stack: ExitStack) -> None:
    """One client that never reads, 200 that never say what they want, 50 that are half gone."""
    raw_socket(appliance, raw_post(LONG), stack, buffer_bytes=4096)
    for _ in range(NUM_SLOW):
        raw_socket(appliance, b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", stack)
    for i in range(NUM_HALF_CLOSED):
        sent = (b"", b"GET /livez HTTP/1.1\r\nHo", raw_post(chat_body("Hi", max_tokens=500)))[i % 3]
        raw_socket(appliance, sent, stack).shutdown(socket.SHUT_WR)


def test_a_normal_client_is_served_beside_those_without_manners_and_nothing_of_them_is_left(
    strict: RunningAppliance,
) -> None:
    front = psutil.Process(strict.process.pid)
    sizes: list[int] = []

    def num_open() -> int:
        return sum(c.status != psutil.CONN_LISTEN for c in front.net_connections("tcp"))

    def is_calm() -> bool:
        with strict.client() as http:
            info = model_info(http)
            active = http.get("/edge/v1/status").json()["requests_active"]
            return active == 0 and info["state"] == "ready"

    with strict.client() as http:
        http.post(CHAT, json=chat_body("Hi", max_tokens=2)).raise_for_status()
    left: list[tuple[int, int]] = []
    for _ in range(ROUNDS):
        with ExitStack() as stack, strict.client() as http:
            attack(strict, stack)
            assert num_open() > 1
            for _ in range(3):
                assert http.post(CHAT, json=chat_body("Hi", max_tokens=2)).status_code == 200
            # Here they are still open: it is the appliance that ends them.
            wait_until(lambda: num_open() <= 1, timeout_s=90, what="their connections to be closed")
            wait_until(is_calm, timeout_s=90, what="the engine to be free")
        sizes.append(front.memory_info().rss)
        wait_until(lambda: num_open() == 0, what="no connection to be left")
        left.append((front.num_fds(), front.num_threads()))
    assert left[-1] <= left[0], "no file, no thread"
    assert sizes[-1] - sizes[0] < MAX_GROWTH_BYTES, sizes
    with strict.client() as http:
        reply = http.post(CHAT, json=chat_body("Write.", max_tokens=4, ignore_eos=True)).json()
        assert reply["usage"]["completion_tokens"] == 4
    assert "slow reader" in strict.log()
    assert "Traceback" not in strict.log()
    rows = json.loads(run_edge("usage", "--json", home=strict.home).stdout)["usage"]
    assert sum(row["undelivered_tokens"] for row in rows) > 30, "what nobody read and was computed counts"


def test_the_engine_waits_for_a_reader_and_he_gets_it_all(appliance: RunningAppliance) -> None:
    body = chat_body("Write.", max_tokens=300, stream=True, ignore_eos=True, logprobs=True, top_logprobs=5)
    with ExitStack() as stack, appliance.client() as http:
        sock = raw_socket(appliance, raw_post(body), stack, buffer_bytes=4096)

        def is_waiting() -> bool:
            info = model_info(http)
            return info["requests_active"] == 1 and info["decode_tok_s"] == 0

        wait_until(lambda: model_info(http)["decode_tok_s"] > 0, what="the answer to begin")
        wait_until(is_waiting, what="the engine to wait")
        events = list(sse_events(iter(received(sock, b"0\r\n\r\n").decode().splitlines())))
    tokens = [t for e in events for c in e["choices"] if c["logprobs"] for t in c["logprobs"]["content"]]
    assert len(tokens) == 300


def test_a_stream_ends_so_that_its_connection_goes_on(strict: RunningAppliance) -> None:
    with ExitStack() as stack:
        sock = raw_socket(strict, raw_post(chat_body("Hi", max_tokens=2, stream=True)), stack)
        assert received(sock, b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        sock.sendall(raw_post(chat_body("Hi", max_tokens=2)))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_bodies_are_bounded_while_they_arrive(strict: RunningAppliance) -> None:
    with ExitStack() as stack:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock = raw_socket(strict, head.encode(), stack)
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range((17 << 20) // 0x10000):
            sock.sendall(chunk)
        answer = b""
        while part := sock.recv(1 << 16):
            answer += part
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer


def test_one_key_does_not_fill_the_queue_for_others(home: Path) -> None:
    with running_appliance(home, "--require-keys", "on", EDGE_MAX_QUEUE="1", EDGE_MAX_SEQUENCES="1") as appliance:
        keys = Keys(home / "state.db", actor="test")
        (_, greedy), (_, modest) = (keys.create(Limits(), name=name) for name in ("greedy", "modest"))

        def ask(key: str, **more: Any) -> httpx.Response:
            with appliance.client(headers={"authorization": f"Bearer {key}"}) as http:
                return http.post(CHAT, json=chat_body("Hi", max_tokens=2, **more))

        assert ask(greedy).status_code == 200
        (worker,) = appliance.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        answers: list[httpx.Response] = []

        def keep(key: str) -> None:
            answers.append(ask(key))

        held = [threading.Thread(target=keep, args=(key,)) for key in (greedy, greedy, modest)]
        try:
            for thread in held[:2]:
                thread.start()
            wait_until(lambda: num_active(home) == 2, what="the greedy one's to wait")
            refused = ask(greedy)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) > 0
            held[2].start()
            wait_until(lambda: num_active(home) == 3, what="the modest one's to wait beside them")
        finally:
            os.kill(worker, signal.SIGCONT)
            for thread in held:
                if thread.ident is not None:
                    thread.join()
        assert [a.status_code for a in answers] == [200] * 3


def num_active(home: Path) -> int:
    """Requests in the engines; asked over the Unix socket, which takes no key."""
    transport = httpx.HTTPTransport(uds=str(home / "run" / "edge.sock"))
    with httpx.Client(transport=transport, base_url="http://localhost") as http:
        num: int = http.get("/edge/v1/status").json()["requests_active"]
        return num


def test_who_is_answered_is_waited_for_and_others_are_sent_away(home: Path) -> None:
    with (
        running_appliance(home) as appliance,
        appliance.client() as http,
        appliance.client() as other,
        ExitStack() as s,
    ):
        http.post(CHAT, json=chat_body("Hi", max_tokens=2)).raise_for_status()
        idle = raw_socket(appliance, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", s)
        received(idle, b"}")
        body = chat_body("Write.", max_tokens=150, stream=True, ignore_eos=True)
        with http.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            appliance.process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b"", "who asks for nothing goes at once"
            assert other.get("/readyz").status_code == 503
            refused = other.post(CHAT, json=chat_body("Hi"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            *_, last = sse_events(lines)
            assert last["choices"][0]["finish_reason"] == "length"
        assert appliance.process.wait(20) == 0


def test_a_drain_is_bounded_and_says_so(home: Path) -> None:
    with running_appliance(home, EDGE_DRAIN_TIMEOUT_S="0") as appliance, appliance.client() as http:
        body = chat_body("Write.", max_tokens=7000, stream=True, ignore_eos=True)
        with http.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            appliance.process.send_signal(signal.SIGTERM)
            *_, last = sse_events(lines)
            assert last["error"]["code"] == "server_stopping"
        assert appliance.process.wait(20) == 0
