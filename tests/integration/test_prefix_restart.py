"""Prefixes outlive a restart and a crash, and are believed only whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge.store.models import ModelStore
from tests.support import DEFAULT_MODEL, SEED, GreedyLaw, RunningAppliance, running_appliance, wait_until

NUM_PREFIXES = 50
ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def law() -> Iterator[GreedyLaw]:
    law = GreedyLaw(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    yield law
    law.close()


def system(number: int) -> str:
    return (
        f"{number} is your number. You work on a boat, where you answer what the crew asks in one short sentence, " * 2
    )


def ask(http: httpx.Client, number: int, **more: object) -> tuple[list[int], list[int], int]:
    """Token ids of prompt and answer, and how many were cached."""
    messages = [{"role": "system", "content": system(number)}, {"role": "user", "content": "Where are we?"}]
    body = {
        "model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS,
        "return_token_ids": True, "ignore_eos": True, **more,
    }  # fmt: skip
    reply = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    cached: int = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return reply["prompt_token_ids"], reply["choices"][0]["token_ids"], cached


def states_of(home: Path) -> list[Path]:
    return sorted(home.glob("states/*/*.state"))


def test_fifty_prefixes_are_warm_after_a_restart_and_damaged_ones_cold(home: Path, law: GreedyLaw) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        cold = [ask(http, n) for n in range(NUM_PREFIXES)]
    # Every prompt begins with the template's own few tokens, which may be shared; nothing more may.
    assert max(cached for *_, cached in cold) < 20
    assert len(states_of(home)) >= NUM_PREFIXES
    with running_appliance(home) as appliance, appliance.client() as http:
        warm = [ask(http, n) for n in range(NUM_PREFIXES)]
    equal = sum(c[1] == w[1] for c, w in zip(cold, warm, strict=True))
    print(f"greedy law: {equal} of {NUM_PREFIXES} answers equal after a restart, epsilon {law.epsilon:.3f}")
    for (prompt, reference, _), (again, answer, cached) in zip(cold, warm, strict=True):
        assert again == prompt
        assert cached == len(prompt) - 1, "all but the one token that has to be computed"
        assert law.obeys(prompt, answer, reference)
    for i, path in enumerate(states_of(home)):
        damage(path, at=i / NUM_PREFIXES)
    with running_appliance(home) as appliance, appliance.client() as http:
        assert max(ask(http, n)[2] for n in range(10)) < 20


def damage(path: Path, *, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(at * len(data)))] ^= 1
    path.write_bytes(data)


def test_what_two_shared_outlives_the_kill_of_a_worker(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        prompt, _, _ = ask(http, 1)
        ask_other(http, 1)
        wait_until(lambda: bool(states_of(home)), what="the shared prefix to be written")
        kill_worker(appliance)
        assert len(prompt) // 2 < ask(http, 1)[2] < len(prompt) - 1, "the shared part was persisted, the rest was not"


def ask_other(http: httpx.Client, number: int) -> None:
    messages = [{"role": "system", "content": system(number)}, {"role": "user", "content": "Shall we eat something?"}]
    body = {"model": DEFAULT_MODEL, "messages": messages, "max_tokens": 40, "ignore_eos": True}
    http.post("/v1/chat/completions", json=body).raise_for_status()


def kill_worker(appliance: RunningAppliance) -> None:
    (worker,) = appliance.worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: appliance.worker_pids() not in ([worker], []), what="a new worker")


def test_a_device_that_keeps_no_states_writes_none(home: Path) -> None:
    with running_appliance(home, EDGE_STATE_DISK_BYTES="0") as appliance, appliance.client() as http:
        ask(http, 1)
    assert not (home / "states").exists()


def test_a_cache_key_is_taken_without_a_warning(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        body = {"model": DEFAULT_MODEL, "prompt": "Hi", "max_tokens": 1, "prompt_cache_key": "k"}
        assert "x-edge-warnings" not in http.post("/v1/completions", json=body).raise_for_status().headers
        assert http.post("/v1/completions", json={**body, "prompt_cache_key": "k" * 300}).status_code == 400
