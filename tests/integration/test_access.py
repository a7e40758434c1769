"""Keys over the wire: who is let in, what he may do, what he is told, and what he is charged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edge import __version__
from edge.access.keys import ROLES, Key, Keys, Limits
from edge.store.models import ModelStore
from tests.support import (
    DEFAULT_MODEL,
    SEED,
    RunningAppliance,
    chat_body,
    edge_env,
    free_port,
    run_edge,
    running_appliance,
    sse_events,
    start_appliance,
    stop,
    wait_until,
)

TLS = Path(__file__).parents[1] / "goldens" / "tls"
NOT_OURS = "edge_" + "a" * 10 + "_" + "b" * 40


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance that asks for keys on loopback too."""
    with running_appliance(
        tmp_path_factory.mktemp("guarded"), "--require-keys", "on", EDGE_CORS_ORIGINS="https://panel.example"
    ) as running:
        yield running


def make(appliance: RunningAppliance, **limits: Any) -> tuple[Key, str]:
    return Keys(appliance.home / "state.db", actor="test").create(Limits(**limits))


def client(appliance: RunningAppliance, key: str) -> httpx.Client:
    return appliance.client(headers={"authorization": f"Bearer {key}"})


def usage_of(appliance: RunningAppliance, key: Key) -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(run_edge("usage", "--by", "key", "--json", home=appliance.home).stdout)[
        "usage"
    ]
    return next((row for row in rows if row["key"] == key.id), dict[str, Any]())


def acts_of(appliance: RunningAppliance, key: Key) -> list[tuple[str, str, str]]:
    lines = json.loads(run_edge("audit", "show", "--json", home=appliance.home).stdout)["lines"]
    return [(x["act"], x["target"], x["outcome"]) for x in lines if x["actor"] == f"key {key.id} ({key.id})"]


def wait_for_usage(appliance: RunningAppliance, key: Key, requests: int) -> dict[str, Any]:
    wait_until(lambda: usage_of(appliance, key).get("requests") == requests, what=f"{requests} requests to be counted")
    return usage_of(appliance, key)


# ---------------------------------------------------------------- who is let in


def test_without_a_key_only_the_health_is_told(guarded: RunningAppliance) -> None:
    with guarded.client() as http:
        for path in ("/livez", "/readyz", "/health", "/", "/docs", "/docs/openapi.json"):
            reply = http.get(path)
            assert reply.status_code == 200, path
            assert __version__ not in reply.text + str(reply.headers), path
        for path in ("/v1/models", "/metrics", "/edge/v1/status", "/edge/v1/logs", "/edge/v1/events"):
            reply = http.get(path)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == 'Bearer realm="slm-edge"'
        reply = http.post("/v1/chat/completions", json=chat_body("Hi"))
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
        problem = http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL})
        assert problem.headers["content-type"] == "application/problem+json"
        assert problem.json()["code"] == "invalid_api_key"


def test_openai_and_anthropic_clients_present_keys(guarded: RunningAppliance) -> None:
    _, key = make(guarded)
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as ours:
        assert DEFAULT_MODEL in [m.id for m in ours.models.list()]
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-none", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    with guarded.client() as http:
        assert http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"bEARER   {key}"}).status_code == 200


def _raw(appliance: RunningAppliance, head: bytes) -> int:
    """The status of the answer to a request as it stands."""
    with socket.create_connection(("127.0.0.1", appliance.port), timeout=20) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + head + b"\r\n")
        reply = b""
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                reply += data
    return int(reply.split()[1]) if reply else 0


