"""Malformed requests: the right status, OpenAI's error object, the field and the fix, and a server that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "messages": HI, **more}


SCHEMA = "response_format.json_schema.schema"


def schema(body: dict[str, Any]) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": body}})


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


CASES: list[tuple[str, str, Any, int, str | None, str]] = [
    # name, path, body, status, param, part of the message
    ("not json", CHAT, b"{", 400, None, "not valid JSON"),
    ("empty body", CHAT, b"", 400, None, "not valid JSON"),
    ("not utf-8", CHAT, b'{"model":"\xff"}', 400, None, "JSON"),
    ("a list", CHAT, b"[]", 400, None, "object"),
    ("a number", CHAT, b"3", 400, None, "object"),
    ("deeply nested", CHAT, b'{"messages":' + b"[" * 100_000, 400, None, "JSON"),
    ("no model", CHAT, {"messages": HI}, 400, "model", "model"),
    ("model a number", CHAT, chat(model=3), 400, "model", "str"),
    ("unknown model", CHAT, chat(model="gpt-4o"), 404, None, "edge pull"),
    ("unparsable model", CHAT, chat(model="a b:c:d"), 400, None, "a b:c:d"),
    ("path as model", CHAT, chat(model="../../etc/passwd"), 400, None, "passwd"),
    ("no messages", CHAT, {"model": DEFAULT_MODEL}, 400, "messages", "messages"),
    ("empty messages", CHAT, chat(messages=[]), 400, "messages", "length"),
    ("messages a text", CHAT, chat(messages="hi"), 400, "messages", "array"),
    ("message without role", CHAT, chat(messages=[{"content": "x"}]), 400, "messages[0]", "role"),
    ("unknown role", CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "king"),
    ("content a number", CHAT, chat(messages=[{"role": "user", "content": 1}]), 400, "messages[0].content", "int"),
    ("image part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
     400, "messages[0].content[0].image_url", "fetches nothing"),
    ("sound part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
     400, "messages[0].content[0].type", "input_audio"),
    ("temperature a text", CHAT, chat(temperature="hot"), 400, "temperature", "float"),
    ("temperature negative", CHAT, chat(temperature=-1), 400, "temperature", ">= 0"),
    ("temperature huge", CHAT, chat(temperature=9), 400, "temperature", "<= 2"),
    ("temperature infinite", CHAT, b'{"model":"x","messages":[],"temperature":1e999}', 400, None, ""),
    ("top_p above one", CHAT, chat(top_p=1.5), 400, "top_p", "<= 1"),
    ("max_tokens zero", CHAT, chat(max_tokens=0), 400, "max_tokens", ">= 1"),
    ("max_tokens negative", CHAT, chat(max_tokens=-5), 400, "max_tokens", ">= 1"),
    ("max_tokens a fraction", CHAT, chat(max_tokens=1.5), 400, "max_tokens", "int"),
    ("max_completion_tokens a text", CHAT, chat(max_completion_tokens="all"), 400, "max_completion_tokens", "int"),
    ("stop a number", CHAT, chat(stop=3), 400, "stop", "int"),
    ("stop empty", CHAT, chat(stop=""), 400, "stop", "length"),
    ("too many stops", CHAT, chat(stop=["a"] * 50), 400, "stop", "length"),
    ("seed a text", CHAT, chat(seed="lucky"), 400, "seed", "int"),
    ("seed huge", CHAT, chat(seed=1 << 70), 400, "seed", "int"),
    ("stream a text", CHAT, chat(stream="yes"), 400, "stream", "bool"),
    ("n zero", CHAT, chat(n=0), 400, "n", ">= 1"),
    ("n nine", CHAT, chat(n=9), 400, "n", "<= 8"),
    ("best of more", TEXT, {"model": DEFAULT_MODEL, "prompt": "a", "best_of": 3}, 400, "best_of", "n"),
    ("repeat_penalty zero", CHAT, chat(repeat_penalty=0), 400, "repeat_penalty", ">= 0.01"),
    ("two repetition penalties", CHAT, chat(repeat_penalty=1.1, repetition_penalty=1.2),
     400, "repetition_penalty", "differ"),
    ("repeat_last_n below -1", CHAT, chat(repeat_last_n=-2), 400, "repeat_last_n", ">= -1"),
    ("typical_p above one", CHAT, chat(typical_p=2), 400, "typical_p", "<= 1"),
    ("dry_base below one", CHAT, chat(dry_base=0.5), 400, "dry_base", ">= 1"),
    ("no dry breakers", CHAT, chat(dry_sequence_breakers=[]), 400, "dry_sequence_breakers", "length"),
    ("a long dry breaker", CHAT, chat(dry_sequence_breakers=["x" * 99]), 400, "dry_sequence_breakers[0]", "length"),
    ("xtc_threshold above one", CHAT, chat(xtc_threshold=1.5), 400, "xtc_threshold", "<= 1"),
    ("mirostat", CHAT, chat(mirostat=2), 400, "mirostat", "not supported"),
    ("penalty out of range", CHAT, chat(presence_penalty=3), 400, "presence_penalty", "<= 2"),
    ("logit_bias a word", CHAT, chat(logit_bias={"dog": 1}), 400, "logit_bias", "token ids"),
    ("logit_bias out of range", CHAT, chat(logit_bias={"1": 500}), 400, "logit_bias[...]", "<= 100"),
    ("tools", CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    ("unknown format", CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "xml"),
    ("unknown part of a format", CHAT, chat(response_format={"type": "text", "x": 1}), 400, "response_format", "x"),
    ("format without schema", CHAT, chat(response_format={"type": "json_schema"}), 400,
     "response_format.json_schema", "missing"),
    ("schema keyword not done", CHAT, schema({"type": "object", "properties": {"a": {"not": {}}}}), 400,
     f"{SCHEMA}.properties.a.not", "Leave it out"),
    ("schema that is not one", CHAT, schema({"type": "strin"}), 400, f"{SCHEMA}.type", "integer"),
    ("schema too deep", CHAT, schema(nested(60)), 400, f"{SCHEMA}{'.items' * 32}.type", "deeper"),
    ("schema too large", CHAT, schema({"enum": list(range(100_000))}), 400, f"{SCHEMA}.enum", "2,000"),
    ("schema that allows nothing", CHAT, schema({"allOf": [{"type": "string"}, {"type": "null"}]}), 400,
     SCHEMA, "Unsatisfiable"),
    ("schema that goes in a circle", CHAT, schema({"$ref": "#"}), 400, SCHEMA, "cannot be followed"),
    ("pattern with look-ahead", CHAT, schema({"type": "string", "pattern": "(?=a)b"}), 400, SCHEMA, "look-a"),
    ("patterns that intersect", CHAT, schema({"allOf": [{"pattern": f"(.*a){{9}}.{{{i}}}"} for i in range(20)]}), 400,
     SCHEMA, "patterns"),
    ("broken expression", CHAT, chat(structured_outputs={"regex": "("}), 400, "structured_outputs.regex", "regex"),
    ("endless expression", TEXT, {"model": DEFAULT_MODEL, "prompt": "x", "structured_outputs": {"regex": "(" * 50_000}},
     400, "structured_outputs.regex", "regex"),
    ("no choices", CHAT, chat(structured_outputs={"choice": []}), 400, "structured_outputs.choice", "length"),
    ("grammar of nothing", CHAT, chat(grammar="root ::= root"), 400, "grammar", "cannot be followed"),
    ("grammar without end", CHAT, chat(grammar="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2500))),
     400, "grammar", "rules"),
    ("two forms", CHAT, chat(response_format={"type": "json_object"}, grammar='start: "a"'), 400, "grammar", "two"),
    ("structured outputs of nothing", CHAT, chat(structured_outputs={}), 400, "structured_outputs", "nothing"),
    ("old name of structured outputs", CHAT, chat(guided_regex="a"), 400, "guided_regex", "not supported"),
    ("logprobs a number", CHAT, chat(logprobs=3), 400, "logprobs", "bool"),
    ("top_logprobs alone", CHAT, chat(top_logprobs=3), 400, "top_logprobs", "logprobs"),
    ("too many logprobs", CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "<= 20"),
    ("logprobs a bool", TEXT, {"model": DEFAULT_MODEL, "prompt": "a", "logprobs": True}, 400, "logprobs", "int"),
    ("too long a prompt", CHAT, chat(messages=[{"role": "user", "content": "word " * 20_000}]),
     400, "messages", "maximum context length is 8192 tokens"),
    ("far too long a prompt", CHAT, chat(messages=[{"role": "user", "content": "x" * 2_000_000}]),
     400, "messages", "maximum context length is 8192 tokens"),
    ("too many tokens asked for", CHAT, chat(max_tokens=9000), 400, "messages", "maximum context length"),
    ("top_k beyond any integer", CHAT, chat(top_k=1 << 64), 400, "top_k", "<="),
    ("many logit_bias", CHAT, chat(logit_bias={str(i): 1 for i in range(2000)}), 400, "logit_bias", "length"),
    ("logit_bias in other digits", CHAT, chat(logit_bias={"١٢": 1}), 400, "logit_bias", "token ids"),
    ("a message of calls", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}]}]),
     400, "messages[0].tool_calls", "not supported"),
    ("a crowd of empty messages", CHAT, chat(messages=[{"role": "user", "content": ""}] * 20_000),
     400, "messages", "maximum context length"),
    ("token beyond any integer", TEXT, {"model": DEFAULT_MODEL, "prompt": [1 << 64]}, 400, "prompt[0]", "<="),
    ("no prompt", TEXT, {"model": DEFAULT_MODEL}, 400, "prompt", "prompt"),
    ("empty prompt", TEXT, {"model": DEFAULT_MODEL, "prompt": ""}, 400, "prompt", "empty"),
    ("empty token prompt", TEXT, {"model": DEFAULT_MODEL, "prompt": []}, 400, "prompt", "empty"),
    ("unknown token", TEXT, {"model": DEFAULT_MODEL, "prompt": [1, 10**8]}, 400, "prompt", "token"),
    ("negative token", TEXT, {"model": DEFAULT_MODEL, "prompt": [-1]}, 400, "prompt[0]", ">= 0"),
    ("prompts of texts", TEXT, {"model": DEFAULT_MODEL, "prompt": ["a", "b"]}, 400, "prompt[0]", "str"),
    ("echo", TEXT, {"model": DEFAULT_MODEL, "prompt": "a", "echo": True}, 400, "echo", "not supported"),
    ("suffix", TEXT, {"model": DEFAULT_MODEL, "prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def still_serving(appliance: RunningAppliance) -> Iterator[None]:
    yield
    with appliance.client() as http:
        http.post(CHAT, json=chat_body("Hi", max_tokens=1)).raise_for_status()


@pytest.mark.parametrize(("path", "body", "status", "param", "part"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_requests(
    appliance: RunningAppliance, path: str, body: Any, status: int, param: str | None, part: str
) -> None:
    with appliance.client() as http:
        reply = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_stream_that_cannot_start_has_a_status(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat(stream=True, max_tokens=9000))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("GET", "/v1/models/none:such", 404),
        ("POST", "/v1/models", 405),
    ],
)
def test_unknown_paths_and_methods(appliance: RunningAppliance, method: str, path: str, status: int) -> None:
    with appliance.client() as http:
        reply = http.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/edge/v1/models/load", {"model": "none:such"}, 404, "model_not_found"),
        ("POST", "/edge/v1/models/load", {}, 400, "invalid_request"),
        ("DELETE", "/edge/v1/models/none:such", None, 404, "model_not_found"),
        ("GET", "/edge/v1/jobs/none", None, 404, "job_not_found"),
        ("GET", "/edge/v1/logs?lines=-1", None, 400, "invalid_request"),
        ("POST", "/edge/v1/models/pull", {"source": 3}, 400, "invalid_request"),
        ("POST", "/edge/v1/models/pull", {"source": "x" * 5000}, 400, "invalid_request"),
    ],
)
def test_the_admin_api_answers_with_problem_details(
    appliance: RunningAppliance, method: str, path: str, body: Any, status: int, code: str
) -> None:
    with appliance.client() as http:
        reply = http.request(method, path, json=body)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"].startswith("application/problem+json")
    problem = reply.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"]


def test_a_body_over_the_limit_is_refused_while_it_is_read(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, content=b" " * (17 << 20))
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_pages_of_other_sites_are_refused(appliance: RunningAppliance, headers: dict[str, str]) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat_body("Hi"), headers=headers)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "forbidden"


def test_unknown_fields_of_messages_are_listed(appliance: RunningAppliance) -> None:
    body = chat_body("Hi", max_tokens=1)
    body["messages"][0]["mood"] = "good"
    with appliance.client() as http:
        assert http.post(CHAT, json=body).json()["warnings"] == ["unknown field 'mood' in messages was ignored"]


def test_unknown_fields_are_listed(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat_body("Hi", max_tokens=1, colour="red", user="me"))
    assert reply.json()["warnings"] == ["unknown field 'colour' was ignored"]
    assert "colour" in reply.headers["x-edge-warnings"]
