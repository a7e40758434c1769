"""Starting, stopping, failing: what happens to the others."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx

from edge.store.details import ModelDetails
from edge.store.models import ModelStore, PackageFile
from tests.support import DEFAULT_MODEL, SEED, chat_body, model_info, run_edge, running_appliance, wait_until


def test_a_second_appliance_leaves_the_first_ones_socket(home: Path) -> None:
    with running_appliance(home) as first:
        second = run_edge("serve", "--port", "0", home=home)
        assert second.returncode == 2
        assert "already" in second.stderr
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(first.socket)), base_url="http://edge") as http:
            assert http.get("/livez").status_code == 200


def test_the_default_model_is_loaded_at_the_start_where_it_is_in_the_store(home: Path) -> None:
    with running_appliance(home, EDGE_PRELOAD="auto") as appliance, appliance.client() as http:
        wait_until(lambda: model_info(http)["state"] == "ready", what="the model")
    with (
        running_appliance(home, EDGE_PRELOAD="auto", EDGE_DEFAULT_MODEL="not:there") as appliance,
        appliance.client() as http,
    ):
        assert http.get("/readyz").status_code == 200
        assert appliance.worker_pids() == []


def test_a_model_that_cannot_be_served_fails_at_once_and_leaves_no_process(home: Path) -> None:
    seeded = ModelStore(home / "store", seed=SEED).get(DEFAULT_MODEL)
    files = [PackageFile(seeded.weights, name) for name in ("a.gguf", "b.gguf")]
    ModelStore(home / "store").add("two:x", files, ModelDetails())
    with running_appliance(home) as appliance, appliance.client() as http:
        for _ in range(3):
            reply = http.post("/v1/chat/completions", json=chat_body("Hi", model="two:x"))
            assert reply.status_code == 400
            assert "weight files" in reply.json()["error"]["message"]
        assert appliance.worker_pids() == []
        assert model_info(http, "two:x")["state"] == "failed"
        assert http.get("/readyz").status_code == 200
        http.delete(f"/edge/v1/models/{DEFAULT_MODEL}").raise_for_status()
        infos = http.get("/edge/v1/models").json()["models"]
        assert "embeddings" in [i["kind"] for i in infos]
        wait_until(lambda: http.get("/readyz").status_code == 503, what="it to be seen that none makes text")
        ready, health = http.get("/readyz"), http.get("/health")
        assert (ready.status_code, health.status_code) == (503, 503)
        assert (ready.json(), health.json()) == ({"status": "no model can be loaded"}, {"status": "error"})


def test_loads_and_unloads_beside_requests_leave_one_worker(home: Path) -> None:
    with running_appliance(home) as appliance:
        until = time.monotonic() + 5

        def ask() -> None:
            with appliance.client() as http:
                while time.monotonic() < until:
                    http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2))

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for thread in askers:
            thread.start()
        with appliance.client() as http:
            while time.monotonic() < until:
                http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL})
            for thread in askers:
                thread.join()
            http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
            assert len(appliance.worker_pids()) == 1
            http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL}).raise_for_status()
            assert appliance.worker_pids() == []


def test_slow_pulls_do_not_hold_the_api(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(32)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        jobs = [http.post("/edge/v1/models/pull", json={"source": f"{url}/{i}.gguf"}) for i in range(8)]
        assert {j.status_code for j in jobs} == {202}
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
        states = {j["state"] for j in http.get("/edge/v1/jobs").json()["jobs"]}
        assert states == {"queued", "running"}


def test_the_events_outlive_a_damaged_index(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http, http.stream("GET", "/edge/v1/events") as r:
        lines = r.iter_lines()
        assert "status" in next(lines)
        index = home / "store" / "index.json"
        whole = index.read_bytes()
        index.write_bytes(b"{")
        wait_until(lambda: "no status" in appliance.log(), what="the failure to be noticed")
        index.write_bytes(whole)
        assert sum("event: status" in line for line, _ in zip(lines, range(12), strict=False)) >= 2


def test_a_second_signal_ends_at_once(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        body = chat_body("Write.", max_tokens=7000, stream=True, ignore_eos=True)
        with http.stream("POST", "/v1/chat/completions", json=body) as r:
            lines = r.iter_lines()  # kept: an iterator that is thrown away closes the connection
            next(lines)
            appliance.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in appliance.log())
            appliance.process.send_signal(signal.SIGTERM)
            assert appliance.process.wait(15) is not None


def test_a_hung_load_and_a_stopped_worker_do_not_stop_the_front(home: Path) -> None:
    with running_appliance(home) as appliance, appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
        (worker,) = appliance.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        assert http.get("/livez").status_code == 200
        os.kill(worker, signal.SIGKILL)
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).raise_for_status()
