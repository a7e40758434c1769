"""`/v1/responses` through OpenAI's own client: answers, streams, forms, conversations that outlive it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from edge.access.keys import Key, Keys, Limits
from tests.integration.test_access import wait_for_usage
from tests.support import (
    DEFAULT_MODEL,
    RunningAppliance,
    running_appliance,
    sse_events,
    start_appliance,
    stop,
)

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance that asks for keys on loopback too."""
    with running_appliance(tmp_path_factory.mktemp("responses"), "--require-keys", "on") as running:
        yield running


@pytest.fixture
def key(guarded: RunningAppliance) -> tuple[Key, str]:
    return Keys(guarded.home / "state.db", actor="test").create(Limits())


@pytest.fixture
def client(guarded: RunningAppliance, key: tuple[Key, str]) -> Iterator[openai.OpenAI]:
    with client_of(guarded, key[1]) as client:
        yield client


@pytest.fixture
def http(guarded: RunningAppliance, key: tuple[Key, str]) -> Iterator[httpx.Client]:
    with guarded.client(headers={"authorization": f"Bearer {key[1]}"}) as http:
        yield http


def client_of(appliance: RunningAppliance, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=key, max_retries=0, timeout=120)


def ask(client: openai.OpenAI, said: str | list[Any], **more: Any) -> Any:
    """A greedy answer of a few tokens."""
    fields: dict[str, Any] = {"model": DEFAULT_MODEL, "input": said, "temperature": 0, "max_output_tokens": 12, **more}
    create: Any = client.responses.create
    return create(**fields)


def items_before(client: openai.OpenAI, response_id: str, **query: Any) -> list[Any]:
    """What a response answered, page by page."""
    return list(client.responses.input_items.list(response_id, **query))


# ---------------------------------------------------------------- answers


def test_a_response_is_whole_and_kept(client: openai.OpenAI) -> None:
    asked = {"instructions": "Be brief.", "metadata": {"topic": "colour"}, "user": "me", "max_output_tokens": 40}
    made = ask(client, "Name a colour.", **asked)
    assert made.output_text
    assert (made.status, made.error, made.store) == ("completed", None, True)
    assert (made.instructions, made.metadata, made.user, made.temperature) == ("Be brief.", asked["metadata"], "me", 0)
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens > 0
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    (item,) = items_before(client, made.id)
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "Name a colour."}]
    client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match=made.id):
            gone(made.id)


async def test_the_stream_helper_tells_the_same(guarded: RunningAppliance, key: tuple[Key, str]) -> None:
    fields: dict[str, Any] = {"model": DEFAULT_MODEL, "input": "Name a colour.", "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key=key[1], max_retries=0) as client:
        create: Any = client.responses.create
        whole = await create(**fields)
        async with client.responses.stream(**fields) as stream:
            events = [event async for event in stream]
        final = await stream.get_final_response()
        kept = await client.responses.retrieve(final.id)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == kept.output_text == whole.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert final.usage == kept.usage


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)


