"""The admin API: what was decided and why, settings, pins, keys, the log as it grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from edge.access.keys import ROLES, Key, Keys, Limits
from tests.edge.file_server import FileServer, serve
from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body, model_info, run_edge, wait_until
from tui.client import Address, RuntimeClient

EMBEDDER = "minilm:l6-v2"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as served:
        yield served


def make(appliance: RunningAppliance, **limits: Any) -> tuple[Key, httpx.Client]:
    """A key and a client that has it."""
    key, secret = Keys(appliance.home / "state.db", actor="test").create(Limits(**limits))
    return key, appliance.client(headers={"authorization": f"Bearer {secret}"})


def decisions(http: httpx.Client, model: str) -> dict[str, tuple[Any, str]]:
    found = http.get(f"/edge/v1/explain/{model}").raise_for_status().json()["decisions"]
    return {d["name"]: (d["value"], d["reason"]) for d in found}


def test_every_decision_about_a_model_has_a_reason(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL}).raise_for_status()
        before = decisions(http, "smollm2")
        assert before["cells"][0] is None
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).raise_for_status()
        wait_until(lambda: "memory" in decisions(http, DEFAULT_MODEL), what="the first heartbeat")
        after, info = decisions(http, DEFAULT_MODEL), model_info(http)
        vectors = decisions(http, EMBEDDER)
        assert http.get("/edge/v1/explain/absent:x").status_code == 404
    assert before.keys() < after.keys()
    for found in (before, after, vectors):
        assert {"backend", "threads", "tuning", "stays loaded"} <= found.keys()
        assert all(reason.strip() for _, reason in found.values())
    assert after["cells"][0] == info["kv_cells"]
    assert "8,192" in after["context"][1] or after["context"][0] == 8192
    assert after["draft"] == (None, "neither package nor operator names one")
    assert "default" in after["max_sequences"][1]
    assert "cells" not in vectors


def test_settings_say_where_they_come_from(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        settings = {s["name"]: s for s in http.get("/edge/v1/config").raise_for_status().json()["settings"]}
    assert (settings["port"]["value"], settings["port"]["origin"]) == (appliance.port, "flag")
    assert (settings["preload"]["value"], settings["preload"]["origin"]) == ("off", "environment")
    assert settings["max_queue"]["origin"] == "default"
    told = json.loads(run_edge("config", "--running", "--json", home=appliance.home).stdout)
    assert told == {name: {"value": s["value"], "origin": s["origin"]} for name, s in settings.items()}


def test_the_command_explains(appliance: RunningAppliance) -> None:
    told = json.loads(run_edge("explain", DEFAULT_MODEL, "--json", home=appliance.home).stdout)
    shown = run_edge("explain", "smollm2", home=appliance.home).stdout
    assert told["model"] == DEFAULT_MODEL
    assert all(d["name"] in shown for d in told["decisions"])


async def test_the_typed_client_pins_explains_and_makes_keys(appliance: RunningAppliance) -> None:
    async with RuntimeClient(Address(appliance.url)) as client:
        assert (await client.pin(DEFAULT_MODEL)).is_pinned
        assert not (await client.unpin("smollm2")).is_pinned
        assert (await client.explain(DEFAULT_MODEL)).model == DEFAULT_MODEL
        assert {s.name for s in await client.config()} >= {"host", "pull_hosts"}
        made = await client.create_key("typed", role="viewer", rpm=60)
        assert made.info in await client.keys()
        await client.revoke_key("typed")
        assert made.info not in await client.keys()
    lines = json.loads(run_edge("audit", "show", "--json", home=appliance.home).stdout)["lines"]
    acts = [(line["act"], line["target"]) for line in lines]
    assert [a for a in acts if "pin" in a[0]][-2:] == [("model.pin", DEFAULT_MODEL), ("model.unpin", "smollm2")]
    named = f"{made.info.id} (typed)"
    assert [("key.create", named), ("key.revoke", named)] == [a for a in acts if a[1] == named]


def test_a_key_that_is_made_works_until_it_is_revoked(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post("/edge/v1/keys", json={"name": "shelf", "scopes": ["view"], "models": ["smollm2:*"]})
        assert (reply.status_code, reply.headers["cache-control"]) == (201, "no-store")
        ours = {"authorization": f"Bearer {reply.json()['key']}"}
        assert http.get("/edge/v1/models", headers=ours).status_code == 200
        assert http.get("/edge/v1/keys", headers=ours).status_code == 403
        assert reply.json()["key"] not in http.get("/edge/v1/keys").text
        assert http.delete("/edge/v1/keys/shelf").status_code == 204
        assert http.get("/edge/v1/models", headers=ours).status_code == 401
        assert http.delete("/edge/v1/keys/nobody").status_code == 404
        both = {"role": "user", "scopes": ["chat"]}
        several: list[dict[str, Any]] = [{"model": ["a"]}, {"scopes": []}, {"scopes": ["all"]}, {"rpm": 0}, both]
        for wrong in several:
            assert http.post("/edge/v1/keys", json={"name": "wrong", **wrong}).status_code == 400, wrong
        assert "wrong" not in http.get("/edge/v1/keys").text


def test_a_key_for_some_models_sees_nothing_of_the_others(appliance: RunningAppliance) -> None:
    _, client = make(appliance, scopes=ROLES["admin"], models=("mine:*",))
    with client as http:
        whole = ("/metrics", "/edge/v1/logs", "/edge/v1/config", "/edge/v1/keys")
        assert [http.get(path).status_code for path in whole] == [403] * len(whole)
        assert http.post("/edge/v1/keys", json={"name": "wider"}).status_code == 403
        assert http.get(f"/edge/v1/explain/{DEFAULT_MODEL}").status_code == 404
        assert http.post("/edge/v1/models/pin", json={"model": DEFAULT_MODEL}).status_code == 404


def names_of(lines: Iterator[str], *, until: str) -> Iterator[str]:
    """Names of events, to the one whose data has this text."""
    for line in lines:
        if line.startswith("event: "):
            yield line.removeprefix("event: ")
        elif until in line:
            return


def test_lines_of_the_log_are_events_for_who_may_read_it(appliance: RunningAppliance) -> None:
    _, limited = make(appliance, scopes=ROLES["viewer"], models=(EMBEDDER,))
    with (
        appliance.client() as http,
        limited,
        http.stream("GET", "/edge/v1/events") as all_events,
        limited.stream("GET", "/edge/v1/events") as some_events,
    ):
        lines, others = all_events.iter_lines(), some_events.iter_lines()
        assert (next(lines), next(others)) == ("event: status", "event: status")
        http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL}).raise_for_status()
        http.post("/edge/v1/models/load", json={"model": DEFAULT_MODEL}).raise_for_status()
        assert "log" in list(names_of(lines, until=f"{DEFAULT_MODEL} is ready"))
        names = names_of(others, until="never said")
        assert {next(names) for _ in range(3)} == {"status"}


def test_a_key_has_nothing_pulled_from_this_devices_networks(appliance: RunningAppliance, server: FileServer) -> None:
    _, client = make(appliance, scopes=ROLES["operator"])
    with closing(client) as theirs, appliance.client() as ours:
        for http, reason in ((theirs, "no address of the internet"), (ours, "404")):
            job = http.post("/edge/v1/models/pull", json={"source": f"{server.url}/x.gguf"}).raise_for_status().json()
            wait_until(lambda http=http, job=job: ended(http, job["id"]), what="the pull to end")
            failed = http.get(f"/edge/v1/jobs/{job['id']}").json()
            assert failed["state"] == "failed"
            assert reason in failed["error"]
            assert bool(server.asked) == (http is ours)


def ended(http: httpx.Client, job_id: str) -> bool:
    return http.get(f"/edge/v1/jobs/{job_id}").json()["state"] not in ("queued", "running")
