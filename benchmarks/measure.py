"""One measure of one server, and A B B A rounds of them."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import jsonschema
import msgspec

from . import machine
from .loadgen import run as run_plan
from .peers import BenchError, Contender, Server, running, spinning
from .plan import Answer, Ask, Outcome, Plan
from .workloads import Clients, Workload

QUIET_CORES = 0.1
_LOOK_S = 0.5
_SETTLE_S = 0.3


class Sample(msgspec.Struct, frozen=True):
    """One measure.

    Attributes:
        metrics: What is compared: `tok_s` (more is better), or times named `..._s` (less is).
        others_cores: Cores that others used meanwhile.
        gaps_s: Time between pieces of text, of all requests.
    """

    workload: str
    clients: int
    round: int
    prompts: int
    server: str
    metrics: dict[str, float]
    num_prompt: int
    num_cached: int
    num_output: int
    cpu_s: float
    loadgen_cpu_s: float
    others_cores: float
    first_token_s: list[float]
    gaps_s: list[float]
    num_requests: int
    errors: list[str]

    @property
    def is_disturbed(self) -> bool:
        """Whether others used more than `QUIET_CORES`."""
        return self.others_cores > QUIET_CORES


class Answers(msgspec.Struct, frozen=True):
    """What a server said to a workload's requests where it might end when it liked. Not a measure: past the model's
    own end of an answer the servers go on in different ways, so the measured texts say little about agreement."""

    workload: str
    clients: int
    server: str
    texts: list[str]


class Footprint(msgspec.Struct, frozen=True):
    """Memory of a server after a workload, in bytes."""

    workload: str
    server: str
    context_tokens: int
    resident: int
    proportional: int
    anonymous: int


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds for a whole run.

    Attributes:
        wait_s: How long a round waits for a quiet machine before it goes on as disturbed.
        extra_rounds: Rounds made up for disturbed ones, at most.
        deadline: Moment (`time.monotonic`) after which no round begins.
    """

    threads: int
    seed: int
    wait_s: float
    extra_rounds: int
    deadline: float
    progress: Callable[[str], None]


def generate_load(server: Server, clients: Clients, *, limit_s: float) -> Outcome:
    """Run a plan in a process of its own.

    Raises:
        BenchError: The generator failed.
    """
    plan = Plan(server.port, server.model, clients, limit_s)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loadgen"], input=msgspec.json.encode(plan), capture_output=True,
        timeout=limit_s + 60,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"the load generator failed: {done.stderr.decode('utf-8', 'replace')[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Outcome)