def test_parse_gives_what_the_model_class_says(client: openai.OpenAI) -> None:
    found = client.responses.parse(model=DEFAULT_MODEL, input="Anna is 31.", text_format=Person, temperature=0)
    assert isinstance(found.output_parsed, Person)
    assert found.text is not None
    assert found.text.format is not None
    assert found.text.format.type == "json_schema"


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    made = ask(client, "Count to a hundred.", max_output_tokens=3)
    assert made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage.output_tokens == 3
    events = list(ask(client, "Count to a hundred.", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == made.output_text


def test_logprobs_are_those_of_the_text(client: openai.OpenAI) -> None:
    made = ask(client, "Say hello.", include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = made.output[0].content[0].logprobs
    assert "".join(t.token for t in logprobs) == made.output_text
    assert {len(t.top_logprobs) for t in logprobs} == {2}


def test_what_has_no_effect_is_listed(http: httpx.Client) -> None:
    fields = {"mood": "good", "text": {"verbosity": "low"}, "reasoning": {"summary": "auto"}}
    body = {"model": DEFAULT_MODEL, "input": [{"role": "user", "content": "Hi", "tone": 1}], "max_output_tokens": 2}
    reply = http.post(PATH, json=body | fields).raise_for_status()
    warnings = " ".join(reply.json()["warnings"])
    assert all(word in warnings for word in ("'mood'", "'tone' in input", "text.verbosity", "reasoning.summary"))
    assert "text.verbosity" in reply.headers["x-edge-warnings"]
    page = http.get(f"{PATH}/{reply.json()['id']}", params={"include[]": "x"})
    assert "'include'" in page.headers["x-edge-warnings"]


# ---------------------------------------------------------------- conversations


def test_a_conversation_goes_on_and_is_not_computed_again(client: openai.OpenAI) -> None:
    first = ask(client, "My name is Wilhelmina and I live by the sea. Say hello to me.", instructions="Be kind.")
    second = ask(client, "And now say goodbye.", previous_response_id=first.id, instructions="Be kind.")
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1
    third = ask(client, "Once more.", previous_response_id=second.id)
    assert third.instructions is None, "instructions are not carried over"
    items = items_before(client, third.id, order="asc", limit=2)
    assert [i.role for i in items] == ["user", "assistant", "user", "assistant", "user"]
    assert items[1].content[0].text == first.output_text
    backwards = items_before(client, third.id, limit=2)
    assert [i.id for i in backwards] == [i.id for i in reversed(items)]


def test_the_same_said_in_one_request_is_answered_alike(client: openai.OpenAI) -> None:
    first = ask(client, "Name a bird.")
    second = ask(client, "Name another.", previous_response_id=first.id)
    said = [{"role": "user", "content": "Name a bird."}, *(i.to_dict() for i in first.output)]
    whole = ask(client, [*said, {"role": "user", "content": [{"type": "input_text", "text": "Name another."}]}])
    assert whole.output_text == second.output_text
    assert whole.usage.input_tokens == second.usage.input_tokens


def test_items_are_found_by_their_names(client: openai.OpenAI) -> None:
    first = ask(client, "Name a bird.")
    (asked,) = items_before(client, first.id)
    more = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}, {"role": "user", "content": "Why?"}]
    by_name = ask(client, more)
    assert by_name.usage.input_tokens == ask(client, "Why?", previous_response_id=first.id).usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="No item 'msg_x'"):
        ask(client, [{"type": "item_reference", "id": "msg_x"}])


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI, guarded: RunningAppliance) -> None:
    made = ask(client, "Name the SECRETWORD.", store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match=made.id) as caught:
        ask(client, "Go on.", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    assert b"SECRETWORD" not in b"".join(p.read_bytes() for p in guarded.home.glob("responses.db*"))


def test_where_the_middle_is_gone_nothing_goes_on(client: openai.OpenAI) -> None:
    first = ask(client, "One.")
    second = ask(client, "Two.", previous_response_id=first.id)
    client.responses.delete(first.id)
    assert client.responses.retrieve(second.id).id == second.id
    with pytest.raises(openai.NotFoundError, match=first.id):
        ask(client, "Three.", previous_response_id=second.id)


def test_another_keys_responses_are_not_there(client: openai.OpenAI, guarded: RunningAppliance) -> None:
    made = ask(client, "Hello.")
    other = Keys(guarded.home / "state.db", actor="test").create(Limits())[1]
    with client_of(guarded, other) as stranger:
        for gone in (stranger.responses.retrieve, stranger.responses.delete, stranger.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                gone(made.id)
        for more in ({"previous_response_id": made.id}, {"input": [{"id": made.output[0].id}]}):
            with pytest.raises(openai.NotFoundError):
                ask(stranger, "Go on.", **more)
    assert client.responses.retrieve(made.id).id == made.id


def test_it_survives_a_kill_and_a_damaged_file(home: Path) -> None:
    appliance = start_appliance(home)
    try:
        with client_of(appliance) as client:
            first = ask(client, "Name a bird.")
            last = list(ask(client, "Name another.", previous_response_id=first.id, stream=True))[-1].response
            appliance.process.send_signal(signal.SIGKILL)
            appliance.process.wait()
        appliance = start_appliance(home)
        with client_of(appliance) as client:
            assert client.responses.retrieve(last.id).output_text == last.output_text
            third = ask(client, "And one more.", previous_response_id=last.id)
            assert items_before(client, third.id)[-1].id == items_before(client, first.id)[0].id
        stop(appliance.process)
        (home / "responses.db").write_bytes(b"no database" * 1000)
        appliance = start_appliance(home)
        with client_of(appliance) as client, pytest.raises(openai.NotFoundError):
            client.responses.retrieve(last.id)
        assert (home / "responses.db.damaged").exists()
        assert "set aside" in appliance.log()
    finally:
        stop(appliance.process)


def test_where_the_disk_takes_nothing_the_answer_comes_and_says_so(home: Path) -> None:
    (home / "responses.db").mkdir(parents=True)
    with running_appliance(home) as appliance, client_of(appliance) as client, appliance.client() as http:
        made = ask(client, "Hello.").to_dict()
        assert made["output"]
        assert made["store"] is False
        assert "was not stored" in made["warnings"][0]
        last = list(ask(client, "Hello.", stream=True))[-1].response.to_dict()
        assert "was not stored" in last["warnings"][0]
        alerts = http.get("/edge/v1/status").json()["alerts"]
        assert any("responses are not stored" in alert["what"] for alert in alerts)


# ---------------------------------------------------------------- functions


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather in a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "maxLength": 12}},
        "required": ["town"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_functions_are_called_and_their_outputs_read(client: openai.OpenAI) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 80}
    first = ask(client, "What is the weather in Nice?", **fields)
    call = first.output[-1]
    assert (call.type, call.name, first.status) == ("function_call", "get_weather", "completed")
    assert set(json.loads(call.arguments)) == {"town"}
    events = list(ask(client, "What is the weather in Nice?", **fields, stream=True))
    streamed = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert streamed == events[-1].response.output[-1].arguments == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 31 degrees."}
    more = {"tools": [TOOL], "tool_choice": "none", "previous_response_id": first.id}
    second = ask(client, [output], **more)
    assert second.output_text
    items = [i.type for i in client.responses.input_items.list(second.id, order="asc")]
    assert items == ["message", *(i.type for i in first.output), "function_call_output"]
    with pytest.raises(openai.BadRequestError, match="no function call 'call_x'"):
        ask(client, [{**output, "call_id": "call_x"}], **more)


