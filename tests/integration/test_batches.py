"""Files and batches over the wire, with OpenAI's client: answered once each, whatever ends in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from edge.access.keys import Key, Keys, Limits
from runtime.api.batches.database import SCHEMA_VERSION
from runtime.api.batches.gate import lines_at_once
from tests.support import (
    DEFAULT_MODEL,
    RunningAppliance,
    chat_body,
    run_edge,
    running_appliance,
    start_appliance,
    stop,
    wait_until,
)

CHAT, TEXT, EMBED, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
OVER = ("completed", "failed", "expired", "cancelled")


_CLIENTS: list[openai.OpenAI] = []


@pytest.fixture(autouse=True)
def closing_clients() -> Iterator[None]:
    yield
    while _CLIENTS:
        _CLIENTS.pop().close()


def client_of(appliance: RunningAppliance, key: str = "none") -> openai.OpenAI:
    client = openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=key, max_retries=0, timeout=60)
    _CLIENTS.append(client)
    return client


def line(custom_id: str, body: Any, *, url: str = CHAT) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chats(num: int, **more: Any) -> list[str]:
    return [line(f"q{i}", chat_body(f"What is {i} and {i}?", **{"max_tokens": 4, **more})) for i in range(num)]


def submit(client: openai.OpenAI, lines: Sequence[str | bytes], *, endpoint: Any = CHAT, **more: Any) -> Batch:
    content = b"\n".join(x.encode() if isinstance(x, str) else x for x in lines)
    sent = client.files.create(file=("questions.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=sent.id, endpoint=endpoint, completion_window="24h", **more)


def finished(client: openai.OpenAI, batch: Batch, *, timeout_s: float = 60) -> Batch:
    wait_until(
        lambda: client.batches.retrieve(batch.id).status in OVER, timeout_s=timeout_s, what="the batch to be over"
    )
    return client.batches.retrieve(batch.id)


def wait_for_answers(client: openai.OpenAI, batch: Batch, num: int) -> None:
    wait_until(lambda: counts_of(client.batches.retrieve(batch.id))[1] >= num, timeout_s=120, what=f"{num} answers")


def content_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(x) for x in client.files.content(file_id).text.splitlines()] if file_id else []


def counts_of(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_files_with_openais_client(appliance: RunningAppliance) -> None:
    client, content = client_of(appliance), b'{"a": 1}\n\x00\xff' * 50_000
    sent = client.files.create(
        file=("../../etc/quest\nions.jsonl", content), purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert (sent.bytes, sent.purpose, sent.object, sent.status) == (len(content), "batch", "file", "processed")
    assert "/" not in sent.filename
    assert sent.expires_at == sent.created_at + 7200
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).content == content
    other = client.files.create(file=b"x", purpose="batch")
    assert [f.id for f in client.files.list(limit=1)][:2] == [other.id, sent.id]
    assert client.files.list(order="asc", after=sent.id).data[0].id == other.id
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)
    assert sent.id not in [path.name for path in (appliance.home / "files").iterdir()]


def test_a_batch_with_openais_client(appliance: RunningAppliance) -> None:
    client = client_of(appliance)
    bad = [
        line("no model", chat_body("Hi", model="none:such")),
        line("wrong field", chat_body("Hi", temperature=9)),
        line("too long", chat_body("Hi", max_tokens=100_000)),
    ]
    made = submit(client, [*chats(5), *bad], metadata={"run": "1"})
    assert (made.status, made.object, made.completion_window) == ("validating", "batch", "24h")
    batch = finished(client, made)
    assert (batch.status, counts_of(batch), batch.metadata) == ("completed", (8, 5, 3), {"run": "1"})
    assert batch.expires_at == batch.created_at + 86_400
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)

    answers = content_of(client, batch.output_file_id)
    assert [a["custom_id"] for a in answers] == [f"q{i}" for i in range(5)]
    with appliance.client() as http:
        alone = http.post(CHAT, json=json.loads(chats(5)[3])["body"]).json()
    answer = answers[3]["response"]["body"]
    assert answers[3]["response"]["status_code"] == 200
    assert answer["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
    assert batch.usage is not None
    assert batch.usage.total_tokens == sum(a["response"]["body"]["usage"]["total_tokens"] for a in answers)
    errors = {e["custom_id"]: e["response"] for e in content_of(client, batch.error_file_id)}
    assert {name: r["status_code"] for name, r in errors.items()} == {
        "no model": 404, "wrong field": 400, "too long": 400,
    }  # fmt: skip
    assert errors["wrong field"]["body"]["error"]["param"] == "temperature"

    assert client.batches.list(limit=1).data[0].id == batch.id
    made_by = client.files.list(purpose="batch_output").data
    assert {f.id for f in made_by} == {batch.output_file_id, batch.error_file_id}
    with pytest.raises(openai.BadRequestError, match="result of a batch"):
        client.batches.create(input_file_id=str(batch.output_file_id), endpoint=CHAT, completion_window="24h")


def test_completions_and_responses_and_what_cannot_be_embedded(appliance: RunningAppliance) -> None:
    client = client_of(appliance)
    text = {"model": DEFAULT_MODEL, "prompt": "One, two,", "max_tokens": 2, "temperature": 0}
    told = finished(client, submit(client, [line("t", text, url=TEXT)], endpoint=TEXT))
    assert content_of(client, told.output_file_id)[0]["response"]["body"]["object"] == "text_completion"
    asked = {"model": DEFAULT_MODEL, "input": "Hi", "max_output_tokens": 2}
    responded = finished(client, submit(client, [line("r", asked, url=RESPOND)], endpoint=RESPOND))
    (response,) = content_of(client, responded.output_file_id)
    assert response["response"]["body"]["object"] == "response"
    assert responded.usage is not None
    assert responded.usage.output_tokens == response["response"]["body"]["usage"]["output_tokens"] > 0
    body = {"model": DEFAULT_MODEL, "input": "a"}
    refused = finished(client, submit(client, [line("e", body, url=EMBED)], endpoint=EMBED))
    assert (refused.status, counts_of(refused), refused.output_file_id) == ("completed", (1, 0, 1), None)
    assert "is for text" in content_of(client, refused.error_file_id)[0]["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([b"\x00" * 5000], ["invalid_json_line"]),
        ([b"\xff\xfe{}"], ["invalid_json_line"]),
        ([b"\n\n"], ["empty_file"]),
        ([b"x" * (18 << 20), *chats(1)], ["line_too_long"]),
        ([b'{"custom_id":"a","body":' + b"[" * 100_000], ["invalid_json_line"]),
        ([b"{}"] * 1_000_000, ["missing_required_parameter"] * 100),
        ([line("a", {}), line("a", {})], ["duplicate_custom_id"]),
        ([line("a", {}, url="/edge/v1/models/load")], ["mismatched_url"]),
        ([line("a", {"stream": True})], ["invalid_body"]),
    ],
    ids=["nul", "not utf-8", "blank", "a huge line", "deep", "a million", "twice", "another url", "a stream"],
)
def test_files_that_are_no_batch(appliance: RunningAppliance, lines: list[bytes], codes: list[str]) -> None:
    client = client_of(appliance)
    batch = finished(client, submit(client, lines))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [e.code for e in batch.errors.data] == codes


FORM: list[tuple[str, dict[str, Any], int, str]] = [
    ("no form", {"content": b"x"}, 400, "form"),
    ("no boundary", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    ("no file", {"files": {"purpose": (None, "batch")}}, 400, "'file'"),
    ("no purpose", {"files": {"file": ("a", b"x")}}, 400, "'purpose'"),
    ("another purpose", {"files": {"file": ("a", b"x")}, "data": {"purpose": "vision"}}, 400, "vision"),
    ("an unknown field", {"files": {"file": ("a", b"x")}, "data": {"colour": "red"}}, 400, "colour"),
    ("nothing in it", {"files": {"file": ("a", b"")}, "data": {"purpose": "batch"}}, 400, "empty"),
    ("another anchor", {"files": {"file": ("a", b"x")}, "data": {"expires_after[anchor]": "now"}}, 400, "created_at"),
    ("expires at once", {"files": {"file": ("a", b"x")}, "data": {"expires_after[seconds]": "1"}}, 400, "3,600"),
    ("cut short", {"content": b"--XX\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx",
                   "headers": {"content-type": "multipart/form-data; boundary=XX"}}, 400, "form"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "status", "part"), [c[1:] for c in FORM], ids=[c[0] for c in FORM])
def test_malformed_uploads(appliance: RunningAppliance, sent: dict[str, Any], status: int, part: str) -> None:
    with appliance.client() as http:
        reply = http.post("/v1/files", **sent)
    assert reply.status_code == status, reply.text
    assert part in reply.json()["error"]["message"]
    names = [path.name for path in (appliance.home / "files").iterdir()] if (appliance.home / "files").exists() else []
    assert not any(name.endswith(".part") for name in names)


ASKED = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "part"),
    [
        ("POST", "/v1/batches", ASKED, 404, "file-none"),
        ("POST", "/v1/batches", {**ASKED, "input_file_id": "x" * 100}, 400, "input_file_id"),
        ("POST", "/v1/batches", {**ASKED, "endpoint": "/v1/images"}, 400, "endpoint"),
        ("POST", "/v1/batches", {**ASKED, "completion_window": "1h"}, 400, "completion_window"),
        ("POST", "/v1/batches", {**ASKED, "metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
        ("POST", "/v1/batches", {**ASKED, "output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "3600"),
        ("POST", "/v1/batches", {"endpoint": CHAT}, 400, "input_file_id"),
        ("POST", "/v1/batches/batch_none/cancel", None, 404, "batch_none"),
        ("GET", "/v1/batches/batch_none", None, 404, "batch_none"),
        ("GET", "/v1/batches?limit=101", None, 400, ""),
        ("GET", "/v1/batches?after=batch_none", None, 400, "after"),
        ("GET", "/v1/files?limit=0", None, 400, ""),
        ("GET", "/v1/files?order=up", None, 400, ""),
        ("GET", "/v1/files?after=file-none", None, 400, "after"),
        ("GET", "/v1/files/file-none", None, 404, "file-none"),
        ("GET", "/v1/files/..%2Fbatches.db/content", None, 404, ""),
        ("DELETE", "/v1/files/file-none", None, 404, "file-none"),
    ],
)
def test_malformed_requests(
    appliance: RunningAppliance, method: str, path: str, body: Any, status: int, part: str
) -> None:
    with appliance.client() as http:
        reply = http.request(method, path, json=body)
    assert reply.status_code == status, reply.text
    assert part in reply.json()["error"]["message"]


def test_files_have_a_limit_of_their_own_and_what_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    with running_appliance(tmp_path, EDGE_MAX_FILE_BYTES="2000000", EDGE_MAX_BODY_BYTES="100000") as appliance:
        client = client_of(appliance)
        client.files.create(file=b"x" * 2_000_000, purpose="batch")
        with pytest.raises(openai.APIStatusError, match="2,000,000") as told:
            client.files.create(file=b"x" * 2_100_000, purpose="batch")
        assert told.value.status_code == 413

        def cut_off() -> Iterator[bytes]:
            yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 100_000
            wait_until(lambda: any(p.name.endswith(".part") for p in (tmp_path / "files").iterdir()), what="a file")
            raise ConnectionError("gone")

        headers = {"content-type": "multipart/form-data; boundary=XX"}
        with appliance.client() as http, pytest.raises(ConnectionError):
            http.post("/v1/files", content=cut_off(), headers=headers)
        wait_until(lambda: len(list((tmp_path / "files").iterdir())) == 1, what="the rest to go")


# ---------------------------------------------------------------- keys


def make_key(appliance: RunningAppliance, **limits: Any) -> tuple[Key, str]:
    return Keys(appliance.home / "state.db", actor="test").create(Limits(**limits))


def usage_of(home: Path, key_id: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(run_edge("usage", "--by", "key", "--json", home=home).stdout)["usage"]
    return next((row for row in rows if row["key"] == key_id), dict[str, Any]())


def test_a_batch_is_its_keys_and_runs_as_it(tmp_path: Path) -> None:
    with running_appliance(tmp_path, "--require-keys", "on") as appliance:
        mine, secret = make_key(appliance, models=("smollm2:*",))
        _, other = make_key(appliance, models=("none:*",))
        _, viewer = make_key(appliance, scopes=frozenset({"view"}))
        client, stranger = client_of(appliance, secret), client_of(appliance, other)
        batch = finished(client, submit(client, chats(6)))
        assert counts_of(batch) == (6, 6, 0)
        assert batch.usage is not None
        used = batch.usage
        wait_until(lambda: usage_of(tmp_path, mine.id).get("requests") == 6, what="the usage")
        counted = usage_of(tmp_path, mine.id)
        assert (counted["input_tokens"], counted["output_tokens"]) == (used.input_tokens, used.output_tokens)

        for look in (stranger.batches.retrieve, stranger.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                look(batch.id)
        for find in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
            with pytest.raises(openai.NotFoundError):
                find(batch.input_file_id)
        assert not stranger.files.list().data
        assert not stranger.batches.list().data
        with pytest.raises(openai.PermissionDeniedError):
            client_of(appliance, viewer).files.list()
        refused = finished(stranger, submit(stranger, chats(2)))
        assert counts_of(refused) == (2, 0, 2)

        running = submit(client, chats(300, max_tokens=40, ignore_eos=True))
        wait_until(lambda: client.batches.retrieve(running.id).status == "in_progress", what="it to run")
        Keys(tmp_path / "state.db", actor="test").revoke(mine.id)
        wait_until(lambda: _status(tmp_path, running.id) == "failed", what="the batch to fail", timeout_s=60)


def _status(home: Path, batch_id: str) -> str:
    from edge.database import connect_read_only

    db = connect_read_only(home / "batches.db", version=SCHEMA_VERSION)
    try:
        (record,) = db.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
    finally:
        db.close()
    status: str = json.loads(record)["status"]
    return status


# ---------------------------------------------------------------- cancelled, killed


def test_a_cancelled_batch_ends_at_once_with_what_it_has(appliance: RunningAppliance) -> None:
    client = client_of(appliance)
    made = submit(client, [*chats(3), *chats_of_novels(30)])
    with pytest.raises(openai.ConflictError, match=made.id):
        client.files.delete(made.input_file_id)
    wait_for_answers(client, made, 3)
    with appliance.client() as http:
        assert 0 < http.get("/edge/v1/status").json()["requests_active"] <= lines_at_once(16)
        http.post(CHAT, json=chat_body("Hi", max_tokens=2)).raise_for_status()
    assert client.batches.cancel(made.id).status == "cancelling"
    batch = finished(client, made)
    assert (batch.status, counts_of(batch)[0]) == ("cancelled", 33)
    told = content_of(client, batch.output_file_id) + content_of(client, batch.error_file_id)
    assert len({x["custom_id"] for x in told}) == len(told) == 33
    assert {x["error"]["code"] for x in content_of(client, batch.error_file_id)} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(made.id)
    with appliance.client() as http:
        wait_until(lambda: http.get("/edge/v1/status").json()["requests_active"] == 0, what="its slots to be free")


def chats_of_novels(num: int) -> list[str]:
    return [line(f"n{i}", chat_body("Go on.", max_tokens=2000, ignore_eos=True)) for i in range(num)]


def survives_a_kill(home: Path, num: int, *, kills: Sequence[int]) -> None:
    """A batch of so many lines is answered once each, though the appliance is killed when so many are."""
    appliance = start_appliance(home)
    try:
        made = submit(client_of(appliance), [*chats(num - 1, max_tokens=8), line("bad", chat_body("Hi", n=99))])
        for killed_at in kills:
            wait_for_answers(client_of(appliance), made, killed_at)
            os.kill(appliance.process.pid, signal.SIGKILL)
            appliance.process.wait()
            appliance = start_appliance(home)
        client = client_of(appliance)
        assert client.batches.retrieve(made.id).status != "completed"
        batch = finished(client, made, timeout_s=180)
        assert (batch.status, counts_of(batch)) == ("completed", (num, num - 1, 1))
        answers, errors = content_of(client, batch.output_file_id), content_of(client, batch.error_file_id)
        assert [a["custom_id"] for a in answers] == [f"q{i}" for i in range(num - 1)]
        assert [e["custom_id"] for e in errors] == ["bad"]
        assert len({a["id"] for a in answers}) == num - 1
        # What was answered before was not asked again: beside each line, at most the few that were under way.
        wait_until(lambda: usage_of(home, "").get("requests", 0) > 0, what="the usage")
        assert usage_of(home, "")["requests"] <= num + 4 * len(kills)
        assert {p.name for p in (home / "files").iterdir()} == {f.id for f in client.files.list()}
    finally:
        stop(appliance.process)


def test_a_batch_survives_a_kill(tmp_path: Path) -> None:
    survives_a_kill(tmp_path, 40, kills=[10])


@pytest.mark.soak
def test_a_batch_of_200_lines_survives_two_kills(tmp_path: Path) -> None:
    survives_a_kill(tmp_path, 200, kills=[50, 120])


def test_an_appliance_that_is_stopped_goes_on_with_its_batches(tmp_path: Path) -> None:
    with running_appliance(tmp_path) as appliance:
        made = submit(client_of(appliance), [*chats(3), *chats_of_novels(4)])
        client = client_of(appliance)
        wait_for_answers(client, made, 3)
        assert stop(appliance.process, timeout_s=20) == 0
    with running_appliance(tmp_path) as appliance:
        client = client_of(appliance)
        assert client.batches.retrieve(made.id).status == "in_progress"
        client.batches.cancel(made.id)
        assert counts_of(finished(client, made)) == (7, 3, 4)


# ---------------------------------------------------------------- the command


def test_the_command(appliance: RunningAppliance, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([*chats(3), line("bad", {})]))

    def edge(*args: str) -> Any:
        ran = run_edge("batch", *args, "--socket", str(appliance.socket), home=tmp_path / "none")
        assert ran.returncode == 0, ran.stderr
        return ran

    batch = json.loads(edge("submit", str(path), "--wait", "--json").stdout)
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 4, "completed": 3, "failed": 1})
    assert [json.loads(x)["custom_id"] for x in edge("results", batch["id"]).stdout.splitlines()] == ["q0", "q1", "q2"]
    assert [json.loads(x)["custom_id"] for x in edge("results", batch["id"], "--errors").stdout.splitlines()] == ["bad"]
    assert batch["id"] in edge("list").stdout
    assert "3 of 4 lines answered, 1 failed" in edge("show", batch["id"]).stdout
    path.write_text("nothing\n")
    failed = run_edge("batch", "submit", str(path), "--wait", "--socket", str(appliance.socket), home=tmp_path / "none")
    assert failed.returncode == 1
    assert "line 1: " in failed.stderr
    missing = run_edge("batch", "cancel", "batch_none", "--socket", str(appliance.socket), home=tmp_path / "none")
    assert missing.returncode != 0
    assert "batch_none" in missing.stderr


# ---------------------------------------------------------------- moderation

PLUGIN = """
from runtime.moderation import Judgement

