"""The running appliance through Ollama's own client, and its lines and errors on the wire."""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from edge.access.keys import Keys, Limits
from edge.store.models import ModelStore
from tests.edge.file_server import FileServer, ServedFile, serve
from tests.support import DEFAULT_MODEL, SEED, RunningAppliance, running_appliance, void, wait_until

EMBEDDER = "minilm:l6-v2"
HI = [{"role": "user", "content": "Say hi."}]
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 8}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance of its own: the tests load, unload, make and remove models."""
    with running_appliance(tmp_path_factory.mktemp("ollama")) as running:
        yield running


@pytest.fixture
def fetched() -> ServedFile:
    """A model file on a web server."""
    return ServedFile(ModelStore(SEED).get(EMBEDDER).weights.read_bytes(), chunk_bytes=1 << 20)


@pytest.fixture
def file_server(fetched: ServedFile) -> Iterator[FileServer]:
    with serve({"/Words.F16.gguf": fetched}) as server:
        yield server


@pytest.fixture(scope="module")
def client(serving: RunningAppliance) -> Iterator[Any]:
    """Ollama's own; what its stubs leave open makes every call of it unknown to a type checker."""
    untyped: Any = ollama.Client(serving.url, timeout=60, trust_env=False)
    with untyped as client:
        yield client


@pytest.fixture(scope="module")
def http(serving: RunningAppliance) -> Iterator[httpx.Client]:
    with serving.client() as http:
        yield http


def lines_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.text.endswith("\n")
    return [json.loads(line) for line in reply.text.splitlines()]


# ---------------------------------------------------------------- answers


