"""What a request, or somebody outside, can do to a worker, and what that costs the others."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import (
    RunningAppliance,
    chat_body,
    model_info,
    run_edge,
    running_appliance,
    sse_events,
    wait_until,
)

ROOT = Path(__file__).parents[2]
BOMBS = f"{ROOT / 'tests' / 'bombs'}:{ROOT}"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance whose worker can be harmed by a stop string."""
    with running_appliance(tmp_path_factory.mktemp("home"), PYTHONPATH=BOMBS) as appliance:
        yield appliance


def restarts(http: httpx.Client) -> int:
    return model_info(http)["num_restarts"]


def ask(appliance: RunningAppliance, **more: Any) -> httpx.Response:
    with appliance.client() as http:
        return http.post(CHAT, json=chat_body(more.pop("prompt", "Hi"), **more))


def test_one_bomb_among_sixteen_clients_costs_two_deaths_and_nobody_else(fragile: RunningAppliance) -> None:
    bomb = chat_body("Tell me a secret.", max_tokens=24, ignore_eos=True, stop=["bomb:abort@8"])
    crowd = [chat_body(f"Write about the number {i}.", max_tokens=16, ignore_eos=True) for i in range(15)]

    def post(body: dict[str, Any]) -> httpx.Response:
        with fragile.client() as http:
            return http.post(CHAT, json=body)

    ask(fragile, max_tokens=2).raise_for_status()
    with ThreadPoolExecutor(16) as pool:
        refused, *answers = list(pool.map(post, [bomb, *crowd]))
    assert [r.status_code for r in answers] == [200] * 15
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == "request_poisoned"
    with fragile.client() as http:
        assert restarts(http) == 2
        assert http.post(CHAT, json=bomb).status_code == 422
        assert restarts(http) == 2

    (kept,) = json.loads(run_edge("replay", "--json", home=fragile.home).stdout)
    assert kept["id"] in error["message"]
    assert kept["reasons"] == ["signal 6", "signal 6"]
    shown = json.loads(run_edge("replay", kept["id"], "--show", "--json", home=fragile.home).stdout)
    assert "secret" in json.dumps(shown["request"])
    again = run_edge("replay", kept["id"], "--json", home=fragile.home, PYTHONPATH=BOMBS)
    assert again.returncode == 1
    assert json.loads(again.stdout) | {"seconds": 0} == {
        "id": kept["id"], "outcome": "engine died", "detail": "signal 6", "num_output": 8, "seconds": 0,
    }  # fmt: skip
    harmless = run_edge("replay", kept["id"], home=fragile.home)
    assert harmless.returncode == 0
    assert harmless.stdout.startswith("answered after 24 tokens")
    assert run_edge("replay", kept["id"], "--remove", home=fragile.home).returncode == 0
    assert json.loads(run_edge("replay", "--json", home=fragile.home).stdout) == []


def test_copies_of_a_bomb_cost_no_more_deaths_than_one(fragile: RunningAppliance) -> None:
    ask(fragile, max_tokens=2).raise_for_status()

    def bomb(_: int) -> httpx.Response:
        return ask(fragile, max_tokens=24, ignore_eos=True, stop=["bomb:abort@6"])

    with fragile.client() as http, ThreadPoolExecutor(6) as pool:
        before = restarts(http)
        assert [r.status_code for r in pool.map(bomb, range(6))] == [422] * 6
        assert restarts(http) == before + 2


def test_a_stream_that_had_begun_ends_with_an_error_event(fragile: RunningAppliance) -> None:
    body = chat_body("Count.", max_tokens=64, ignore_eos=True, stop=["bomb:abort@20"], stream=True)
    with fragile.client() as http:
        with http.stream("POST", CHAT, json=body) as r:
            *_, last = sse_events(r.iter_lines())
        assert last["error"]["code"] == "worker_died"
        with http.stream("POST", CHAT, json=body) as r:
            *_, last = sse_events(r.iter_lines())
        assert last["error"]["code"] == "request_poisoned"
        assert http.post(CHAT, json=body).status_code == 422


def test_a_killed_worker_is_nobodys_fault(fragile: RunningAppliance) -> None:
    """Killed from outside twice, the second time while the request may be alone: it is answered all the same."""
    ask(fragile, max_tokens=2).raise_for_status()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, fragile, prompt="Write a long story.", max_tokens=300, ignore_eos=True)
        for _ in range(2):
            with fragile.client() as http:
                wait_until(lambda: _cells_in_use(http) > 60, what="the request to be computed")
            (worker,) = fragile.worker_pids()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: worker not in fragile.worker_pids(), what="the worker to be replaced")  # noqa: B023
        assert answer.result().status_code == 200


def _cells_in_use(http: httpx.Client) -> int:
    model = model_info(http)
    return model["kv_cells_used"] if model["requests_active"] else 0


def test_a_worker_that_eats_memory_meets_its_limit(fragile: RunningAppliance) -> None:
    refused = ask(fragile, stop=["bomb:eat"], max_tokens=8)
    assert refused.status_code == 422
    ask(fragile, max_tokens=2).raise_for_status()


def test_a_stopped_worker_is_replaced_and_its_request_answered(fragile: RunningAppliance) -> None:
    ask(fragile, max_tokens=2).raise_for_status()
    (worker,) = fragile.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    ask(fragile, prompt="Are you there?", max_tokens=8).raise_for_status()
    assert fragile.worker_pids() != [worker]
    assert "it was stopped from outside" in fragile.log()


def test_the_worker_is_limited(fragile: RunningAppliance) -> None:
    ask(fragile, max_tokens=2).raise_for_status()
    (worker,) = fragile.worker_pids()
    limits = Path(f"/proc/{worker}/limits").read_text("ascii").splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert soft["Max core file size"] == "0"
    assert int(soft["Max open files"]) <= 256
    assert int(soft["Max data size"]) < 8 << 30
    assert int(Path(f"/proc/{worker}/oom_score_adj").read_text("ascii")) >= 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_at_its_deadline(fragile: RunningAppliance, stream: bool) -> None:
    body = chat_body("Write.", max_tokens=4000, ignore_eos=True, timeout_s=0.7, stream=stream)
    with fragile.client() as http:
        with http.stream("POST", CHAT, json=body) as r:
            if stream:
                *_, error = sse_events(r.iter_lines())
            else:
                assert r.status_code == 504
                error = json.loads(r.read())
        assert error["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: http.get("/edge/v1/status").json()["requests_active"] == 0)


def test_what_a_stopped_worker_does_not_read_is_bounded(home: Path) -> None:
    with running_appliance(home, EDGE_MAX_QUEUE="3", EDGE_MAX_SEQUENCES="1") as appliance:
        ask(appliance, max_tokens=2).raise_for_status()
        (worker,) = appliance.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        held = [threading.Thread(target=ask, args=(appliance,), kwargs={"max_tokens": 2}) for _ in range(4)]
        for thread in held:
            thread.start()
        with appliance.client() as http:
            wait_until(lambda: http.get("/edge/v1/status").json()["requests_active"] == 4)
        reply = ask(appliance, max_tokens=2)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) > 0
        os.kill(worker, signal.SIGCONT)
        for thread in held:
            thread.join()