def test_tricks_with_headers_let_nobody_in(guarded: RunningAppliance) -> None:
    made, text = make(guarded)
    key = text.encode()
    good = b"Authorization: Bearer " + key + b"\r\n"
    assert _raw(guarded, good) == 200
    refused = [
        b"Authorization: " + key + b"\r\n",
        b"Authorization: Basic " + key + b"\r\n",
        b"Authorization: Bearer" + key + b"\r\n",
        b"Authorization: Bearer " + key + b"x\r\n",
        b"Authorization: Bearer " + key[:-1] + b"\r\n",
        b"Authorization: Bearer " + key.upper() + b"\r\n",
        b"Authorization: Bearer " + key + b"\0\r\n",
        b"Authorization: Bearer " + key[:-1] + "é".encode() + b"\r\n",
        b"Authorization: Bearer " + key + b", " + key + b"\r\n",
        b"Authorization: Bearer " + b"A" * 60_000 + b"\r\n",
        b"Authorization: Bearer " + NOT_OURS.encode() + b"\r\n" + good,
        good + b"Authorization: Bearer none\r\n",
        good + b"x-api-key: " + NOT_OURS.encode() + b"\r\n",
        b"Authorization : Bearer " + key + b"\r\n",
        b"Authorization:\r\n Bearer " + key + b"\r\n",
        b"X_Api_Key: " + key + b"\r\n",
        b"Proxy-Authorization: Bearer " + key + b"\r\n",
        b"Cookie: authorization=Bearer " + key + b"\r\n",
        b"X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n",
        b"X-Original-URL: /livez\r\n",
    ]
    statuses = [_raw(guarded, head) for head in refused]
    assert set(statuses) <= {400, 401, 431}, statuses
    assert _raw(guarded, good + good) == 200, "the same key twice is one key"
    with guarded.client() as http:
        for path in (
            f"/v1/models?api_key={text}",
            f"/v1/models?key={text}",
            "/v1/models/?x",
            "//v1/models",
            "/V1/models",
        ):
            assert http.get(path).status_code in (401, 404), path
        assert http.get("/edge%2Fv1/status").status_code in (401, 404)
        assert http.get("/livez/../v1/models").status_code in (401, 404)
        assert http.request("HEAD", "/v1/models").status_code in (401, 405)
    Keys(guarded.home / "state.db", actor="test").revoke(made.id)
    assert _raw(guarded, good) == 401


def test_a_key_that_is_revoked_by_a_command_fails_on_its_next_request(guarded: RunningAppliance) -> None:
    made = json.loads(run_edge("key", "create", "tablet", "--role", "viewer", "--json", home=guarded.home).stdout)
    with client(guarded, made["key"]) as http:
        assert http.get("/edge/v1/jobs").status_code == 200
        with http.stream("GET", "/edge/v1/events") as events:
            lines = events.iter_lines()
            assert "status" in next(lines)
            run_edge("key", "revoke", "tablet", home=guarded.home)
            assert http.get("/edge/v1/jobs").status_code == 401
            assert sum("event: status" in line for line in lines) <= 3, "the stream of events ends as well"


def test_no_request_that_begins_after_the_revoking_is_answered(guarded: RunningAppliance) -> None:
    for _ in range(3):
        made, key = make(guarded)
        revoked = threading.Event()

        def ask(key: str = key, revoked: threading.Event = revoked) -> list[tuple[bool, int]]:
            asked: list[tuple[bool, int]] = []
            with client(guarded, key) as http:
                while sum(late for late, _ in asked) < 5:
                    is_late = revoked.is_set()
                    asked.append((is_late, http.get("/v1/models").status_code))
            return asked

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(ask) for _ in range(4)]
            Keys(guarded.home / "state.db", actor="test").revoke(made.id)
            revoked.set()
            asked = [pair for future in futures for pair in future.result(60)]
        assert {status for late, status in asked if late} == {401}


def test_the_socket_needs_no_key_and_junk_passes_there(guarded: RunningAppliance) -> None:
    transport = httpx.HTTPTransport(uds=str(guarded.socket))
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as http:
        for headers in ({}, {"authorization": "Bearer none"}, {"x-api-key": "ollama"}):
            assert http.get("/edge/v1/jobs", headers=headers).status_code == 200
        assert http.get("/edge/v1/jobs", headers={"authorization": f"Bearer {NOT_OURS}"}).status_code == 401