def test_a_chat_in_lines_and_whole(client: Any) -> None:
    whole = client.chat(DEFAULT_MODEL, HI, options=GREEDY)
    parts = list(client.chat(DEFAULT_MODEL, HI, options=GREEDY, stream=True))
    assert "".join(p.message.content or "" for p in parts) == whole.message.content != ""
    assert [p.done for p in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert (last.done_reason, last.eval_count, last.prompt_eval_count) == ("length", 8, whole.prompt_eval_count)
    for answer in (whole, last):
        assert answer.total_duration is not None
        assert answer.eval_duration is not None
        assert answer.total_duration >= answer.eval_duration > 0
        assert answer.load_duration is not None
        assert answer.created_at is not None
        assert datetime.datetime.fromisoformat(answer.created_at).tzinfo == datetime.UTC


async def test_the_client_of_asyncio(serving: RunningAppliance) -> None:
    untyped: Any = ollama.AsyncClient(serving.url, timeout=60, trust_env=False)
    async with untyped as client:
        text = ""
        async for part in await client.generate(DEFAULT_MODEL, "Say hi.", options=GREEDY, stream=True):
            text += part.response
        assert text == (await client.generate(DEFAULT_MODEL, "Say hi.", options=GREEDY)).response != ""


def test_lines_are_ollamas(http: httpx.Client) -> None:
    body = {"model": DEFAULT_MODEL, "messages": HI, "options": {**GREEDY, "num_predict": 2}}
    *parts, last = lines_of(http.post("/api/chat", json=body))
    for part in parts:
        assert set(part) == {"model", "created_at", "message", "done"}
        assert part["message"]["role"] == "assistant"
    assert set(last) == {
        "model", "created_at", "message", "done", "done_reason", "total_duration", "load_duration",
        "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    }  # fmt: skip
    del body["messages"]
    *parts, last = lines_of(http.post("/api/generate", json={**body, "prompt": "Say hi."}))
    assert all(set(part) == {"model", "created_at", "response", "done"} for part in parts)
    assert last["response"] == ""


def test_a_prompt_with_a_system_prompt_and_one_as_it_stands(client: Any) -> None:
    """A raw prompt with the template's own markers is the same prompt: as many tokens, the same answer."""
    system = "You are terse."
    templated = client.generate(DEFAULT_MODEL, "Say hi.", system=system, options=GREEDY)
    markers = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    raw = client.generate(DEFAULT_MODEL, markers, raw=True, options=GREEDY)
    assert (raw.response, raw.prompt_eval_count) == (templated.response, templated.prompt_eval_count)


def test_options_and_the_answers_end(client: Any) -> None:
    greedy = client.generate(DEFAULT_MODEL, "Count to ten.", options={"temperature": 0, "num_predict": 24}).response
    stop = greedy[8:11]
    cut = client.generate(DEFAULT_MODEL, "Count to ten.", options={**GREEDY, "num_predict": 24, "stop": [stop]})
    assert (cut.response, cut.done_reason) == (greedy[: greedy.index(stop)], "stop")
    hot = {"temperature": 1.5, "seed": 7, "num_predict": 8, "top_k": 50, "min_p": 0.01, "repeat_penalty": 1.1}
    first, second = (client.generate(DEFAULT_MODEL, "A story:", options=hot).response for _ in range(2))
    assert first == second


def test_more_tokens_than_there_is_room_for_are_as_many_as_fit(client: Any) -> None:
    answer = client.chat(DEFAULT_MODEL, HI, format=PERSON, options={"temperature": 0, "num_predict": 100_000})
    assert answer.done_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_form(client: Any, stream: bool) -> None:
    messages = [{"role": "user", "content": "Anna is 31."}]
    answer: Any = client.chat(DEFAULT_MODEL, messages, format=PERSON, options={"temperature": 0}, stream=stream)
    text = "".join(p.message.content for p in answer) if stream else answer.message.content
    assert set(json.loads(text)) == {"name", "age"}
    loose = client.generate(DEFAULT_MODEL, "Anna is 31. JSON:", format="json", options={**GREEDY, "num_predict": 60})
    assert loose.response.startswith("{")


def test_what_goes_wrong_in_a_stream_is_its_last_line(client: Any, http: httpx.Client) -> None:
    asked = {"model": DEFAULT_MODEL, "messages": HI, "format": PERSON, "options": {"temperature": 0, "stop": ["age"]}}
    *_, last = lines_of(http.post("/api/chat", json=asked))
    assert set(last) == {"error"}
    with pytest.raises(ollama.ResponseError, match=r"does not obey|not JSON"):
        list(client.chat(DEFAULT_MODEL, HI, format=PERSON, options={"temperature": 0, "stop": ["age"]}, stream=True))
    whole = http.post("/api/chat", json={**asked, "stream": False})
    assert whole.status_code == 422
    assert set(whole.json()) == {"error"}


@pytest.mark.parametrize("raw", [False, True])
def test_probabilities_of_tokens(client: Any, raw: bool) -> None:
    answer = client.generate(DEFAULT_MODEL, "Say hi.", raw=raw, logprobs=True, top_logprobs=2, options=GREEDY)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.eval_count
    assert answer.logprobs[0].top_logprobs is not None
    assert [len(p.top_logprobs or ()) for p in answer.logprobs] == [2] * 8
    assert answer.logprobs[0].logprob == answer.logprobs[0].top_logprobs[0].logprob


def test_what_has_no_effect_is_named(http: httpx.Client) -> None:
    options = {**GREEDY, "num_gpu": 1, "use_mmap": True, "mirostat": 0, "colour": 1, "num_ctx": 1 << 20}
    body = {
        "model": DEFAULT_MODEL,
        "prompt": "Hi",
        "options": options,
        "mood": "good",
        "shift": True,
        "think": False,
    }
    reply = http.post("/api/generate", json={**body, "stream": False})
    warnings = reply.json()["warnings"]
    named = [w.split()[0] for w in warnings]
    assert sorted(named) == ["options.colour", "options.num_ctx", "options.num_gpu", "shift", "unknown"]
    assert "options.num_gpu has no effect" in reply.headers["x-edge-warnings"]
    streamed = http.post("/api/generate", json=body)
    assert lines_of(streamed)[-1]["warnings"] == warnings
    assert streamed.headers["x-edge-warnings"] == reply.headers["x-edge-warnings"]
    chat = {"model": DEFAULT_MODEL, "messages": [{**HI[0], "thought": "?"}], "options": GREEDY, "stream": False}
    assert http.post("/api/chat", json=chat).json()["warnings"] == ["unknown field 'thought' in messages was ignored"]


# ---------------------------------------------------------------- what is there and what is loaded


def test_what_the_command_line_looks_for(http: httpx.Client) -> None:
    assert http.head("/").status_code == 200
    assert http.get("/").text == "Ollama is running"
    assert http.head("/api/tags").status_code == http.head("/api/version").status_code == 200
    major, minor, _ = http.get("/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 5), "structured outputs and more are asked for by version"


def test_the_list_of_models(client: Any, serving: RunningAppliance) -> None:
    store = {str(m.ref): m for m in ModelStore(serving.home / "store").list()}
    found = {m.model: m for m in client.list().models}
    assert found.keys() >= {DEFAULT_MODEL, EMBEDDER}
    model = found[DEFAULT_MODEL]
    assert (model.digest, model.size) == (store[DEFAULT_MODEL].digest.hex, store[DEFAULT_MODEL].size_bytes)
    assert model.modified_at is not None
    assert abs(model.modified_at.timestamp() - store[DEFAULT_MODEL].created) < 0.001
    assert model.details is not None
    assert (model.details.family, model.details.quantization_level) == ("llama", "Q4_1")


def test_all_about_a_model(client: Any) -> None:
    shown = client.show(DEFAULT_MODEL)
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["general.parameter_count"] == 134_515_008
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None
    assert shown.capabilities == ["completion", "tools"]
    assert "<|im_start|>" in (shown.template or "")
    assert (shown.parameters or "").split() == ["temperature", "0.2", "top_p", "0.9"]
    assert shown.details is not None
    assert (shown.details.format, shown.details.families, shown.details.parameter_size) == ("gguf", ["llama"], "134.5M")
    assert client.show(EMBEDDER).capabilities == ["embedding"]


def test_loading_keeping_and_unloading(client: Any) -> None:
    def running() -> dict[str, Any]:
        return {str(m.model): m for m in client.ps().models}

    assert client.generate(DEFAULT_MODEL, keep_alive="1h").done_reason == "load"
    model = running()[DEFAULT_MODEL]
    assert model.size > 0
    assert (model.size_vram, model.context_length, model.details.family) == (0, 8192, "llama")
    left = model.expires_at - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(minutes=58) < left <= datetime.timedelta(hours=1)
    client.chat(DEFAULT_MODEL, HI, options=GREEDY)
    left = running()[DEFAULT_MODEL].expires_at - datetime.datetime.now(datetime.UTC)
    assert left > datetime.timedelta(minutes=58), "one that says nothing leaves it as it was"
    client.chat(DEFAULT_MODEL, HI, options=GREEDY, keep_alive=-1)
    assert running()[DEFAULT_MODEL].expires_at.year > 2200
    list(client.chat(DEFAULT_MODEL, HI, options=GREEDY, keep_alive=0, stream=True))
    wait_until(lambda: DEFAULT_MODEL not in running(), what="the model to be unloaded")
    assert client.chat(DEFAULT_MODEL).done_reason == "load"
    left = running()[DEFAULT_MODEL].expires_at - datetime.datetime.now(datetime.UTC)
    assert left < datetime.timedelta(minutes=16), "once unloaded, the appliance's own time holds again"
    assert client.generate(DEFAULT_MODEL, keep_alive=0).done_reason == "unload"
    assert DEFAULT_MODEL not in running()


def test_vectors(client: Any, http: httpx.Client) -> None:
    several = client.embed("MiniLM", ["a boat", "a dog"])
    assert [len(v) for v in several.embeddings] == [384, 384]
    assert abs(sum(x * x for x in several.embeddings[0]) - 1) < 1e-5
    assert several.prompt_eval_count is not None
    assert several.prompt_eval_count > 4
    older = client.embeddings(EMBEDDER, "a boat").embedding
    assert max(abs(x - y) for x, y in zip(older, several.embeddings[0], strict=True)) < 1e-5
    assert len(client.embed(EMBEDDER, "a boat", dimensions=32).embeddings[0]) == 32
    assert client.embed(EMBEDDER, "").embeddings == [], "it is only loaded"
    assert client.embed(EMBEDDER, "boat " * 2000).prompt_eval_count == 512, "its end is cut off"
    with pytest.raises(ollama.ResponseError, match="maximum context length"):
        client.embed(EMBEDDER, "boat " * 2000, truncate=False)
    body = {"model": EMBEDDER, "input": "a", "options": {"temperature": 1}}
    assert http.post("/api/embed", json=body).json()["warnings"] == ["options.temperature has no effect here"]


# ---------------------------------------------------------------- coming and going


def test_a_model_made_of_another(client: Any, serving: RunningAppliance) -> None:
    made = list(
        client.create(
            "Parrot",
            from_=DEFAULT_MODEL,
            system="You are a parrot.",
            parameters={"temperature": 0, "num_predict": 5, "stop": ["zzz"]},
            stream=True,
        )
    )
    assert made[-1].status == "success"
    answer = client.chat("parrot", HI)
    assert (answer.eval_count, answer.done_reason) == (5, "length")
    told = client.chat(DEFAULT_MODEL, [{"role": "system", "content": "You are a parrot."}, *HI], options=GREEDY)
    assert (told.message.content or "").startswith(answer.message.content or "?")
    assert told.prompt_eval_count == answer.prompt_eval_count
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none") as v1:
        same = v1.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "Say hi."}])
    assert same.choices[0].message.content == answer.message.content, "every door leads to the same model"
    shown = client.show("parrot")
    assert "num_predict" in (shown.parameters or "")
    assert 'SYSTEM """You are a parrot."""' in (shown.modelfile or "")
    client.copy("parrot", "cockatoo")
    client.delete("parrot")
    assert client.show("cockatoo").parameters == shown.parameters
    client.delete("cockatoo")
    names = {m.model for m in client.list().models}
    assert names.isdisjoint({"parrot:latest", "cockatoo:latest"})


