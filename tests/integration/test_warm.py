"""`edge warm`: a system prompt is computed once, for all, and kept across restarts until it is removed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx

from tests.support import DEFAULT_MODEL, RunningAppliance, run_edge, running_appliance, wait_until

SYSTEM = "You work on a boat, where you answer what the crew asks in one short sentence, and never guess. " * 6


def cached(http: httpx.Client, question: str, *, system: str = SYSTEM) -> int:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 2}
    usage = http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
    num_cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return num_cached


def edge(appliance: RunningAppliance, *args: str, code: int = 0) -> str:
    done = run_edge("warm", *args, "--url", appliance.url, home=appliance.home)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def states_of(home: Path) -> list[Path]:
    return sorted(home.glob("states/*/*.state"))


def test_a_warm_prompt_is_cached_for_every_chat_and_after_a_restart(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        prompt = home / "boat crew.txt"
        prompt.write_text(SYSTEM)
        pinned = json.loads(edge(appliance, DEFAULT_MODEL, "--system", str(prompt), "--json"))
        assert pinned["name"] == "boat-crew"
        assert pinned["num_tokens"] > 100
        assert pinned["size_bytes"] > 1000 * pinned["num_tokens"]
        assert pinned["on_disk"]
        assert cached(http, "Where are we?") == pinned["num_tokens"]
        assert cached(http, "9 knots. Is that fast?") >= pinned["num_tokens"]
        kill_worker(appliance)
        assert cached(http, "Is it late?") == pinned["num_tokens"]
    with running_appliance(home) as appliance, appliance.client() as http:
        assert json.loads(edge(appliance, "--list", "--json")) == {"prefixes": []}, "nothing is loaded"
        (listed,) = json.loads(edge(appliance, DEFAULT_MODEL, "--list", "--json"))["prefixes"]
        assert {**listed, "in_memory": True, "num_uses": 0} == {**pinned, "num_uses": 0}
        assert "boat-crew" in edge(appliance, "--list")
        assert cached(http, "Shall we eat?") >= pinned["num_tokens"]
        assert "boat-crew is unpinned" in edge(appliance, DEFAULT_MODEL, "--remove", "boat-crew")
        assert "No prefix of" in edge(appliance, DEFAULT_MODEL, "--remove", "boat-crew", code=1)
        assert http.get("/edge/v1/prefixes").json() == {"prefixes": []}


def kill_worker(appliance: RunningAppliance) -> None:
    (worker,) = appliance.worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: appliance.worker_pids() not in ([worker], []), what="a new worker")


def test_what_cannot_be_pinned_is_refused(home: Path) -> None:
    with running_appliance(home, EDGE_STATE_BYTES=str(4 << 20)) as appliance, appliance.client() as http:
        for body, status, code in (
            ({"system": SYSTEM}, 507, "no_room_to_pin"),
            ({"system": "Be brief."}, 400, "invalid_request"),
            ({"system": SYSTEM, "name": "../x"}, 400, "invalid_request"),
            ({"system": ""}, 400, "invalid_request"),
            ({"system": SYSTEM * 1000}, 400, "context_length_exceeded"),
        ):
            reply = http.post("/edge/v1/prefixes", json={"model": DEFAULT_MODEL, **body})
            assert (reply.status_code, reply.json()["code"]) == (status, code)
        assert http.get("/edge/v1/prefixes").json() == {"prefixes": []}


def test_rm_removes_what_was_computed_for_the_model(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        http.post("/edge/v1/prefixes", json={"model": DEFAULT_MODEL, "system": SYSTEM}).raise_for_status()
    assert states_of(home)
    done = run_edge("rm", DEFAULT_MODEL, "--yes", home=home)
    assert done.returncode == 0, done.stderr
    assert not (home / "states").exists() or not list((home / "states").iterdir())