def wait_until_quiet(wait_s: float) -> float:
    """Wait until others use at most `QUIET_CORES`, or `wait_s` have passed; gives what they used at last."""
    deadline = time.monotonic() + wait_s
    while True:
        before = machine.read_cpu()
        time.sleep(_LOOK_S)
        others = machine.others_cores(before, machine.read_cpu())
        if others <= QUIET_CORES or time.monotonic() > deadline:
            return others


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run a measure stands."""

    workload: Workload
    clients: int
    round: int
    prompts: int

    def asks(self, seed: int) -> Clients:
        """The requests: the same for every server at this place, other ones elsewhere."""
        w = self.workload
        rng = random.Random(f"{seed}/{w.make.__name__}/{self.clients}/{self.round}/{self.prompts}")
        return w.make(self.clients, rng)


def _sample(place: Place, server: Server, outcome: Outcome, metrics: dict[str, float], **costs: float) -> Sample:
    answers = outcome.answers
    return Sample(
        workload=place.workload.name,
        clients=place.clients,
        round=place.round,
        prompts=place.prompts,
        server=server.name,
        metrics=metrics,
        num_prompt=sum(a.num_prompt for a in answers),
        num_cached=sum(a.num_cached for a in answers),
        num_output=sum(a.num_output for a in answers),
        cpu_s=costs["cpu_s"],
        loadgen_cpu_s=outcome.cpu_s,
        others_cores=costs["others_cores"],
        first_token_s=[t for a in answers if (t := a.first_token_s) is not None],
        gaps_s=[g for a in answers for g in a.gaps_s],
        num_requests=len(answers),
        errors=[a.error for a in answers if a.error],
    )


def judged(outcome: Outcome, clients: Clients) -> Outcome:
    """The outcome with an error for each whole answer that does not obey its schema."""
    asks = {number: iter(mine) for number, mine in enumerate(clients)}
    answers = [_judged(a, next(asks[a.client])) for a in outcome.answers]
    return msgspec.structs.replace(outcome, answers=answers)


def _judged(answer: Answer, ask: Ask) -> Answer:
    if not ask.schema or answer.error:
        return answer
    try:
        jsonschema.validate(json.loads(answer.text), json.loads(ask.schema))
    except (ValueError, jsonschema.ValidationError) as e:
        return msgspec.structs.replace(answer, error=f"not of its schema: {str(e)[:100]}")
    return answer


def measure_load(place: Place, server: Server, clients: Clients) -> Sample:
    """Send the requests to a running server."""
    limit_s = place.workload.limit_s
    if place.workload.primed:
        generate_load(server, clients, limit_s=limit_s)
    time.sleep(_SETTLE_S)
    server_before, before = machine.tree_cpu_s(server.process.pid), machine.read_cpu()
    outcome = judged(generate_load(server, clients, limit_s=limit_s), clients)
    after, server_after = machine.read_cpu(), machine.tree_cpu_s(server.process.pid)
    ended = max((a.arrivals[-1] for a in outcome.answers if a.arrivals), default=outcome.wall_s)
    if any(a.error for a in outcome.answers):
        ended = outcome.wall_s
    metrics = {"tok_s": sum(a.num_output for a in outcome.answers) / ended}
    if any(ask.schema for asks in clients for ask in asks):
        metrics["time per answer_s"] = ended / len(outcome.answers)
    others = machine.others_cores(before, after)
    return _sample(place, server, outcome, metrics, cpu_s=server_after - server_before, others_cores=others)


def _first_answer(server: Server, ask: Ask) -> tuple[float, Outcome]:
    """Ask until the server takes it; gives the moment of the first token."""
    while True:
        asked_at = time.perf_counter()
        outcome = asyncio.run(run_plan(Plan(server.port, server.model, [[ask]], 60.0)))
        first = outcome.answers[0].arrivals
        if first and not outcome.answers[0].error:
            return asked_at + first[0], outcome
        server.check_alive()
        time.sleep(0.003)


def measure_start(place: Place, contender: Contender, threads: int, ask: Ask, *, until_ready: bool) -> Sample:
    """Start a server and ask it one thing.

    Args:
        until_ready: Ask once the model is loaded, and report the time from there too.
    """
    before = machine.read_cpu()
    server = contender.launch(context_tokens=place.workload.context_tokens, threads=threads)
    try:
        (server.wait_ready if until_ready else server.wait_listening)()
        ready_at = time.perf_counter()
        first_at, outcome = _first_answer(server, ask)
        cpu_s = machine.tree_cpu_s(server.process.pid)
    finally:
        server.stop()
    metrics = {"exec to first token_s": first_at - server.exec_at}
    if until_ready:
        metrics["ready to first token_s"] = first_at - ready_at
    others = machine.others_cores(before, machine.read_cpu())
    return _sample(place, server, outcome, metrics, cpu_s=cpu_s, others_cores=others)


def measure_restart(place: Place, contender: Contender, threads: int, asks: list[Ask]) -> Sample:
    """Ask about a document, restart the server, ask something else about it."""
    with running(contender, context_tokens=place.workload.context_tokens, threads=threads) as server:
        _first_answer(server, asks[0])
        time.sleep(1.0)  # what is saved beside the work gets its time
    return measure_start(place, contender, threads, asks[1], until_ready=True)


Measure = Callable[[Place, Contender, Clients], Sample]


class Bench:
    """Runs workloads on two contenders, and keeps every sample."""

    def __init__(self, ours: Contender, peer: Contender, conditions: Conditions) -> None:
        self.ours = ours
        self.peer = peer
        self.conditions = conditions
        self.samples: list[Sample] = []
        self._servers: dict[str, Server] = {}
        self.footprints: list[Footprint] = []
        self.answers: list[Answers] = []

    def run(self, workload: Workload, *, clients: tuple[int, ...], rounds: int) -> None:
        """All rows of a workload."""
        with self._measuring(workload) as measure:
            for number in clients:
                self._rounds(workload, number, rounds, measure)
                self._compare_answers(workload, number)

    @contextmanager
    def _measuring(self, workload: Workload) -> Generator[Measure]:
        """How to take one measure; servers that run throughout are started and stopped here."""
        if workload.kind == "start":
            yield lambda place, who, asks: measure_start(
                place, who, self._threads(place.workload, who), asks[0][0], until_ready=False
            )
        elif workload.kind == "restart":
            yield lambda place, who, asks: measure_restart(place, who, self._threads(place.workload, who), asks[0])
        else:
            with ExitStack() as stack:
                servers = {c.name: stack.enter_context(self._running(workload, c)) for c in (self.ours, self.peer)}
                self._servers = servers
                for server in servers.values():
                    generate_load(server, [[Ask("Once upon a time", 8)]], limit_s=60)
                stack.enter_context(spinning(workload.busy_cores))
                yield lambda place, who, asks: measure_load(place, servers[who.name], asks)
                self.footprints += [self._footprint(workload, s) for s in servers.values()]

    def _compare_answers(self, workload: Workload, clients: int) -> None:
        if workload.kind != "load" or workload.busy_cores:
            return
        asks = Place(workload, clients, -1, 0).asks(self.conditions.seed)
        asks = [[msgspec.structs.replace(a, may_end=True) for a in mine] for mine in asks]
        for name, server in self._servers.items():
            outcome = generate_load(server, asks, limit_s=workload.limit_s)
            self.answers.append(Answers(workload.name, clients, name, [a.text for a in outcome.answers]))

    def _running(self, workload: Workload, contender: Contender) -> AbstractContextManager[Server]:
        threads = self._threads(workload, contender)
        return running(contender, context_tokens=workload.context_tokens, threads=threads)

    def _threads(self, workload: Workload, contender: Contender) -> int:
        is_peer = contender.name == self.peer.name
        return workload.peer_threads if is_peer and workload.peer_threads else self.conditions.threads

    @staticmethod
    def _footprint(workload: Workload, server: Server) -> Footprint:
        m = machine.tree_memory(server.process.pid)
        return Footprint(workload.name, server.name, workload.context_tokens, m.resident, m.proportional, m.anonymous)

    def _rounds(self, workload: Workload, clients: int, rounds: int, measure: Measure) -> None:
        """A B B A, then B A A B, and so on, until enough rounds were undisturbed."""
        c, clean, attempts = self.conditions, 0, rounds + self.conditions.extra_rounds
        for number in range(attempts):
            if clean >= rounds or (number and time.monotonic() > c.deadline):
                return
            places = [Place(workload, clients, number, prompts) for prompts in (0, 1)]
            is_last = number == attempts - 1 or time.monotonic() > c.deadline
            samples = self._round(places, measure, give_up=not is_last)
            if samples:
                self.samples += samples
                clean += not any(s.is_disturbed for s in samples)

    def _round(self, places: list[Place], measure: Measure, *, give_up: bool) -> list[Sample]:
        """Four measures; none where one was disturbed and there is another chance."""
        a, b = (self.ours, self.peer) if places[0].round % 2 == 0 else (self.peer, self.ours)
        samples: list[Sample] = []
        for who, place in ((a, places[0]), (b, places[0]), (b, places[1]), (a, places[1])):
            wait_until_quiet(self.conditions.wait_s)
            samples.append(measure(place, who, place.asks(self.conditions.seed)))
            if give_up and samples[-1].is_disturbed:
                self.conditions.progress(f"{self._line(samples)}, given up")
                return []
        self.conditions.progress(self._line(samples))
        return samples

    def _line(self, samples: list[Sample]) -> str:
        s = samples[0]
        others = max(x.others_cores for x in samples)
        parts = [
            f"{name} {' '.join(f'{x.metrics[m]:.3g}' for x in samples if x.server == name)}"
            for m in s.metrics
            for name in (self.ours.name, self.peer.name)
        ]
        mark = "  disturbed" if any(x.is_disturbed for x in samples) else ""
        failed = "".join(f"  {x.server}: {x.errors[0]}" for x in samples if x.errors)
        return f"{s.workload} x{s.clients} round {s.round + 1}: {', '.join(parts)}  others {others:.2f}{mark}{failed}"