def test_a_model_with_another_template(client: Any) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    client.create("bare", from_=DEFAULT_MODEL, template=template)
    assert client.show("bare").template == template
    raw = client.generate(DEFAULT_MODEL, "<|im_start|>user\nSay hi.<|im_end|>\n", raw=True, options=GREEDY)
    templated = client.chat("bare", HI, options=GREEDY)
    assert (templated.message.content, templated.prompt_eval_count) == (raw.response, raw.prompt_eval_count)
    client.create("bare", from_=DEFAULT_MODEL)
    assert "bare:latest" not in {m.model for m in client.ps().models}, "one that is replaced is loaded anew"
    assert client.show("bare").template == client.show(DEFAULT_MODEL).template
    client.delete("bare")


def test_a_model_of_a_file_that_is_sent(client: Any, http: httpx.Client, tmp_path: Path) -> None:
    weights = tmp_path / "words.gguf"
    weights.write_bytes(ModelStore(SEED).get(EMBEDDER).weights.read_bytes()[:-1] + b"\1")
    digest = client.create_blob(weights)
    assert http.head(f"/api/blobs/{digest}").status_code == 200
    client.create("words", files={"words.gguf": digest})
    assert len(client.embed("words", "a boat").embeddings[0]) == 384
    client.delete("words")
    assert http.head(f"/api/blobs/{digest}").status_code == 404


