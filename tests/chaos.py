"""A mixed load on a running appliance, harm done to its workers meanwhile, and the laws that hold all the same."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body, sse_events, wait_until

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"
HEALTHY = "healthy:x"
HEALTHY_SHARE = 4
"""One client in so many asks the healthy model."""
DEADLINE_S = 90.0
GRACE_S = 10.0
"""On a crowded machine the client itself may be late by this much."""

CLEAR = frozenset({"worker_died", "queue_full", "model_loading", "deadline_exceeded", "backend_error", "does_not_fit"})
"""Codes that an innocent request may end with while its engine is harmed."""
SHARED_PREFIX = "You are the assistant of a harbour. " + "Ships come, ships go, and each has a name and a berth. " * 30
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A response format."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {f"p{i}": schema for i in range(4)}, "additionalProperties": False}
    return schema


GRAMMAR_BOMBS: list[dict[str, Any]] = [
    {"type": "string", "pattern": "^((a{1,200}){1,200}){1,200}$"},
    {"type": "string", "pattern": "(x+x+)+y" * 50},
    {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    {"type": "array", "items": {"enum": [f"v{i}" * 20 for i in range(20_000)]}, "minItems": 10_000},
    nested(7),
    {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 8}}},
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended. `problem` says which law it broke."""

    kind: str
    model: str
    result: str
    seconds: float
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request and what may come of it, beside an answer."""

    kind: str
    body: dict[str, Any]
    expected: frozenset[str] = frozenset()
    """Codes that are right for it whatever happens."""
    hang_up_after: int = 0


class Mix:
    """Draws requests for one client.

    Args:
        has_json: Whether the appliance can constrain its output.
        bombs: Requests that harm the worker, by how often they are drawn (the harmless ones are about a hundred).
    """

    def __init__(self, seed: int, model: str, *, has_json: bool, bombs: Mapping[str, float]) -> None:
        self._rng = random.Random(seed)
        self._model = model
        kinds: dict[str, float] = {"short": 40, "shared prefix": 16, "stream": 16, "long": 6, "hang-up": 6, "bad": 6}
        if has_json:
            kinds |= {"json": 8}
        self._kinds = {**kinds, **{kind: often for kind, often in bombs.items() if has_json or kind != "grammar bomb"}}

    def draw(self) -> Ask:
        """The next request."""
        kind = self._rng.choices(list(self._kinds), list(self._kinds.values()))[0]
        number = self._rng.randrange(10**9)
        return self._make(kind, number)

    def _make(self, kind: str, number: int) -> Ask:
        tokens = self._rng.choice((4, 8, 16, 24))
        body = chat_body(f"Say something about the number {number}.", model=self._model, max_tokens=tokens)
        match kind:
            case "shared prefix":
                body["messages"].insert(0, {"role": "system", "content": SHARED_PREFIX})
            case "stream":
                body |= {"stream": True}
            case "long":
                body["messages"][0]["content"] += " The tide is high and the wind is from the west." * 80
            case "hang-up":
                return Ask(kind, body | {"stream": True, "max_tokens": 100, "ignore_eos": True}, hang_up_after=3)
            case "bad":
                wrong = self._rng.choice(({"temperature": "hot"}, {"model": "none:such"}, {"max_tokens": 10**6}))
                codes = frozenset({"invalid_request", "model_not_found", "context_length_exceeded"})
                return Ask(kind, body | wrong, codes)
            case "json":
                body |= {"response_format": json_schema(SCHEMA), "max_tokens": 48}
            case "grammar bomb":
                schema = json_schema(self._rng.choice(GRAMMAR_BOMBS))
                codes = frozenset({"invalid_request", "constraint_failed", "request_poisoned"})
                return Ask(kind, body | {"response_format": schema}, codes)
            case "abort" | "hang" | "eat memory":
                word = {"abort": f"bomb:abort@{self._rng.randrange(6)}", "hang": "bomb:hang", "eat memory": "bomb:eat"}
                body |= {"stop": [word[kind]], "max_tokens": 24, "ignore_eos": True}
                return Ask(kind, body, frozenset({"request_poisoned", "worker_died"}))
            case _:
                pass
        return Ask(kind, body)


class Client(threading.Thread):
    """Asks one request after the other until told to stop."""

    def __init__(self, url: str, mix: Mix, model: str, stop: threading.Event) -> None:
        super().__init__(name=f"client of {model}", daemon=True)
        self._url, self._mix, self._model, self._stop_asking = url, mix, model, stop
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Ask until the end."""
        timeout = httpx.Timeout(DEADLINE_S + 3 * GRACE_S)
        while not self._stop_asking.is_set():
            ask = self._mix.draw()
            with httpx.Client(base_url=self._url, timeout=timeout, trust_env=False) as http:
                self.outcomes.append(self._ask(http, ask))

    def _ask(self, http: httpx.Client, ask: Ask) -> Outcome:
        began = time.monotonic()
        problem = None
        try:
            result = self._stream(http, ask) if ask.body.get("stream") else self._whole(http, ask)
        except (httpx.HTTPError, ValueError, LookupError) as e:
            result, problem = "broken", f"{type(e).__name__}: {e}"
        seconds = time.monotonic() - began
        if problem is None:
            problem = self._judge(ask, result, seconds)
        return Outcome(ask.kind, self._model, result, seconds, problem)

    def _judge(self, ask: Ask, result: str, seconds: float) -> str | None:
        if seconds > DEADLINE_S + GRACE_S:
            return f"it took {seconds:.0f} s"
        if result in ("answer", "hung up") or result in ask.expected:
            return None
        if self._model == HEALTHY:
            return f"the healthy model answered {result}"
        return None if result in CLEAR else f"ended with {result}"

    @staticmethod
    def _whole(http: httpx.Client, ask: Ask) -> str:
        reply = http.post(CHAT, json=ask.body)
        if reply.status_code != 200:
            error = reply.json()["error"]
            return error["code"] if error["message"] else "an error without words"
        choice = reply.json()["choices"][0]
        if ask.kind == "json" and choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])
        return "answer" if choice["finish_reason"] in ("stop", "length") else "no reason"

    @staticmethod
    def _stream(http: httpx.Client, ask: Ask) -> str:
        with http.stream("POST", CHAT, json=ask.body) as reply:
            if reply.status_code != 200:
                return json.loads(reply.read())["error"]["code"]
            reason = None
            for number, event in enumerate(sse_events(reply.iter_lines()), 1):
                if "error" in event:
                    return event["error"]["code"]
                reason = event["choices"][0]["finish_reason"]
                if number == ask.hang_up_after:
                    return "hung up"
        return "answer" if reason in ("stop", "length") else "a stream cut short"


