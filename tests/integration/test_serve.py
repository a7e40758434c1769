"""The running appliance through OpenAI's own client: answers, batching, cancelling, crashes."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
from openai.types.chat import ChatCompletionMessageParam

from tests.support import (
    DEFAULT_MODEL,
    GreedyLaw,
    RunningAppliance,
    chat_body,
    run_edge,
    running_appliance,
    sse_events,
    wait_until,
)

TOPICS = ("rain", "bread", "the sea", "bicycles", "winter", "a small dog", "glass", "music")


def client_of(appliance: RunningAppliance) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{appliance.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_the_openai_client_chats_streaming_and_not(appliance: RunningAppliance) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a color."}]
    with client_of(appliance) as client:
        whole = client.chat.completions.create(
            model=DEFAULT_MODEL, messages=messages, temperature=0, max_completion_tokens=16
        )
        chunks = list(
            client.chat.completions.create(
                model=DEFAULT_MODEL,
                messages=messages,
                temperature=0,
                max_tokens=16,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {c.id for c in chunks} == {chunks[0].id}


def test_eight_at_once_answer_as_each_does_alone(appliance: RunningAppliance, law: GreedyLaw) -> None:
    prompts = [f"Write one sentence about {topic}, number {i}." for i in range(4) for topic in TOPICS]

    def ask(prompt: str) -> tuple[list[int], list[int]]:
        with appliance.client() as http:
            reply = http.post("/v1/chat/completions", json=chat_body(prompt, max_tokens=48, return_token_ids=True))
        body = reply.raise_for_status().json()
        return body["prompt_token_ids"], body["choices"][0]["token_ids"]

    alone = [ask(p) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    equal = sum(a == b for a, b in zip(alone, together, strict=True))
    print(f"greedy law: {equal} of {len(prompts)} answers equal, epsilon {law.epsilon:.3f}")
    parted = [(p, a) for (p, reference), (_, a) in zip(alone, together, strict=True) if a != reference]
    gaps = sorted(law.gap(p, a) for p, a in parted)
    assert not gaps or gaps[-1] <= law.epsilon, gaps[-3:]


def test_a_short_request_is_answered_while_a_long_prompt_is_read(appliance: RunningAppliance) -> None:
    long_body = chat_body("Summarize: " + "the quick brown fox jumps over the lazy dog. " * 400, max_tokens=4)
    first: dict[str, float] = {}

    def ask(name: str, body: dict[str, object], started: threading.Event) -> None:
        with (
            appliance.client() as http,
            http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as r,
        ):
            r.raise_for_status()
            started.set()
            for event in sse_events(r.iter_lines()):
                if event["choices"][0]["delta"].get("content") or event["choices"][0]["finish_reason"]:
                    first.setdefault(name, time.monotonic())

    accepted = threading.Event()
    reading = threading.Thread(target=ask, args=("long", long_body, accepted))
    reading.start()
    assert accepted.wait(30)
    ask("short", chat_body("Say hello.", max_tokens=4), threading.Event())
    assert "long" not in first, "the long prompt was read before the short request could be tried"
    reading.join()
    assert first["short"] < first["long"]


def test_seed_stop_and_limits(appliance: RunningAppliance) -> None:
    with appliance.client() as http:

        def answer(**more: object) -> tuple[str, str]:
            reply = http.post("/v1/chat/completions", json=chat_body("Count: one two three", **more))
            choice = reply.raise_for_status().json()["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]

        sampled = {answer(temperature=1.5, seed=seed) for seed in range(4)}
        assert len(sampled) > 1
        whole, _ = answer(max_tokens=40)
        stop = whole[10:14]
        assert answer(max_tokens=40, stop=[stop]) == (whole[: whole.index(stop)], "stop")
        assert answer(max_tokens=3)[1] == "length"


def test_completions_continue_text_and_tokens(appliance: RunningAppliance) -> None:
    with client_of(appliance) as client:
        text = client.completions.create(model=DEFAULT_MODEL, prompt="Once upon a time", temperature=0, max_tokens=8)
        chunks = list(
            client.completions.create(
                model=DEFAULT_MODEL, prompt="Once upon a time", temperature=0, max_tokens=8, stream=True
            )
        )
        tokens = client.completions.create(
            model=DEFAULT_MODEL, prompt=[6403, 2198, 253, 655], temperature=0, max_tokens=8
        )
    assert text.choices[0].text == "".join(c.choices[0].text for c in chunks)
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 4


def test_a_prefix_in_its_slot_is_not_computed_again(appliance: RunningAppliance) -> None:
    body = chat_body("Tell me about the history of lighthouses in the north.", max_tokens=4)
    with appliance.client() as http:
        http.post("/v1/chat/completions", json=body).raise_for_status()
        again = http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1


def test_a_client_that_leaves_frees_the_engine(appliance: RunningAppliance) -> None:
    body = chat_body("Write a very long story.", max_tokens=4000, stream=True, ignore_eos=True)
    with appliance.client() as http:
        for stream in (True, False):
            try:
                timeout = httpx.Timeout(60) if stream else httpx.Timeout(60, read=1.0)
                with http.stream("POST", "/v1/chat/completions", json={**body, "stream": stream}, timeout=timeout) as r:
                    next(sse_events(r.iter_lines()))
            except httpx.ReadTimeout:
                assert not stream
            wait_until(lambda: active_requests(http) == 0, timeout_s=10, what="the request to be dropped")


def active_requests(http: httpx.Client) -> int:
    status = http.get("/edge/v1/status").raise_for_status().json()
    return status["requests_active"]


def test_the_same_api_answers_on_the_unix_socket(appliance: RunningAppliance) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(appliance.socket)), base_url="http://edge") as http:
        assert http.get("/livez").status_code == 200
        assert DEFAULT_MODEL in [m["id"] for m in http.get("/v1/models").json()["data"]]
    assert oct(appliance.socket.stat().st_mode)[-3:] == "600"


def test_edge_chat_asks_from_a_shell(appliance: RunningAppliance) -> None:
    done = run_edge("chat", "--temperature", "0", "--max-tokens", "8", "--stats", "Hello!", home=appliance.home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tok/s" in done.stderr


def test_metrics_are_prometheus_text(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
        reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "gen_ai_server_time_to_first_token_seconds_bucket" in reply.text


class LivenessProbe:
    """Polls `/livez` and keeps what went wrong."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.failures: list[str] = []
        self.num_polls = 0
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> LivenessProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        with httpx.Client(base_url=self._url, timeout=2, trust_env=False) as http:
            while not self._stop.is_set():
                try:
                    if (status := http.get("/livez").status_code) != 200:
                        self.failures.append(f"status {status}")
                except httpx.TransportError as e:
                    self.failures.append(repr(e))
                self.num_polls += 1
                self._stop.wait(0.02)