def test_loopback_lets_pass_what_clients_always_send(appliance: RunningAppliance) -> None:
    made, key = make(appliance, scopes=ROLES["viewer"])
    with appliance.client() as http:
        for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "Basic eDp5"}, {"x-api-key": "x"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        ours = {"authorization": f"Bearer {key}"}
        assert http.post("/v1/chat/completions", json=chat_body("Hi"), headers=ours).status_code == 403
        Keys(appliance.home / "state.db", actor="test").revoke(made.id)
        assert http.get("/v1/models", headers=ours).status_code == 401, "it does not turn into nobody, who may all"


def test_keys_end_with_their_file(home: Path) -> None:
    home.mkdir()
    with running_appliance(home, "--require-keys", "on") as appliance:
        _, key = make(appliance)
        with client(appliance, key) as http:
            assert http.get("/v1/models").status_code == 200
            for path in home.glob("state.db*"):
                path.unlink()
            assert http.get("/v1/models").status_code >= 400
            _, second = make(appliance)
            assert http.get("/v1/models").status_code == 401
            assert http.get("/v1/models", headers={"authorization": f"Bearer {second}"}).status_code == 200


# ---------------------------------------------------------------- what a key may do


def test_scopes_reach_so_far_and_no_further(guarded: RunningAppliance) -> None:
    calls = {
        "chat": ("POST", "/v1/chat/completions"),
        "embed": ("POST", "/v1/embeddings"),
        "view": ("GET", "/edge/v1/jobs"),
        "operate": ("POST", "/edge/v1/telemetry/flush"),
        "admin": ("DELETE", "/edge/v1/models/nobody"),
    }
    for role, scopes in ROLES.items():
        _, key = make(guarded, scopes=scopes)
        with client(guarded, key) as http:
            for scope, (method, path) in calls.items():
                status = http.request(method, path, json={} if method == "POST" else None).status_code
                assert (status == 403) == (scope not in scopes), (role, scope, status)


def test_who_operates_does_not_lower_what_releases_are_accepted(guarded: RunningAppliance) -> None:
    _, key = make(guarded, scopes=ROLES["operator"])
    with client(guarded, key) as http:
        forced = {"model": DEFAULT_MODEL, "force": True}
        assert http.post("/edge/v1/slots/x/activate", json=forced).status_code == 403
        assert http.post("/edge/v1/slots/x/rollback", params={"force": "true"}).status_code == 403
        assert http.get("/edge/v1/slots").json() == {"slots": []}


def test_a_key_sees_and_asks_its_own_models_only(guarded: RunningAppliance) -> None:
    _, none = make(guarded, models=("other:*",))
    _, some = make(guarded, models=("smollm2:*",))
    with client(guarded, none) as http:
        assert http.get("/v1/models").json()["data"] == []
        replies = [
            http.get(f"/v1/models/{DEFAULT_MODEL}"),
            http.get("/v1/models/smollm2"),
            http.get("/v1/models/absent"),
        ]
        names = [{"model": name} for name in (DEFAULT_MODEL, "smollm2", "absent", f"other:x+{DEFAULT_MODEL}")]
        for fields in (*names, {"lora": [{"name": DEFAULT_MODEL}], "model": "other:x"}):
            replies += [http.post("/v1/chat/completions", json=chat_body("Hi") | fields)]
        for reply in replies:
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
            assert "135m-instruct" not in reply.text.replace(f"The model '{DEFAULT_MODEL}'", ""), "no name is told"
    with client(guarded, some) as http:
        names = [m["id"] for m in http.get("/v1/models").json()["data"]]
        assert names
        assert all(name.startswith("smollm2:") for name in names)
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).status_code == 200
        reply = http.post("/v1/embeddings", json={"model": DEFAULT_MODEL, "input": "x"})
        assert reply.status_code == 400
        assert "minilm" not in reply.text