class Weather(pydantic.BaseModel):
    town: str = pydantic.Field(max_length=12)


def test_parse_gives_arguments_as_the_class_says(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model=DEFAULT_MODEL, input="What is the weather in Nice?", temperature=0, max_output_tokens=80,
        tools=[openai.pydantic_function_tool(Weather)], parallel_tool_calls=False,
        tool_choice={"type": "function", "name": "Weather"},
    )  # fmt: skip
    call = found.output[-1]
    assert call.type == "function_call"
    assert isinstance(call.parsed_arguments, Weather)


# ---------------------------------------------------------------- failures, meters, bad input


def test_a_killed_worker_is_told_in_the_stream(home: Path) -> None:
    body = {"model": DEFAULT_MODEL, "input": "Write a very long story.", "stream": True, "max_output_tokens": 4000}
    with running_appliance(home) as appliance, appliance.client() as http, http.stream("POST", PATH, json=body) as r:
        events = sse_events(r.iter_lines())
        while next(events)["type"] != "response.output_text.delta":
            pass
        (worker,) = appliance.worker_pids()
        os.kill(worker, signal.SIGKILL)
        last = list(events)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["type"] == "worker_died"
        assert http.get(f"{PATH}/{last['response']['id']}").status_code == 404


def test_what_is_charged_is_what_was_told(
    client: openai.OpenAI, guarded: RunningAppliance, key: tuple[Key, str]
) -> None:
    first = ask(client, "Name a bird.")
    told = [first, list(ask(client, "Another.", previous_response_id=first.id, stream=True))[-1].response]
    with pytest.raises(openai.NotFoundError):
        ask(client, "Hello.", model="none:such")
    charged = wait_for_usage(guarded, key[0], 3)
    assert charged["input_tokens"] == sum(r.usage.input_tokens for r in told)
    assert charged["output_tokens"] == sum(r.usage.output_tokens for r in told)
    assert charged["failures"] == 1


def test_a_key_needs_the_scope(guarded: RunningAppliance) -> None:
    viewer = Keys(guarded.home / "state.db", actor="test").create(Limits(scopes=frozenset({"view"})))[1]
    with guarded.client(headers={"authorization": f"Bearer {viewer}"}) as http:
        assert http.post(PATH, json={"model": DEFAULT_MODEL, "input": "Hi"}).status_code == 403
        assert http.get(f"{PATH}/resp_{'0' * 32}").status_code == 403


def of(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "input": "Hi", **more}


def message(**more: Any) -> dict[str, Any]:
    return of(input=[{"role": "user", "content": "Hi", **more}])


def parts(*parts: dict[str, Any]) -> dict[str, Any]:
    return message(content=list(parts))


