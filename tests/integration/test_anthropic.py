"""The running appliance through Anthropic's own client, and its events and errors on the wire."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.support import DEFAULT_MODEL, RunningAppliance, running_appliance

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "Say hi."}]
CONTEXT = 512
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance of its own, with a context that a test can fill."""
    with running_appliance(tmp_path_factory.mktemp("anthropic"), EDGE_CONTEXT_TOKENS=str(CONTEXT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(serving: RunningAppliance) -> Iterator[Any]:
    """Anthropic's own; its overloads do not take bodies that are dictionaries."""
    untyped: Any = anthropic.Anthropic(base_url=serving.url, api_key="none", max_retries=0, timeout=60)
    with untyped as client:
        yield client


@pytest.fixture(scope="module")
def http(serving: RunningAppliance) -> Iterator[httpx.Client]:
    with serving.client() as http:
        yield http


def asked(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "max_tokens": 12, "messages": HI, "temperature": 0, **more}


def told(**more: Any) -> dict[str, Any]:
    """The same for the client, which has no arguments for how tokens are drawn."""
    body = asked(**more)
    known = ("model", "max_tokens", "messages", "system", "stop_sequences", "tools", "tool_choice", "stream")
    given = {k: body.pop(k) for k in known if k in body}
    return {**given, "extra_body": body}


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each named as its data says."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found: list[dict[str, Any]] = []
    for block in reply.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# ---------------------------------------------------------------- answers


def test_a_message_whole_and_in_events(client: Any) -> None:
    whole = client.messages.create(**told())
    assert (whole.type, whole.role, whole.model, whole.stop_reason) == (
        "message", "assistant", DEFAULT_MODEL, "max_tokens",
    )  # fmt: skip
    assert whole.id.startswith("msg_")
    assert whole._request_id == whole.id.replace("msg_", "req_")
    assert whole.usage.output_tokens == 12
    (block,) = whole.content
    with client.messages.stream(**told()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == block.text != ""
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    read = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in (whole, final)]
    assert read == [client.messages.count_tokens(model=DEFAULT_MODEL, messages=HI).input_tokens] * 2
    assert final.usage.cache_read_input_tokens > 0, "the prompt was read before"


async def test_the_client_of_asyncio(serving: RunningAppliance) -> None:
    untyped: Any = anthropic.AsyncAnthropic(base_url=serving.url, auth_token="none", timeout=60)
    async with untyped as client:
        whole = await client.messages.create(**told())
        async with client.messages.stream(**told()) as stream:
            text = "".join([part async for part in stream.text_stream])
        raw = [event async for event in await client.messages.create(**told(), stream=True)]
    assert text == whole.content[0].text
    assert [raw[0].type, raw[-1].type] == ["message_start", "message_stop"]


def test_events_come_in_their_order(http: httpx.Client) -> None:
    start, first, ping, *deltas, stop, delta, last = events_of(http.post(MESSAGES, json=asked(stream=True)))
    assert [e["type"] for e in (start, first, ping, stop, delta, last)] == [
        "message_start", "content_block_start", "ping", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert set(start["message"]) == {
        "id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage",
    }  # fmt: skip
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert first["content_block"]["type"] == "text"
    assert {d["type"] for d in deltas} == {"content_block_delta"}
    assert {d["delta"]["type"] for d in deltas} == {"text_delta"}
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 12
    assert {e["index"] for e in (first, *deltas, stop)} == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_an_answer_is_named(client: Any, http: httpx.Client, stream: bool) -> None:
    text = client.messages.create(**told(max_tokens=24)).content[0].text
    stop = text[8:11]
    more = {"max_tokens": 24, "stop_sequences": ["never said", stop], "stream": stream}
    reply = http.post(MESSAGES, json=asked(**more))
    if stream:
        events = events_of(reply)
        end, said = events[-2]["delta"], "".join(e["delta"]["text"] for e in events if e["type"].endswith("k_delta"))
    else:
        end, said = reply.json(), reply.json()["content"][0]["text"]
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", stop)
    assert said == text[: text.index(stop)]


def test_why_an_answer_ended(client: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    ended = client.messages.create(**told(max_tokens=100, output_config=form))
    assert (ended.stop_reason, ended.stop_sequence) == ("end_turn", None)
    assert set(json.loads(ended.content[0].text)) == {"name", "age"}
    long = [{"role": "user", "content": "word " * (CONTEXT - 80)}]
    full = client.messages.create(**told(messages=long, max_tokens=32_000))
    used = full.usage.input_tokens + full.usage.cache_read_input_tokens + full.usage.output_tokens
    assert (full.stop_reason, used) in (("model_context_window_exceeded", CONTEXT), ("end_turn", used))


def test_conversations_and_their_blocks(client: Any, http: httpx.Client) -> None:
    def block(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    turns = [("user", "I am Anna."), ("assistant", "Hello Anna."), ("user", "Who am I?")]
    plain = asked(system="Be terse.\nBe kind.", messages=[{"role": r, "content": c} for r, c in turns])
    parted = asked(
        system=[block("Be terse."), block("Be kind.")],
        messages=[{"role": r, "content": [block(c[:4]), block(c[4:])]} for r, c in turns],
    )
    parted["messages"][1]["content"].insert(0, {"type": "thinking", "thinking": "Hm.", "signature": ""})
    one, other = (client.messages.create(**told(**body)) for body in (plain, parted))
    assert one.content[0].text == other.content[0].text
    openai = {"model": DEFAULT_MODEL, "temperature": 0, "max_tokens": 12, "messages": [
        {"role": "system", "content": plain["system"]}, *plain["messages"],
    ]}  # fmt: skip
    same = http.post("/v1/chat/completions", json=openai).json()
    assert same["choices"][0]["message"]["content"] == one.content[0].text


def test_fields_that_are_not_done_are_named(http: httpx.Client) -> None:
    text = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "citations": None, "tone": "kind"}
    messages = [{"role": "user", "content": [text]}]
    body = asked(messages=messages, metadata={"user_id": "u"}, service_tier="auto", top_k=5, tempo="fast")
    reply = http.post(MESSAGES, json=body, headers={"anthropic-version": "2023-06-01"})
    assert reply.json()["warnings"] == [
        "unknown field 'tempo' was ignored", "unknown field 'tone' in messages.content was ignored",
    ]  # fmt: skip
    assert "tempo" in reply.headers["x-edge-warnings"]
    start = events_of(http.post(MESSAGES, json={**body, "stream": True}))[0]
    assert start["message"]["warnings"] == reply.json()["warnings"]


def test_models_as_its_client_lists_them(client: Any) -> None:
    (model,) = [m for m in client.models.list() if m.id == DEFAULT_MODEL]
    assert (model.type, model.display_name) == ("model", DEFAULT_MODEL)
    assert client.models.retrieve(DEFAULT_MODEL).created_at == model.created_at


# ---------------------------------------------------------------- what goes wrong


def image(data: str, **source: Any) -> list[dict[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": data, **source}
    return [{"role": "user", "content": [{"type": "image", "source": source}]}]


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*blocks]}]


CASES: list[tuple[str, Any, int, str, str]] = [
    ("not json", b"{", 400, "invalid_request_error", "JSON"),
    ("a list", b"[]", 400, "invalid_request_error", "object"),
    ("no max_tokens", {"model": DEFAULT_MODEL, "messages": HI}, 400, "invalid_request_error", "max_tokens"),
    ("max_tokens zero", asked(max_tokens=0), 400, "invalid_request_error", "'max_tokens'"),
    ("no messages", asked(messages=[]), 400, "invalid_request_error", "'messages'"),
    ("a system message", asked(messages=[{"role": "system", "content": "x"}]), 400, "invalid_request_error",
     "'messages[0].role'"),
    ("a beginning of the answer", asked(messages=[*HI, {"role": "assistant", "content": "Hi"}]), 400,
     "invalid_request_error", "going on"),
    ("a document", asked(messages=user({"type": "document", "source": {}})), 400, "invalid_request_error",
     "'messages[0].content[0].type'"),
    ("thinking of the user", asked(messages=user({"type": "thinking", "thinking": "x"})), 400,
     "invalid_request_error", "thinking"),
    ("a block without a type", asked(messages=user({"text": "x"})), 400, "invalid_request_error", "type"),
    ("content a number", asked(messages=user(3)), 400, "invalid_request_error", "'messages[0].content[0]'"),
    ("temperature above one", asked(temperature=1.5), 400, "invalid_request_error", "'temperature'"),
    ("too many stop sequences", asked(stop_sequences=["a"] * 50), 400, "invalid_request_error", "'stop_sequences'"),
    ("an empty stop sequence", asked(stop_sequences=[""]), 400, "invalid_request_error", "'stop_sequences[0]'"),
    ("system a number", asked(system=3), 400, "invalid_request_error", "'system'"),
    ("an image for a model of text", asked(messages=image("AAAA")), 400, "invalid_request_error", "projector"),
    ("an image elsewhere", asked(messages=image("", type="url", url="http://127.0.0.1/x.png")), 400,
     "invalid_request_error", "fetches nothing"),
    ("a damaged image", asked(messages=image("A")), 400, "invalid_request_error", "base64"),
    ("a schema that is none", asked(output_config={"format": {"type": "json_schema", "schema": {"type": "strin"}}}),
     400, "invalid_request_error", "'output_config.format.schema.type'"),
    ("an unknown part of a form", asked(output_config={"speed": 1}), 400, "invalid_request_error", "speed"),
    ("a container", asked(container="c"), 400, "invalid_request_error", "'container'"),
    ("servers of tools", asked(mcp_servers=[{"url": "x"}]), 400, "invalid_request_error", "'mcp_servers'"),
    ("unknown model", asked(model="claude-sonnet-4"), 404, "not_found_error", "claude-sonnet-4"),
    ("a model of vectors", asked(model="minilm:l6-v2"), 400, "invalid_request_error", "embeddings"),
    ("too long a prompt", asked(messages=[{"role": "user", "content": "word " * 2000}]), 400, "invalid_request_error",
     f"maximum context length is {CONTEXT} tokens"),
]  # fmt: skip


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(("body", "status", "kind", "part"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_requests(http: httpx.Client, path: str, body: Any, status: int, kind: str, part: str) -> None:
    reply = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
    if path == COUNT and reply.status_code == 200:
        assert any(word in part for word in ("max_tokens", "temperature", "stop_sequences", "maximum")), "of answers"
        return
    assert reply.status_code == status, reply.text
    found = reply.json()
    assert set(found) == {"type", "error", "request_id"}
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert part in found["error"]["message"]
    assert reply.headers["request-id"] == found["request_id"]


def test_errors_are_its_clients_classes(client: Any, serving: RunningAppliance) -> None:
    with pytest.raises(anthropic.NotFoundError, match="edge pull"):
        client.messages.create(**told(model="gpt-4o"))
    with pytest.raises(anthropic.BadRequestError) as e:
        client.messages.create(**told(temperature=2))
    body: Any = e.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert e.value.request_id == body["request_id"]
    invalid: Any = anthropic.Anthropic(base_url=serving.url, api_key="edge_" + "a" * 10 + "_" + "b" * 40, max_retries=0)
    with invalid, pytest.raises(anthropic.AuthenticationError, match="not valid"):
        invalid.messages.create(**told())


def test_a_path_that_is_not_there(http: httpx.Client) -> None:
    for path, status in ((f"{MESSAGES}/batches", 404), (MESSAGES, 405)):
        reply = http.get(path)
        assert (reply.status_code, reply.json()["type"]) == (status, "error")


def test_what_goes_wrong_in_a_stream_is_an_event(tmp_path: Path) -> None:
    with running_appliance(tmp_path) as own, own.client() as http:
        body = asked(max_tokens=4000, messages=[{"role": "user", "content": "Count to a thousand."}])
        with http.stream("POST", MESSAGES, json={**body, "stream": True}) as reply:
            lines = reply.iter_lines()
            assert any("content_block_delta" in line for line in lines)
            for pid in own.worker_pids():
                os.kill(pid, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert rest[-2] == "event: error"
        error = json.loads(rest[-1].removeprefix("data: "))
        assert (error["type"], error["error"]["type"]) == ("error", "api_error")
        assert error["request_id"] == reply.headers["request-id"]
        assert http.post(MESSAGES, json=asked()).status_code == 200, "it starts again"


# ---------------------------------------------------------------- tools

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a town.",
    "input_schema": {
        "type": "object",
        "properties": {"town": {"type": "string", "maxLength": 16}, "unit": {"enum": ["C", "F"]}},
        "required": ["town", "unit"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
RAIN = [{"role": "user", "content": "Does it rain in Nice?"}]


def with_tools(choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    return asked(messages=RAIN, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=100, **more)


def test_a_call_of_a_tool_and_its_result(client: Any) -> None:
    body = with_tools({"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True})
    whole = client.messages.create(**told(**body))
    assert whole.stop_reason == "tool_use"
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert set(call.input) == {"town", "unit"}
    with client.messages.stream(**told(**body)) as stream:
        bits = [e.partial_json for e in stream if e.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(bits)) == call.input == final.content[-1].input
    assert (final.stop_reason, final.content[-1].name) == ("tool_use", "get_weather")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    said, back = [block.model_dump() for block in whole.content], [result, {"type": "text", "text": "So?"}]
    turns = [*RAIN, {"role": "assistant", "content": said}, {"role": "user", "content": back}]
    answer = client.messages.create(**told(**{**body, "messages": turns, "tool_choice": {"type": "none"}}))
    assert answer.content[0].type == "text"
    counted = client.messages.count_tokens(**{k: body[k] for k in ("model", "tools", "tool_choice")}, messages=turns)
    assert counted.input_tokens > whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_any_tool_is_one_of_them(client: Any) -> None:
    called = client.messages.create(
        **told(**with_tools({"type": "any", "disable_parallel_tool_use": True}, stop_sequences=["never said"]))
    )
    assert called.stop_reason == "tool_use"
    assert called.content[-1].name in ("get_weather", "clock")


def tool(**more: Any) -> dict[str, Any]:
    return asked(tools=[{**WEATHER, **more}])


TOOL_CASES: list[tuple[str, Any, str]] = [
    ("a tool of the server", asked(tools=[{"type": "web_search_2", "name": "web_search"}]), "web_search_2"),
    ("no schema", asked(tools=[{"name": "x"}]), "'tools[0].input_schema'"),
    ("a schema that is none", tool(input_schema={"type": "object", "properties": {"a": {"type": "strin"}}}),
     "'tools[0].input_schema.properties.a.type'"),
    ("a schema of a list", tool(input_schema={"type": "array"}), "'tools[0].input_schema.type'"),
    ("a name with spaces", tool(name="get weather"), "'tools[0].name'"),
    ("two of one name", asked(tools=[WEATHER, WEATHER]), "'tools[1].name'"),
    ("an unknown choice", with_tools({"type": "all"}), "'tool_choice.type'"),
    ("a tool that is not there", with_tools({"type": "tool", "name": "radar"}), "'tool_choice.name'"),
    ("no name of a tool", with_tools({"type": "tool"}), "'tool_choice.name'"),
    ("any of none", asked(tool_choice={"type": "any"}), "tool_choice"),
    ("a call of the user", asked(messages=user({"type": "tool_use", "id": "1", "name": "x", "input": {}})), "tool_use"),
    ("input a text", asked(messages=[*HI, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "x", "input": "{}"}]}, *HI]), "messages[1].content[0].input"),
    ("a crowd of tools", asked(tools=[{**CLOCK, "name": f"t{i}"} for i in range(200)]), "'tools'"),
    ("unknown thinking", asked(thinking={"type": "deep"}), "'thinking.type'"),
]  # fmt: skip


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(("body", "part"), [c[1:] for c in TOOL_CASES], ids=[c[0] for c in TOOL_CASES])
def test_malformed_tools(http: httpx.Client, path: str, body: Any, part: str) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert part in reply.json()["error"]["message"]