def test_a_key_acts_on_its_own_models_only(guarded: RunningAppliance) -> None:
    made, key = make(guarded, scopes=ROLES["admin"], models=("mine:*",))
    _, all_models = make(guarded, scopes=ROLES["admin"])
    with client(guarded, all_models) as http:
        http.post("/api/copy", json={"source": DEFAULT_MODEL, "destination": "mine:a"}).raise_for_status()
        job = http.post("/edge/v1/models/pull", json={"source": DEFAULT_MODEL}).json()["id"]
    other = {"model": DEFAULT_MODEL}
    with client(guarded, key) as http:
        absent = [
            http.post("/edge/v1/models/load", json=other),
            http.post("/edge/v1/models/unload", json=other),
            http.delete(f"/edge/v1/models/{DEFAULT_MODEL}"),
            http.request("DELETE", "/api/delete", json=other),
            http.post("/edge/v1/prefixes", json=other | {"system": "You."}),
            http.get("/edge/v1/prefixes", params=other),
            http.delete("/edge/v1/prefixes/x", params=other),
            http.post("/api/copy", json={"source": DEFAULT_MODEL, "destination": "mine:b"}),
            http.post("/api/create", json={"model": "mine:b", "from": DEFAULT_MODEL}),
            http.post("/api/generate", json=other | {"keep_alive": 0}),
            http.post("/edge/v1/slots/x/activate", json=other),
            http.post("/edge/v1/slots/x/rollback"),
            http.delete("/edge/v1/slots/x"),
            http.get(f"/edge/v1/jobs/{job}"),
            http.post(f"/edge/v1/jobs/{job}/cancel"),
        ]
        assert {reply.status_code for reply in absent} == {404}, [(r.status_code, r.text) for r in absent]
        refused = [
            http.post("/api/copy", json={"source": "mine:a", "destination": "theirs:a"}),
            http.post("/api/create", json={"model": "theirs:a", "from": "mine:a"}),
            http.post("/api/pull", json={"model": DEFAULT_MODEL}),
            http.post("/edge/v1/models/pull", json={"source": DEFAULT_MODEL}),
            http.post("/edge/v1/models/pull", json={"source": DEFAULT_MODEL, "name": "theirs:a"}),
            http.post("/edge/v1/models/pull", json={"source": "https://localhost:9/x.gguf"}),
        ]
        assert {reply.status_code for reply in refused} == {403}, [(r.status_code, r.text) for r in refused]
        for what in (http.get("/edge/v1/models").json(), http.get("/edge/v1/status").json()):
            assert [m["ref"] for m in what["models"]] == ["mine:a"]
        assert http.get("/edge/v1/status").json()["jobs"] == http.get("/edge/v1/jobs").json()["jobs"] == []
        with http.stream("GET", "/edge/v1/events") as events:
            lines = (line for line in events.iter_lines() if line.startswith("data: "))
            assert DEFAULT_MODEL not in next(lines) + next(lines)
        assert http.post("/edge/v1/models/load", json={"model": "mine:a"}).status_code == 200
        assert http.post("/api/copy", json={"source": "mine:a", "destination": "mine:b"}).status_code == 200
        assert http.post("/api/generate", json={"model": "mine:a", "keep_alive": 0}).status_code == 200
        for name in ("mine:a", "mine:b"):
            assert http.delete(f"/edge/v1/models/{name}").status_code == 204
    assert ("model.unload", "mine:a", "ok") in acts_of(guarded, made)


def test_bytes_of_others_models_are_not_there(guarded: RunningAppliance) -> None:
    _, key = make(guarded, scopes=ROLES["operator"], models=("mine:*",))
    weights = ModelStore(guarded.home / "store", seed=SEED).get(DEFAULT_MODEL).files[0]
    with client(guarded, key) as http:
        assert http.head(f"/api/blobs/{weights.digest}").status_code == 404
        body = {"model": "mine:c", "files": {"c.gguf": str(weights.digest)}}
        assert http.post("/api/create", json=body).status_code == 400