def test_blobs_are_what_they_are_said_to_be(http: httpx.Client, serving: RunningAppliance) -> None:
    data = b"x" * (3 << 20)
    digest, other = (f"sha256:{hashlib.sha256(d).hexdigest()}" for d in (data, b"other"))
    wrong = http.post(f"/api/blobs/{other}", content=data)
    assert wrong.status_code == 422
    assert digest in wrong.json()["error"]
    assert http.head(f"/api/blobs/{other}").status_code == 404
    assert http.post(f"/api/blobs/{digest}", content=iter([data])).status_code == 201
    assert http.post(f"/api/blobs/{digest}", content=data).status_code == 200, "it is there"
    refused = http.post("/api/create", json={"model": "x", "files": {"x.gguf": digest}})
    assert refused.status_code == 422
    assert "not a GGUF" in refused.json()["error"]
    assert not list((serving.home / "store" / "ingest").iterdir()), "nothing of it is left behind"


def test_pulling(client: Any, http: httpx.Client) -> None:
    """Of a model that is there: what is fetched comes through the same job as with `edge pull`."""
    assert client.pull(DEFAULT_MODEL).status == "success"
    lines = lines_of(http.post("/api/pull", json={"name": DEFAULT_MODEL}))
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}


def test_pulling_tells_how_far_it_is(http: httpx.Client, fetched: ServedFile, file_server: FileServer) -> None:
    seen = threading.Event()
    fetched.before_chunk = lambda: void(seen.wait(10)) if file_server.sent_bytes else None
    lines: list[dict[str, Any]] = []
    with http.stream("POST", "/api/pull", json={"model": f"{file_server.url}/Words.F16.gguf"}) as reply:
        for line in reply.iter_lines():
            lines.append(json.loads(line))
            if "total" in lines[-1]:
                seen.set()
    told = [line for line in lines if "total" in line]
    assert all(line["total"] == len(fetched.data) >= line["completed"] for line in told)
    assert told
    assert lines[-2:] == [{"status": "words:f16 is in the store"}, {"status": "success"}]
    assert http.request("DELETE", "/api/delete", json={"model": "words:f16"}).status_code == 200