class Words:
    name = "words"

    def judge(self, texts):
        if "break" in texts:
            raise RuntimeError("broken")
        return [self._one(text) for text in texts]

    def _one(self, text):
        bad = "kill" in text.lower()
        return Judgement({"violence": 0.9 if bad else 0.1}, frozenset({"violence"} if bad else ()))
"""


@pytest.fixture(scope="module")
def moderated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance with a classifier that is installed beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "words_plugin.py").write_text(PLUGIN)
    info = site / "words_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: words-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[slm_edge.moderation]\nwords = words_plugin:Words\n")
    paths = f"{site}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    home = tmp_path_factory.mktemp("moderated")
    with running_appliance(home, EDGE_MODERATION="words", PYTHONPATH=paths) as running:
        yield running


def test_without_a_classifier_nothing_is_called_harmless(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post("/v1/moderations", json={"input": "I love you."})
    assert reply.status_code == 501
    assert reply.json()["error"]["code"] == "moderation_unavailable"


def test_a_classifier_that_is_plugged_in_judges(moderated: RunningAppliance) -> None:
    client = client_of(moderated)
    told = client.moderations.create(input=["I will kill you.", "I love you."], model="omni-moderation-latest")
    assert told.model == "words"
    assert [r.flagged for r in told.results] == [True, False]
    assert (told.results[0].categories.violence, told.results[0].category_scores.violence) == (True, 0.9)
    assert told.results[0].category_applied_input_types.violence == ["text"]
    assert told.results[0].category_applied_input_types.hate == []
    assert "model" in json.loads(client.moderations.with_raw_response.create(input="x", model="y").text)["warnings"][0]
    parts = client.moderations.create(input=[{"type": "text", "text": "Kill it"}])
    assert parts.results[0].flagged
    with pytest.raises(openai.BadRequestError, match="Images"):
        client.moderations.create(input=[{"type": "image_url", "image_url": {"url": "data:,"}}])
    with pytest.raises(openai.InternalServerError, match="failed"):
        client.moderations.create(input="break")
    batch = finished(client, submit(client, [line("m", {"input": "kill"}, url="/v1/moderations")],
                                    endpoint="/v1/moderations"))  # fmt: skip
    assert content_of(client, batch.output_file_id)[0]["response"]["body"]["results"][0]["flagged"]


def test_a_classifier_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with running_appliance(tmp_path, EDGE_MODERATION="none") as appliance, httpx.Client(trust_env=False) as http:
        reply = http.post(f"{appliance.url}/v1/moderations", json={"input": "x"})
    assert reply.status_code == 501
    assert "'none'" in reply.json()["error"]["message"]