def test_a_sent_blob_is_in_the_audit_log(guarded: RunningAppliance) -> None:
    made, key = make(guarded, scopes=ROLES["operator"])
    data = b"no model, but bytes"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with client(guarded, key) as http:
        assert http.post(f"/api/blobs/{digest}", content=b"others").status_code == 422
        assert http.post(f"/api/blobs/{digest}", content=data).status_code == 201
    assert acts_of(guarded, made) == [("blob.upload", digest, "digest_mismatch"), ("blob.upload", digest, "ok")]


def test_files_of_the_device_are_pulled_by_its_own_programs(guarded: RunningAppliance, tmp_path: Path) -> None:
    made, key = make(guarded, scopes=ROLES["admin"])
    file = tmp_path / "file.gguf"
    file.write_bytes(b"GGUF")
    with client(guarded, key) as http:
        for source in (str(file), f"file://{file}", "/proc/self/pagemap", str(tmp_path), "absent"):
            reply = http.post("/edge/v1/models/pull", json={"source": source})
            assert (reply.status_code, reply.json()["code"]) == (403, "forbidden"), source
        signed = "http://127.0.0.1:9/x.gguf?X-Amz-Signature=5ecret"
        job = http.post("/edge/v1/models/pull", json={"source": signed}).json()
        assert job["subject"] == signed.partition("?")[0]
        http.post("/edge/v1/models/pull", json={"source": signed}).raise_for_status()
        wait_until(lambda: not _unfinished(http), what="the pulls to end")
        assert "5ecret" not in http.get("/edge/v1/jobs").text + http.get("/edge/v1/logs").text
    assert "5ecret" not in str(acts_of(guarded, made))
    transport = httpx.HTTPTransport(uds=str(guarded.socket))
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as http:
        for headers in ({}, {"authorization": f"Bearer {key}"}):
            assert http.post("/edge/v1/models/pull", json={"source": str(file)}, headers=headers).status_code == 202


def _unfinished(http: httpx.Client) -> list[str]:
    return [job["id"] for job in http.get("/edge/v1/jobs").json()["jobs"] if job["state"] in ("queued", "running")]


def test_limits_are_held_and_told(guarded: RunningAppliance) -> None:
    _, key = make(guarded, rpm=2, tokens_per_day=100_000)
    with client(guarded, key) as http:
        replies = [http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)) for _ in range(3)]
        assert [r.status_code for r in replies] == [200, 200, 429]
        assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0", "0"]
        assert replies[0].headers["x-ratelimit-limit-requests"] == "2"
        assert int(replies[1].headers["x-ratelimit-remaining-tokens"]) < 100_000
        refused = replies[2]
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert http.get("/v1/models").status_code == 200, "looking is free"
    _, key = make(guarded, tokens_per_day=20)
    with client(guarded, key) as http:
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=8)).status_code == 200
        refused = http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=8))
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert refused.headers["x-should-retry"] == "false"
        assert int(refused.headers["retry-after"]) > 80_000


def test_chunks_count_against_the_day_as_they_come(guarded: RunningAppliance) -> None:
    _, key = make(guarded, tokens_per_day=1000)
    story = json.dumps(chat_body("Tell a story.", max_tokens=500, stream=True, ignore_eos=True)).encode()
    body = json.dumps(chat_body("word " * 600, max_tokens=1)).encode()
    with client(guarded, key) as http, http.stream("POST", "/v1/chat/completions", content=story) as reply:
        lines = reply.iter_lines()
        next(lines)
        with client(guarded, key) as beside:
            for content in (body, iter([body[:1000], body[1000:]])):
                refused = beside.post("/v1/chat/completions", content=content)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


# ---------------------------------------------------------------- what a key is charged