TEXT = {"type": "input_text", "text": "x"}
PNG = "data:image/png;base64,iVBORw0KGgo="
SCHEMA: dict[str, Any] = {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}
BAD: list[tuple[str, Any, int, str | None, str]] = [
    # name, body, status, param, part of the message
    ("no input", {"model": DEFAULT_MODEL}, 400, "input", "input"),
    ("input a number", of(input=3), 400, "input", "int"),
    ("input empty", of(input=[]), 400, "input", "length"),
    ("only thoughts", of(input=[{"type": "reasoning", "id": "rs_1", "summary": []}]), 400, "input", "nothing"),
    ("an item without role", of(input=[{"content": "x"}]), 400, "input[0].role", "missing"),
    ("an item without content", of(input=[{"role": "user"}]), 400, "input[0].content", "missing"),
    ("an unknown role", message(role="king"), 400, "input[0].role", "king"),
    ("an unknown item", message(type="computer_call"), 400, "input[0].type", "computer_call"),
    ("an item that is a text", of(input=["Hi"]), 400, "input[0]", "str"),
    ("an unknown part", parts({"type": "text", "text": "x"}), 400, "input[0].content[0].type", "input_text"),
    ("a file", parts({"type": "input_file", "file_id": "f"}), 400, "input[0].content[0].type", "input_file"),
    ("an image elsewhere", parts({"type": "input_image", "image_url": "https://x/y.png"}), 400,
     "input[0].content[0].image_url", "fetches nothing"),
    ("an image by id", parts({"type": "input_image", "file_id": "f"}), 400,
     "input[0].content[0].image_url", "image_url"),
    ("an image for the blind", parts(TEXT, {"type": "input_image", "image_url": PNG}), 400,
     "input[0].content[1].image_url", "projector"),
    ("a conversation", of(conversation="conv_1"), 400, "conversation", "not supported"),
    ("in the background", of(background=True), 400, "background", "not supported"),
    ("a template of OpenAI's", of(prompt={"id": "pmpt_1"}), 400, "prompt", "not supported"),
    ("moderation", of(moderation={"model": "x"}), 400, "moderation", "not supported"),
    ("web search", of(tools=[{"type": "web_search"}]), 400, "tools[0].type", "web_search"),
    ("a function without name", of(tools=[{"type": "function"}]), 400, "tools[0].name", "missing"),
    ("tool_choice a word", of(tool_choice="maybe"), 400, "tool_choice", "maybe"),
    ("a format without schema", of(text={"format": {"type": "json_schema", "name": "x"}}), 400,
     "text.format.schema", "missing"),
    ("a schema that is none", of(text={"format": SCHEMA}), 400, "text.format.schema.type", "integer"),
    ("an unknown format", of(text={"format": {"type": "xml"}}), 400, "text.format.type", "xml"),
    ("an unknown part of text", of(text={"style": "x"}), 400, "text", "style"),
    ("an unknown effort", of(reasoning={"effort": "huge"}), 400, "reasoning.effort", "huge"),
    ("max_output_tokens zero", of(max_output_tokens=0), 400, "max_output_tokens", ">= 1"),
    ("temperature huge", of(temperature=3), 400, "temperature", "<= 2"),
    ("too many logprobs", of(top_logprobs=21), 400, "top_logprobs", "<= 20"),
    ("metadata of numbers", of(metadata={"a": 1}), 400, "metadata[...]", "int"),
    ("too much metadata", of(metadata={str(i): "" for i in range(17)}), 400, "metadata", "length"),
    ("a previous response that is none", of(previous_response_id="resp_1"), 404, "previous_response_id", "resp_1"),
    ("a path as one", of(previous_response_id="../../etc/passwd"), 404, "previous_response_id", "passwd"),
    ("a long one", of(previous_response_id="r" * 200), 400, "previous_response_id", "length"),
    ("too long an input", of(input="word " * 20_000), 400, "input", "maximum context length is 8192 tokens"),
    ("too many tokens asked for", of(max_output_tokens=9000), 400, "input", "maximum context length"),
    ("an unknown model", of(model="gpt-4o"), 404, None, "edge pull"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "part"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_malformed_requests(http: httpx.Client, body: Any, status: int, param: str | None, part: str) -> None:
    reply = http.post(PATH, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param


def test_malformed_requests_for_what_was_kept(client: openai.OpenAI, http: httpx.Client) -> None:
    path = f"{PATH}/{ask(client, 'Hi').id}"
    for method, url, status in (
        ("GET", f"{path}?stream=true", 400),
        ("GET", f"{path}?stream=maybe", 400),
        ("GET", f"{path}/input_items?limit=0", 400),
        ("GET", f"{path}/input_items?limit=101", 400),
        ("GET", f"{path}/input_items?order=up", 400),
        ("GET", f"{path}/input_items?after=msg_1", 400),
        ("POST", f"{path}/cancel", 400),
        ("GET", f"{PATH}/resp_x", 404),
        ("GET", f"{PATH}/{'r' * 2000}", 404),
        ("DELETE", f"{PATH}/resp_x", 404),
        ("POST", f"{PATH}/resp_x/cancel", 404),
        ("PUT", path, 405),
    ):
        reply = http.request(method, url)
        assert reply.status_code == status, (method, url, reply.text)
        assert reply.json()["error"]["message"]
    http.get(path).raise_for_status()
