"""Mixed load while workers are killed, hung and starved: every request ends, the healthy model never notices.

The figures of a run go to ``EDGE_CHAOS_OUT`` (a file), from where they come into docs/reliability.md; the long form
runs for ``EDGE_CHAOS_S`` seconds (half an hour).
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge.store.details import ModelDetails
from edge.store.models import ModelStore, PackageFile
from tests.chaos import (
    CHAT,
    DEADLINE_S,
    HEALTHY,
    ROOT,
    SCHEMA,
    Footprint,
    Harm,
    Outcome,
    json_schema,
    load,
    memory_cgroup,
    settle,
    summary,
)
from tests.edge.telemetry_parts import GatewayProcess
from tests.support import DEFAULT_MODEL, SEED, GreedyLaw, RunningAppliance, chat_body, running_appliance, wait_until

BOMBS = {"abort": 0.7, "hang": 0.1, "eat memory": 0.1, "grammar bomb": 1.0}
QUESTIONS = [f"Write one sentence about {topic}." for topic in ("rain", "bread", "the sea", "winter")]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path / "gateway")
    gateway.start()
    yield gateway
    gateway.stop()


@pytest.fixture
def chaotic(home: Path, gateway: GatewayProcess) -> Iterator[RunningAppliance]:
    store = ModelStore(home / "store", seed=SEED)
    store.add(HEALTHY, [PackageFile(store.get(DEFAULT_MODEL).weights, "model.gguf")], ModelDetails())
    settings = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'bombs'}:{ROOT}", "EDGE_REQUEST_TIMEOUT_S": str(DEADLINE_S),
        "EDGE_THREADS": "1", "EDGE_STATE_BYTES": str(32 << 20), "EDGE_CONTEXT_TOKENS": "2048",
        "EDGE_GATEWAY_URL": gateway.url,
    }  # fmt: skip
    with running_appliance(home, **settings) as appliance:
        yield appliance


def test_a_short_chaos(chaotic: RunningAppliance, gateway: GatewayProcess) -> None:
    figures = run_chaos(
        chaotic, gateway, num_clients=8, warm_s=2, chaos_s=10, pause_s=(1.0, 3.0), bombs={"abort": 2.0}, seed=1
    )
    assert figures["broken laws"] == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_chaos(chaotic: RunningAppliance, gateway: GatewayProcess) -> None:
    seconds = float(os.environ.get("EDGE_CHAOS_S", "1800"))
    seed = int(os.environ.get("EDGE_CHAOS_SEED", "7"))
    warm_s = max(30.0, min(300.0, seconds / 6))  # until caches and states are as full as they get
    figures = run_chaos(
        chaotic, gateway, num_clients=16, warm_s=warm_s, chaos_s=seconds, pause_s=(4.0, 12.0), bombs=BOMBS, seed=seed,
        use_all_cells=True,
    )  # fmt: skip
    print(json.dumps(figures, indent=2))
    if out := os.environ.get("EDGE_CHAOS_OUT"):
        Path(out).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    assert figures["broken laws"] == []
    for what in ("front in MiB", "healthy worker in MiB", "harmed worker in MiB"):
        before, after = figures[what]
        assert after - before <= 0.05 * before, what  # a harmed worker is a new one, which may have less


def run_chaos(
    appliance: RunningAppliance, gateway: GatewayProcess, *, num_clients: int,
    warm_s: float, chaos_s: float, pause_s: tuple[float, float], bombs: Mapping[str, float], seed: int,
    use_all_cells: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Warm up, do harm under load, load again without harm, compare.

    Args:
        use_all_cells: Before memory is looked at, which is taken as cells are used, and so says little before.
    """
    rng = random.Random(seed)
    with appliance.client() as http:
        http.post("/edge/v1/models/load", json={"model": HEALTHY}).raise_for_status()
        (healthy_pid,) = appliance.worker_pids()
        reply = http.post(CHAT, json=chat_body("Hi", response_format=json_schema(SCHEMA), max_tokens=40))
        has_json = reply.status_code == 200
    references = [answer(appliance, q) for q in QUESTIONS]
    with load(appliance, num_clients=num_clients, seed=seed, has_json=has_json, bombs={}):
        time.sleep(warm_s)
    if use_all_cells:
        fill_contexts(appliance)
    settle(appliance)
    before = Footprint.of(appliance, healthy_pid=healthy_pid)

    def turn_gateway() -> str:
        is_down = gateway.process is None or gateway.process.poll() is not None
        gateway.start() if is_down else gateway.stop()
        return "gateway back" if is_down else "gateway down"

    began = time.monotonic()
    with memory_cgroup() as cgroup:
        harm = Harm(appliance, healthy_pid, turn_gateway, rng, cgroup)
        with load(appliance, num_clients=num_clients, seed=seed + 1, has_json=has_json, bombs=bombs) as (
            clients,
            liveness,
        ):
            while (left := chaos_s - (time.monotonic() - began)) > 0:
                time.sleep(min(left, rng.uniform(*pause_s)))
                harm.one()
        chaos_took_s = time.monotonic() - began
        settle(appliance)
        harm.end()
    settle(appliance)
    with load(appliance, num_clients=num_clients, seed=seed + 2, has_json=has_json, bombs={}) as (after_clients, _):
        time.sleep(warm_s)
    if use_all_cells:
        fill_contexts(appliance)
    settle(appliance)
    wait_until(
        lambda: Footprint.of(appliance, healthy_pid=healthy_pid).num_files <= before.num_files + 2,
        what="the front to close its files",
    )
    after = Footprint.of(appliance, healthy_pid=healthy_pid)
    assert after.num_processes == before.num_processes == 3
    assert after.num_threads <= before.num_threads + 2
    assert healthy_pid in appliance.worker_pids()
    obey(references, [answer(appliance, q) for q in QUESTIONS])
    calm: list[Outcome] = [o for c in after_clients for o in c.outcomes]
    assert [o for o in calm if o.problem or (o.result not in ("answer", "hung up") and o.kind != "bad")] == []
    check_all_gone(appliance)
    outcomes = [o for c in clients for o in c.outcomes]
    return summary(outcomes, harm, liveness, before, after, seconds=chaos_took_s)


def answer(appliance: RunningAppliance, question: str) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the greedy answer."""
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat_body(question, return_token_ids=True)).raise_for_status().json()
    return reply["prompt_token_ids"], reply["choices"][0]["token_ids"]


def fill_contexts(appliance: RunningAppliance) -> None:
    """Have both models read a prompt that takes nearly all cells."""
    with appliance.client() as http:
        for model in (HEALTHY, DEFAULT_MODEL):
            body = {"model": model, "prompt": [100] * 2000, "max_tokens": 8}
            http.post("/v1/completions", json=body).raise_for_status()


def obey(references: list[tuple[list[int], list[int]]], answers: list[tuple[list[int], list[int]]]) -> None:
    """Answers after the chaos agree with those before it."""
    if answers == references:
        return
    law = GreedyLaw(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    try:
        for (prompt, reference), (_, now) in zip(references, answers, strict=True):
            assert law.obeys(prompt, now, reference)
    finally:
        law.close()


def check_all_gone(appliance: RunningAppliance) -> None:
    """Unloading leaves nothing."""
    with appliance.client() as http:
        for model in (HEALTHY, DEFAULT_MODEL):
            http.post("/edge/v1/models/unload", json={"model": model}).raise_for_status()
    assert psutil.Process(appliance.process.pid).children(recursive=True) == []