def test_usage_is_what_clients_were_told(guarded: RunningAppliance) -> None:
    """Plain, streamed and doubled answers, failures and clients that leave, at once."""
    made, key = make(guarded)
    rng = random.Random(7)

    def ask(index: int) -> tuple[str, dict[str, Any]]:
        with client(guarded, key) as http:
            match index % 6:
                case 0:
                    body = chat_body(f"Say {index}.", max_tokens=rng.randint(1, 12))
                    return "told", http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
                case 1:
                    body = chat_body(
                        "Say something.", max_tokens=8, stream=True, stream_options={"include_usage": True}
                    )
                    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                        return "told", dict(list(sse_events(reply.iter_lines()))[-1]["usage"])
                case 2:
                    body = chat_body("Say something.", max_tokens=6, n=2, temperature=1)
                    return "told", http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
                case 3:
                    wrong: list[dict[str, object]] = [{"model": "absent"}, {"max_tokens": 10**6}, {"n": -1}]
                    reply = http.post("/v1/chat/completions", json=chat_body("Hi", **rng.choice(wrong)))
                    assert 400 <= reply.status_code < 500
                    return "failed", {}
                case 4:
                    body = chat_body("Tell a story.", max_tokens=4000, stream=True, ignore_eos=True)
                    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                        for _ in zip(range(5), reply.iter_lines(), strict=False):
                            pass
                    return "left", {}
                case _:
                    body = chat_body("Tell a story.", max_tokens=4000, ignore_eos=True)
                    with suppress(httpx.ReadTimeout):
                        http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(20, read=1.0))
                    return "left", {}

    def embed() -> dict[str, Any]:
        with client(guarded, key) as http:
            body = {"model": "minilm:l6-v2", "input": ["A boat.", "The sea."]}
            return http.post("/v1/embeddings", json=body).raise_for_status().json()["usage"]

    embedded = embed()
    num = 36
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(ask, range(num)))
    used = wait_for_usage(guarded, made, num + 1)
    told = [usage for what, usage in outcomes if what == "told"]
    assert used["input_tokens"] == sum(u["prompt_tokens"] for u in [*told, embedded])
    assert used["output_tokens"] == sum(u["completion_tokens"] for u in told)
    assert used["cached_tokens"] == sum(u["prompt_tokens_details"]["cached_tokens"] for u in told)
    assert used["failures"] == sum(what == "failed" for what, _ in outcomes)
    assert used["cancelled"] == sum(what == "left" for what, _ in outcomes)
    assert used["undelivered_tokens"] > 0, "who leaves early pays what was computed for him"


# ---------------------------------------------------------------- what a key may know of others


SECRET = "You work on a boat, where you answer what the crew asks in one short sentence, and never guess. " * 4
PINNED = "You keep the lighthouse, and you tell every ship that asks how the weather is, in very few words. " * 4


def cached(http: httpx.Client, system: str) -> int:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Where are we?"}]
    body = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 2}
    usage = http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
    num_cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return num_cached


def test_another_keys_prefix_is_never_reported_as_cached(home: Path) -> None:
    """Not while it runs, not from the disk after a restart; what is pinned is everybody's."""
    home.mkdir()
    keys = [Keys(home / "state.db", actor="test").create(Limits())[1] for _ in range(2)]
    with running_appliance(home, "--require-keys", "on") as appliance:
        one, two = (client(appliance, key) for key in keys)
        with one, two:
            assert cached(one, SECRET) == 0
            assert cached(one, SECRET) > 80
            assert cached(two, SECRET) == 0, "computed anew: the other key's is not found"
            assert cached(two, SECRET) > 80
            assert cached(one, SECRET + "Be brief.") > 80
            pinned = run_edge("warm", DEFAULT_MODEL, "--system", PINNED, "--name", "lighthouse", home=home)
            assert pinned.returncode == 0, pinned.stderr
            assert cached(one, PINNED) > 80
            assert cached(two, PINNED) > 80
            third = client(appliance, Keys(home / "state.db", actor="test").create(Limits())[1])
            with third:
                assert cached(third, SECRET) == 0
    assert list(home.glob("states/*/*.state"))
    with running_appliance(home, "--require-keys", "on") as appliance:
        fourth = client(appliance, Keys(home / "state.db", actor="test").create(Limits())[1])
        two = client(appliance, keys[1])
        with fourth, two, appliance.client(transport=httpx.HTTPTransport(uds=str(appliance.socket))) as nobody:
            assert cached(fourth, SECRET) == 0
            assert cached(nobody, SECRET) == 0
            assert cached(two, SECRET) > 80, "its own is there after the restart"
            assert cached(fourth, PINNED) > 80
            assert cached(nobody, PINNED) > 80