class Liveness(threading.Thread):
    """Asks `/livez` all the time."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        super().__init__(name="liveness", daemon=True)
        self._url, self._stop_asking = url, stop
        self.longest_s, self.problems = 0.0, list[str]()

    def run(self) -> None:
        """Ask until the end."""
        with httpx.Client(base_url=self._url, timeout=GRACE_S, trust_env=False) as http:
            while not self._stop_asking.wait(0.2):
                began = time.monotonic()
                try:
                    http.get("/livez").raise_for_status()
                except httpx.HTTPError as e:
                    self.problems.append(f"/livez: {e!r}")
                self.longest_s = max(self.longest_s, time.monotonic() - began)


@contextmanager
def memory_cgroup() -> Generator[Path | None]:
    """A control group with 1 MiB for what is taken anew, for the length of a block; None where none can be made."""
    found = None
    for top, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / top / f"edge-chaos-{os.getpid()}"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / limit).write_text(str(1 << 20))
            found = group
            break
    try:
        yield found
    finally:
        if found is not None:
            wait_until(
                lambda: not (found / "cgroup.procs").read_text(), timeout_s=DEADLINE_S, what="the group to empty"
            )
            found.rmdir()


@dataclass
class Harm:
    """Does harm to the workers of all models but the healthy one."""

    appliance: RunningAppliance
    healthy_pid: int
    gateway: Callable[[], str]
    """Changes whether the telemetry gateway answers; gives what it did."""
    rng: random.Random
    cgroup: Path | None
    done: Counter[str] = field(default_factory=Counter[str])

    def victims(self) -> list[psutil.Process]:
        """Workers to harm."""
        return [psutil.Process(pid) for pid in self.appliance.worker_pids() if pid != self.healthy_pid]

    def one(self) -> None:
        """One act of harm."""
        kind = self.rng.choices(("kill", "stop", "starve", "gateway"), (4, 2, 3, 2))[0]
        if kind == "gateway":
            self.done[self.gateway()] += 1
            return
        for victim in self.victims():
            with suppress(psutil.NoSuchProcess):
                self.done[self._hurt(kind, victim)] += 1

    def end(self) -> None:
        """Replace workers that were harmed and live: no harm outlasts the chaos."""
        for victim in self.victims():
            with suppress(psutil.NoSuchProcess):
                victim.kill()

    def _hurt(self, kind: str, victim: psutil.Process) -> str:
        if kind == "stop":
            victim.send_signal(signal.SIGSTOP)
            return "stopped"
        if kind == "starve" and self.cgroup is not None:
            try:
                (self.cgroup / "cgroup.procs").write_text(str(victim.pid))
            except OSError:
                return "gone before it starved"
            return "starved of memory"
        victim.kill()
        return "killed"


@contextmanager
def load(
    appliance: RunningAppliance, *, num_clients: int, seed: int, has_json: bool, bombs: Mapping[str, float]
) -> Generator[tuple[list[Client], Liveness]]:
    """Clients at work for the length of a block."""
    stop = threading.Event()
    models = [DEFAULT_MODEL if i % HEALTHY_SHARE else HEALTHY for i in range(num_clients)]
    clients = [
        Client(
            appliance.url,
            Mix(seed * 1000 + i, model, has_json=has_json, bombs={} if model == HEALTHY else bombs),
            model,
            stop,
        )
        for i, model in enumerate(models)
    ]
    liveness = Liveness(appliance.url, stop)
    for thread in (*clients, liveness):
        thread.start()
    try:
        yield clients, liveness
    finally:
        stop.set()
        for thread in (*clients, liveness):
            thread.join(DEADLINE_S + 4 * GRACE_S)
    assert not any(thread.is_alive() for thread in (*clients, liveness)), "a client still waits"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the appliance holds of the machine."""

    front_bytes: int
    healthy_bytes: int
    harmed_bytes: int
    num_files: int
    num_threads: int
    num_processes: int

    @classmethod
    def of(cls, appliance: RunningAppliance, *, healthy_pid: int) -> Footprint:
        """Of a running one, with its workers."""
        front = psutil.Process(appliance.process.pid)
        children = front.children(recursive=True)
        return cls(
            front.memory_info().rss,
            sum(child.memory_info().rss for child in children if child.pid == healthy_pid),
            sum(child.memory_info().rss for child in children if child.pid != healthy_pid),
            front.num_fds(),
            front.num_threads(),
            1 + len(children),
        )