def test_who_goes_away_stops_the_pull(http: httpx.Client, fetched: ServedFile, file_server: FileServer) -> None:
    gone = threading.Event()
    fetched.before_chunk = lambda: void(gone.wait(10))
    with http.stream("POST", "/api/pull", json={"model": f"{file_server.url}/Words.F16.gguf"}) as reply:
        next(reply.iter_lines())
    job = http.get("/edge/v1/jobs").json()["jobs"][0]
    gone.set()
    wait_until(lambda: http.get(f"/edge/v1/jobs/{job['id']}").json()["state"] == "cancelled", what="the pull to end")


def test_a_pull_that_fails(http: httpx.Client, fetched: ServedFile, file_server: FileServer) -> None:
    fetched.status = 404
    body = {"model": f"{file_server.url}/Words.F16.gguf"}
    assert set(lines_of(http.post("/api/pull", json=body))[-1]) == {"error"}
    refused = http.post("/api/pull", json={**body, "stream": False})
    assert refused.status_code == 502
    assert set(refused.json()) == {"error"}


# ---------------------------------------------------------------- who may, and what is wrong


def test_keys_reach_as_far_as_elsewhere(tmp_path: Path) -> None:
    with running_appliance(tmp_path, "--require-keys", "on") as guarded, guarded.client() as nobody:
        _, secret = Keys(guarded.home / "state.db", actor="test").create(
            Limits(scopes=frozenset({"chat"}), models=(DEFAULT_MODEL,))
        )
        assert nobody.get("/").status_code == 200
        for method, path in (
            ("GET", "/api/version"),
            ("GET", "/api/tags"),
            ("POST", "/api/chat"),
            ("DELETE", "/api/delete"),
        ):
            reply = nobody.request(method, path, json={"model": DEFAULT_MODEL})
            assert (reply.status_code, set(reply.json())) == (401, {"error"}), path
        with guarded.client(headers={"authorization": f"Bearer {secret}"}) as http:
            assert [m["model"] for m in http.get("/api/tags").json()["models"]] == [DEFAULT_MODEL]
            assert http.post("/api/show", json={"model": EMBEDDER}).status_code == 404
            body = {"model": DEFAULT_MODEL, "messages": HI, "options": GREEDY, "stream": False, "keep_alive": 0}
            kept = http.post("/api/chat", json=body).json()
            assert "operate" in kept["warnings"][0]
            assert [m["model"] for m in http.get("/api/ps").json()["models"]] == [DEFAULT_MODEL]
            for method, path, body in (
                ("POST", "/api/generate", {"model": DEFAULT_MODEL, "keep_alive": 0}),
                ("POST", "/api/pull", {"model": DEFAULT_MODEL}),
                ("POST", "/api/create", {"model": "x", "from": DEFAULT_MODEL}),
                ("DELETE", "/api/delete", {"model": DEFAULT_MODEL}),
            ):
                assert http.request(method, path, json=body).status_code == 403, path


def asking(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "messages": HI, **more}


def prompting(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "prompt": "Hi", **more}


def making(**more: Any) -> dict[str, Any]:
    return {"model": "new", "from": DEFAULT_MODEL, **more}