# ---------------------------------------------------------------- what is written down


def test_acts_are_in_the_audit_log_and_keys_in_no_file(guarded: RunningAppliance) -> None:
    made, key = make(guarded, scopes=ROLES["admin"])
    with client(guarded, key) as http:
        http.post("/edge/v1/models/unload", json={"model": DEFAULT_MODEL}).raise_for_status()
        assert http.delete("/edge/v1/models/absent:x").status_code == 404
        assert http.post("/edge/v1/models/load", json={"model": "a\nb\x1b[2J"}).status_code == 400
        metrics = http.get("/metrics").text
    assert acts_of(guarded, made) == [
        ("model.unload", DEFAULT_MODEL, "ok"),
        ("model.delete", "absent:x", "model_not_found"),
        ("model.load", "a�b�[2J", "invalid_reference"),
    ]
    head = json.loads(run_edge("audit", "verify", "--json", home=guarded.home).stdout)
    assert f"edge_audit_head {head['metric']}" in metrics
    assert f"edge_audit_lines {head['lines']}" in metrics
    with guarded.client() as http:
        for header in (f"Bearer {key}x", f"Basic {key}", key):
            http.get("/edge/v1/jobs", headers={"authorization": header})
        http.get(f"/edge/v1/jobs?key={key}")
    secret = key.rpartition("_")[2].encode()
    files = [path for path in guarded.home.rglob("*") if path.is_file() and "store" not in path.parts]
    assert any(path.name == "edge.log" for path in files)
    assert [path for path in files if secret in path.read_bytes()] == []


# ---------------------------------------------------------------- pages


def test_pages_of_this_machine_and_listed_ones_may_ask_and_no_others(guarded: RunningAppliance) -> None:
    _, key = make(guarded)
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x a, content-type, x/y",
    }
    with client(guarded, key) as http, guarded.client() as nobody:
        for origin in ("https://panel.example", "http://localhost:3000", "http://127.0.0.1"):
            preflight = nobody.options("/v1/chat/completions", headers={"origin": origin} | ask)
            assert preflight.status_code == 204, "a browser asks without the key"
            assert preflight.headers["access-control-allow-origin"] == origin
            assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
            assert "POST" in preflight.headers["access-control-allow-methods"]
            page = {"origin": origin}
            allowed, forbidden = (http.get(path, headers=page) for path in ("/v1/models", "/edge/v1/jobs"))
            unknown = nobody.get("/v1/models", headers=page)
            assert [r.status_code for r in (allowed, forbidden, unknown)] == [200, 403, 401]
            for reply in (allowed, forbidden, unknown):
                assert reply.headers["access-control-allow-origin"] == origin, "of refusals too, or no page could tell"
                assert reply.headers["vary"] == "Origin"
                assert "access-control-allow-credentials" not in reply.headers
        for site in ("cross-site", "same-site"):
            image = http.get("/edge/v1/jobs", headers={"sec-fetch-site": site})
            assert image.status_code == 403, "an image of a foreign page tells no origin"
        for site in ("none", "same-origin"):
            assert http.get("/v1/models", headers={"sec-fetch-site": site}).status_code == 200
        for origin in ("https://evil.example", "null", "https://panel.example.evil", "http://panel.example"):
            page = {"origin": origin}
            for reply in (nobody.options("/v1/models", headers=page | ask), http.get("/v1/models", headers=page)):
                assert reply.status_code == 403, origin
                assert "access-control-allow-origin" not in reply.headers


# ---------------------------------------------------------------- TLS and wide addresses


def _certificate(port: int, ca: Path) -> bytes | None:
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        return connection.getpeercert(binary_form=True)