def test_a_killed_worker_costs_its_own_stream_only(home: Path) -> None:
    body = chat_body("Write a very long story.", max_tokens=2000, stream=True, ignore_eos=True)
    with running_appliance(home) as appliance, appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
        with LivenessProbe(appliance.url) as probe:
            with http.stream("POST", "/v1/chat/completions", json=body) as r:
                events = sse_events(r.iter_lines())
                for _ in range(5):
                    next(events)
                (worker,) = appliance.worker_pids()
                os.kill(worker, signal.SIGKILL)
                last = list(events)[-1]
            after = http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2))
        assert last["error"]["code"] == "worker_died"
        assert "restarted" in last["error"]["message"]
        assert after.status_code == 200
        assert probe.num_polls > 10
        assert probe.failures == []


def test_sigterm_lets_requests_finish(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        body = chat_body("Write a story.", max_tokens=60, stream=True, ignore_eos=True)
        with http.stream("POST", "/v1/chat/completions", json=body) as r:
            events = sse_events(r.iter_lines())
            next(events)
            appliance.process.terminate()
            reasons = [e["choices"][0]["finish_reason"] for e in events]
        assert reasons[-1] == "length"
        assert appliance.process.wait(20) == 0
        assert not appliance.socket.exists()


def test_an_orphaned_worker_ends(home: Path) -> None:
    with running_appliance(home) as appliance:
        with appliance.client() as http:
            http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
        (worker,) = appliance.worker_pids()
        appliance.process.kill()
        appliance.process.wait()
        wait_until(
            lambda: not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()
        )