CHAT, GENERATE, CREATE, PULL = "/api/chat", "/api/generate", "/api/create", "/api/pull"
NO_DIGEST = f"sha256:{'0' * 64}"
CASES: list[tuple[str, str, Any, int, str]] = [
    # method and path, name, body, status, part of the message
    (CHAT, "not json", b"{", 400, "not valid JSON"),
    (CHAT, "empty body", b"", 400, "not valid JSON"),
    (CHAT, "a list", b"[]", 400, "object"),
    (CHAT, "no model", {"messages": HI}, 400, "model"),
    (CHAT, "model a number", asking(model=3), 400, "model"),
    (CHAT, "unknown model", asking(model="llama3.2"), 404, "not found"),
    (CHAT, "path as model", asking(model="../../etc/passwd"), 400, "passwd"),
    (CHAT, "a model for vectors", asking(model=EMBEDDER), 400, "embeddings"),
    (CHAT, "messages a text", asking(messages="hi"), 400, "messages"),
    (CHAT, "unknown role", asking(messages=[{"role": "king", "content": "x"}]), 400, "king"),
    (CHAT, "content parts", asking(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]), 400,
     "content"),
    (CHAT, "an image", asking(messages=[{"role": "user", "content": "x", "images": ["aGk="]}]), 400, "no projector"),
    (CHAT, "an image in no base64", asking(messages=[{"role": "user", "content": "x", "images": ["?"]}]), 400,
     "base64"),
    (CHAT, "calls in history", asking(messages=[{"role": "assistant", "tool_calls": [{}]}]), 400, "tool_calls"),
    (CHAT, "tools", asking(tools=[{"type": "function"}]), 400, "tools"),
    (CHAT, "thinking", asking(think=True), 400, "does not support thinking"),
    (CHAT, "thinking by degree", asking(think="high"), 400, "does not support thinking"),
    (CHAT, "options a list", asking(options=[]), 400, "options"),
    (CHAT, "temperature a text", asking(options={"temperature": "hot"}), 400, "options.temperature"),
    (CHAT, "temperature negative", asking(options={"temperature": -1}), 400, "options.temperature"),
    (CHAT, "top_p above one", asking(options={"top_p": 2}), 400, "options.top_p"),
    (CHAT, "num_predict below -2", asking(options={"num_predict": -3}), 400, "options.num_predict"),
    (CHAT, "mirostat", asking(options={"mirostat": 2}), 400, "options.mirostat"),
    (CHAT, "stop a number", asking(options={"stop": 3}), 400, "options.stop"),
    (CHAT, "format a word", asking(format="xml"), 400, "format"),
    (CHAT, "format a number", asking(format=3), 400, "format"),
    (CHAT, "schema that is none", asking(format={"type": "strin"}), 400, "format.type"),
    (CHAT, "schema keyword not done", asking(format={"not": {}}), 400, "format.not"),
    (CHAT, "keep_alive a word", asking(keep_alive="long"), 400, "keep_alive"),
    (CHAT, "keep_alive a list", asking(keep_alive=[]), 400, "keep_alive"),
    (CHAT, "top_logprobs alone", asking(top_logprobs=3), 400, "logprobs"),
    (CHAT, "too many logprobs", asking(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, "stream a text", asking(stream="no"), 400, "stream"),
    (CHAT, "too long", asking(messages=[{"role": "user", "content": "word " * 20_000}]), 400, "maximum context length"),
    (CHAT, "loading what is not there", {"model": "nope"}, 404, "not found"),
    (GENERATE, "no model", {"prompt": "x"}, 400, "model"),
    (GENERATE, "prompt a list", prompting(prompt=["a"]), 400, "prompt"),
    (GENERATE, "suffix", prompting(suffix="b"), 400, "suffix"),
    (GENERATE, "template", prompting(template="{{ .Prompt }}"), 400, "template"),
    (GENERATE, "context", prompting(context=[1, 2]), 400, "context"),
    (GENERATE, "images", prompting(images=["aGk="]), 400, "no projector"),
    (GENERATE, "raw with images", prompting(raw=True, images=["aGk="]), 400, "images"),
    (GENERATE, "raw with a system prompt", prompting(raw=True, system="x"), 400, "system"),
    (GENERATE, "raw a text", prompting(raw="yes"), 400, "raw"),
    (GENERATE, "unloading what is not there", {"model": "nope", "keep_alive": 0}, 404, "not found"),
    (GENERATE, "loading what makes no text", {"model": EMBEDDER}, 400, "embeddings"),
    ("/api/embed", "no model", {"input": "x"}, 400, "model"),
    ("/api/embed", "input a number", {"model": EMBEDDER, "input": 3}, 400, "input"),
    ("/api/embed", "input tokens", {"model": EMBEDDER, "input": [1, 2]}, 400, "input"),
    ("/api/embed", "many texts", {"model": EMBEDDER, "input": ["x"] * 3000}, 400, "2,048"),
    ("/api/embed", "negative dimensions", {"model": EMBEDDER, "input": "x", "dimensions": -1}, 400, "dimensions"),
    ("/api/embed", "a model that makes text", {"model": DEFAULT_MODEL, "input": "x"}, 400, "not for embeddings"),
    ("/api/embed", "unknown model", {"model": "nope", "input": "x"}, 404, "not found"),
    ("/api/embeddings", "prompt a list", {"model": EMBEDDER, "prompt": ["x"]}, 400, "prompt"),
    ("/api/show", "no model", {}, 400, "model"),
    ("/api/show", "unknown model", {"model": "nope"}, 404, "not found"),
    ("DELETE /api/delete", "no model", {}, 400, "model"),
    ("DELETE /api/delete", "unknown model", {"model": "nope"}, 404, "not found"),
    ("/api/copy", "no destination", {"source": DEFAULT_MODEL}, 400, "destination"),
    ("/api/copy", "unknown source", {"source": "nope", "destination": "x"}, 404, "not found"),
    ("/api/copy", "a path as destination", {"source": DEFAULT_MODEL, "destination": "../x"}, 400, "name"),
    (PULL, "no model", {}, 400, "model"),
    (PULL, "a path", {"model": "/etc/passwd"}, 404, "not found"),
    (PULL, "a relative path", {"model": "./model.gguf"}, 404, "not found"),
    (PULL, "a file's address", {"model": "file:///etc/passwd"}, 404, "not found"),
    (PULL, "a name of Ollama's", {"model": "llama3.2"}, 404, "not found"),
    (PULL, "another scheme", {"model": "ftp://host/x.gguf"}, 400, "ftp"),
    (PULL, "a hub's tag", {"model": "hf.co/owner/repo:Q4_K_M"}, 400, "FILE.gguf"),
    (PULL, "a long name", {"model": "x" * 5000}, 400, "model"),
    ("/api/push", "anything", {"model": DEFAULT_MODEL}, 501, "edge push"),
    (CREATE, "of nothing", {"model": "new"}, 400, "from"),
    (CREATE, "of two", making(files={"a.gguf": NO_DIGEST}), 400, "from"),
    (CREATE, "of an unknown model", making(**{"from": "nope"}), 404, "not found"),
    (CREATE, "under a path", making(model="../x"), 400, "name"),
    (CREATE, "of a blob that is not there", {"model": "new", "files": {"a.gguf": NO_DIGEST}}, 400, "no blob"),
    (CREATE, "of no digest", {"model": "new", "files": {"a.gguf": "../../x"}}, 400, "digest"),
    (CREATE, "of two files", {"model": "new", "files": {"a": NO_DIGEST, "b": NO_DIGEST}}, 400, "one GGUF"),
    (CREATE, "with an adapter", making(adapters={"a": NO_DIGEST}), 400, "adapters"),
    (CREATE, "quantized", making(quantize="q4_K_M"), 400, "edge quantize"),
    (CREATE, "with messages", making(messages=HI), 400, "messages"),
    (CREATE, "with a Go template", making(template="{{ .Prompt }}"), 400, "Jinja"),
    (CREATE, "with a deaf template", making(template="hello"), 400, "leaves out"),
    (CREATE, "with a template that takes all memory", making(template="{{ 'a' * 10**12 }}"), 400, "template"),
    (CREATE, "with a template that reaches out", making(template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
     400, "template"),
    (CREATE, "with a wrong parameter", making(parameters={"temperature": 9}), 400, "parameters.temperature"),
    (CREATE, "with a system prompt for vectors", making(**{"from": EMBEDDER, "system": "x"}), 400, "system"),
    (CREATE, "with a long licence", making(license=["x" * 600]), 400, "license"),
    ("/api/blobs/zzz", "no digest", b"x", 400, "digest"),
    ("GET /api/chat", "another method", None, 405, "Method"),
    ("GET /api/nothing", "no such path", None, 404, "Found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "body", "status", "part"), [(c[0], *c[2:]) for c in CASES], ids=[f"{c[0]}: {c[1]}" for c in CASES]
)
def test_malformed_requests(http: httpx.Client, where: str, body: Any, status: int, part: str) -> None:
    method, _, path = where.rpartition(" ")
    content: bytes | None = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    reply = http.request(method or "POST", path, content=content)
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    assert part in reply.json()["error"]


def test_after_all_that_it_serves(client: Any) -> None:
    assert client.chat(DEFAULT_MODEL, HI, options=GREEDY).message.content
    assert {m.model for m in client.list().models} == {DEFAULT_MODEL, EMBEDDER}