def test_a_certificate_is_shown_and_read_again_when_it_changes(home: Path) -> None:
    home.mkdir()
    cert, key = home / "cert.pem", home / "key.pem"
    shutil.copy(TLS / "first.pem", cert)
    shutil.copy(TLS / "first.key", key)
    _, api_key = Keys(home / "state.db", actor="test").create(Limits(scopes=ROLES["viewer"]))
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "serve", "--port", str(port), "--tls-cert", str(cert), "--tls-key",
         str(key)],
        env=edge_env(home), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: _answers(port), what="the appliance to answer")
        first = _certificate(port, TLS / "first.pem")
        listed = run_edge(
            "ps",
            "--url",
            f"https://localhost:{port}",
            "--json",
            home=home,
            EDGE_API_KEY=api_key,
            EDGE_CA_FILE=str(cert),
        )
        assert listed.returncode == 0, listed.stderr
        assert run_edge("ps", "--url", f"https://localhost:{port}", home=home, EDGE_API_KEY=api_key).returncode == 4
        assert run_edge("ps", "--json", home=home).returncode == 0, "no TLS on the Unix socket"
        shutil.copy(TLS / "second.pem", cert)
        assert _certificate(port, TLS / "first.pem") == first, "the key is not there yet"
        shutil.copy(TLS / "second.key", key)
        assert _certificate(port, TLS / "second.pem") != first
        cert.unlink()
        assert _certificate(port, TLS / "second.pem") != first, "and the last good one stays"
    finally:
        stop(process)
    refused = run_edge("serve", "--tls-cert", str(TLS / "first.pem"), "--tls-key", str(TLS / "second.key"), home=home)
    assert refused.returncode == 2
    assert "cannot be used" in refused.stderr


def _answers(port: int) -> bool:
    try:
        return _certificate(port, TLS / "first.pem") is not None
    except OSError:
        return False


WIDE = """
import fcntl, json, os, socket, struct, sys
from pathlib import Path
import httpx
from edge.access.keys import Keys, Limits
from tests.support import run_edge, start_appliance, stop
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
home = Path(sys.argv[1])
said = {"bare": run_edge("serve", "--host", "0.0.0.0", home=home).stderr}
_, key = Keys(home / "state.db", actor="test").create(Limits())
said["keyed"] = run_edge("serve", "--host", "0.0.0.0", home=home).stderr
appliance = start_appliance(home, "--host", "0.0.0.0", "--tls-by-proxy", "a test")
try:
    with appliance.client() as http:
        said["nobody"] = http.get("/v1/models", headers={"host": "edge.example"}).status_code
        headers = {"host": "edge.example", "authorization": f"Bearer {key}"}
        said["key"] = http.get("/v1/models", headers=headers).status_code
finally:
    stop(appliance.process)
print(json.dumps(said))
"""


def test_an_address_that_others_reach_is_served_with_keys_and_tls_only(tmp_path: Path) -> None:
    """In a network of its own, which nobody else reaches."""
    command = ["unshare", "--net", sys.executable, "-c", WIDE, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*command[:2], "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to make a network namespace")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "edge key create" in said["bare"]
    assert "--tls-cert" in said["bare"]
    assert "edge key create" not in said["keyed"]
    assert "--tls-by-proxy" in said["keyed"]
    assert (said["nobody"], said["key"]) == (401, 200)


def test_a_damaged_state_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database" * 1000)
    refused = run_edge("serve", "--require-keys", "on", home=tmp_path)
    assert refused.returncode != 0
    assert "state.db" in refused.stderr
    appliance = start_appliance(tmp_path)
    try:
        with appliance.client() as http:
            assert http.get("/v1/models").status_code == 200, "who needs no key is served"
            reply = http.get("/v1/models", headers={"authorization": f"Bearer {NOT_OURS}"})
            assert reply.status_code >= 400
            assert any("usage" in a["what"] for a in http.get("/edge/v1/status").json()["alerts"])
    finally:
        stop(appliance.process)