def settle(appliance: RunningAppliance) -> None:
    """Wait until nothing is under way: every request over, both models ready."""
    used = (HEALTHY, DEFAULT_MODEL)
    with appliance.client() as http:

        def is_quiet() -> bool:
            models = http.get("/edge/v1/models").json()["models"]
            return all(m["state"] == "ready" and not m["requests_active"] for m in models if m["ref"] in used)

        for model in used:
            http.post("/edge/v1/models/load", json={"model": model}, timeout=DEADLINE_S)
        wait_until(is_quiet, timeout_s=DEADLINE_S, what="the appliance to be quiet")


def summary(
    outcomes: list[Outcome], harm: Harm, liveness: Liveness, before: Footprint, after: Footprint, *, seconds: float
) -> dict[str, Any]:
    """The figures of a run, as they are written down."""
    kinds = sorted({o.kind for o in outcomes})
    table = {kind: dict(Counter(o.result for o in outcomes if o.kind == kind and o.model != HEALTHY)) for kind in kinds}
    times = [o.seconds for o in outcomes if o.result == "answer"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "seconds": round(seconds),
        "requests": len(outcomes),
        "harmed model": {kind: results for kind, results in table.items() if results},
        "healthy model": dict(Counter(o.result for o in outcomes if o.model == HEALTHY)),
        "harm": dict(harm.done),
        "broken laws": [f"{o.kind} ({o.model}): {o.problem}" for o in outcomes if o.problem] + liveness.problems,
        "seconds per answer": {
            "median": round(statistics.median(times), 2), "p99": round(statistics.quantiles(times, n=100)[98], 2),
            "longest of any request": round(max(o.seconds for o in outcomes), 2),
        },
        "longest /livez in s": round(liveness.longest_s, 3),
        "front in MiB": [before.front_bytes >> 20, after.front_bytes >> 20],
        "healthy worker in MiB": [before.healthy_bytes >> 20, after.healthy_bytes >> 20],
        "harmed worker in MiB": [before.harmed_bytes >> 20, after.harmed_bytes >> 20],
        "open files of the front": [before.num_files, after.num_files],
        "threads of the front": [before.num_threads, after.num_threads],
    }  # fmt: skip


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
