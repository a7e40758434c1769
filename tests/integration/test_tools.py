"""Tools, from the running appliance and the real model, whose template knows none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import ollama
import openai
import pytest
from pydantic import BaseModel

from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body, running_appliance, sse_events

TEMPLATES = Path(__file__).parent.parent / "goldens" / "templates"

CITY = {"type": "string", "maxLength": 12}
WEATHER: dict[str, Any] = {
    "type": "object", "properties": {"city": CITY, "unit": {"enum": ["C", "F"]}}, "required": ["city", "unit"],
    "additionalProperties": False,
}  # fmt: skip
CLOCK: dict[str, Any] = {
    "type": "object", "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["zone"],
    "additionalProperties": False,
}  # fmt: skip


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOLS = [tool("get_weather", WEATHER), tool("get_time", CLOCK), tool("ping")]
SCHEMAS = {"get_weather": WEATHER, "get_time": CLOCK, "ping": {"type": "object", "maxProperties": 0}}
ONE: dict[str, Any] = {"parallel_tool_calls": False}
"""Else the model, which is small, calls on and on."""


def asked(**more: Any) -> dict[str, Any]:
    return chat_body("What is the weather in Paris?", **{"tools": TOOLS, "max_tokens": 120, **more})


def choice_of(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def check_calls(calls: list[dict[str, Any]]) -> None:
    assert len({c["id"] for c in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def streamed(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """A streamed choice, put together."""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        events = [e["choices"][0] for e in sse_events(response.iter_lines())]
    calls: list[dict[str, Any]] = []
    for delta in (d for e in events for d in e["delta"].get("tool_calls", [])):
        if delta["index"] == len(calls):
            assert {"id", "type", "function"} <= delta.keys()
            assert "name" in delta["function"]
            calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
        else:
            assert delta.keys() == {"index", "function"}
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    text = "".join(e["delta"].get("content") or "" for e in events)
    return {"text": text, "calls": calls, "finish_reason": events[-1]["finish_reason"]}


def test_required_tools_are_called_with_arguments_that_obey(appliance: RunningAppliance) -> None:
    bodies = [asked(tool_choice="required", temperature=t, seed=s, **ONE) for s in (1, 2) for t in (0, 1.5)]
    with appliance.client() as client, ThreadPoolExecutor(6) as pool:
        for choice in pool.map(partial(choice_of, client), bodies):
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
            check_calls(choice["message"]["tool_calls"])


def test_a_named_tool_is_the_one_that_is_called(appliance: RunningAppliance) -> None:
    choice_named = {"type": "function", "function": {"name": "get_time"}}
    with appliance.client() as client:
        choice = choice_of(client, asked(tool_choice=choice_named, parallel_tool_calls=False, temperature=1.5, seed=5))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_time"
    check_calls([call])


def test_without_parallel_calls_there_is_one(appliance: RunningAppliance) -> None:
    bodies = [asked(tool_choice="required", parallel_tool_calls=False, temperature=1.5, seed=s) for s in range(2)]
    with appliance.client() as client, ThreadPoolExecutor(4) as pool:
        for choice in pool.map(partial(choice_of, client), bodies):
            assert len(choice["message"]["tool_calls"]) == 1


def test_what_is_streamed_is_what_comes_whole(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        for more in (
            {"tool_choice": "required", "seed": 7},
            {"tool_choice": "auto", "seed": 1},
            {"tool_choice": "none"},
        ):
            body = asked(temperature=0, **more)
            choice_of(client, body)  # so that both of the next two find the prompt read, and round alike
            whole, parts = choice_of(client, body), streamed(client, body)
            assert parts["text"] == (whole["message"]["content"] or "")
            assert parts["finish_reason"] == whole["finish_reason"]
            told = [c["function"] for c in whole["message"].get("tool_calls", [])]
            assert [c["function"] for c in parts["calls"]] == told
            assert "<tool_call>" not in parts["text"]


def test_auto_calls_where_the_model_begins_to(appliance: RunningAppliance) -> None:
    """A bias makes the model begin a call, as one that was trained for it would."""
    with appliance.client() as client:
        begin = client.post("/v1/completions", json={
            "model": DEFAULT_MODEL, "prompt": "<tool_call>\n{", "max_tokens": 1, "return_token_ids": True,
        }).json()["prompt_token_ids"]  # fmt: skip
        body = asked(temperature=0, logit_bias={str(begin[0]): 100}, parallel_tool_calls=False)
        response = client.post("/v1/chat/completions", json=body).json()
    choice = response["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        check_calls(choice["message"]["tool_calls"])
    else:
        assert "tool_calls" not in choice["message"]


def test_a_call_that_is_cut_says_so(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        choice = choice_of(client, asked(tool_choice="required", max_tokens=12, temperature=0))
    assert choice["finish_reason"] == "length"


def test_a_stop_string_in_arguments_is_an_error_not_a_call(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        response = client.post(
            "/v1/chat/completions", json=asked(tool_choice="required", stop="arguments", temperature=0)
        )
    assert (response.status_code, response.json()["error"]["code"]) == (422, "constraint_failed")


@pytest.mark.parametrize(("more", "param"), [
    ({"tools": [tool("f", {"type": "object", "properties": {"a": {"not": {}}}})]},
     "tools[0].function.parameters.properties.a.not"),
    ({"tools": [tool("f"), tool("g", {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}})]},
     "tools[1].function.parameters"),
    ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
    ({"tools": [tool("not a name")]}, "tools[0].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice.function.name"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
])  # fmt: skip
def test_what_is_wrong_with_tools_is_named(appliance: RunningAppliance, more: dict[str, Any], param: str) -> None:
    with appliance.client() as client:
        response = client.post("/v1/chat/completions", json=asked(**more))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_conversation_goes_on_after_a_call(appliance: RunningAppliance) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Ping, please."}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "pong"},
    ]  # fmt: skip
    with appliance.client() as client:
        choice = choice_of(client, asked(messages=messages, temperature=0, max_tokens=20))
        assert choice["finish_reason"] in ("stop", "length", "tool_calls")
        broken = {**call, "function": {"name": "ping", "arguments": "{"}}
        messages[1]["tool_calls"] = [broken]  # type: ignore[assignment]
        response = client.post("/v1/chat/completions", json=asked(messages=messages))
        assert response.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_form_beside_tools_holds_where_nothing_is_called(appliance: RunningAppliance) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": WEATHER}}
    with appliance.client() as client:
        choice = choice_of(client, asked(response_format=form, temperature=0))
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), WEATHER)
        else:
            check_calls(choice["message"]["tool_calls"])
        refused = client.post("/v1/chat/completions", json=asked(structured_outputs={"regex": "a+"}))
    assert refused.status_code == 400


def _schemas() -> list[dict[str, Any]]:
    """Twenty, of many kinds, whose values are short."""
    text = {"type": "string", "maxLength": 8}
    leaves: list[dict[str, Any]] = [
        text, {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}, {"enum": ["α", "b", 3, None]},
        {"type": "array", "items": text, "maxItems": 2}, {"type": "number", "minimum": -1, "maximum": 1},
        {"type": "string", "pattern": "^[a-z]{1,4}$"}, {"anyOf": [{"type": "null"}, text]},
        {"type": "object", "properties": {"x": text}, "required": ["x"], "additionalProperties": False},
        {"type": "string", "format": "date"},
    ]  # fmt: skip
    return [
        {
            "type": "object", "properties": {"first": leaves[i % 10], "né": leaves[(3 * i + 1) % 10]},
            "required": ["first"] if i % 3 else ["first", "né"], "additionalProperties": False,
        }
        for i in range(20)
    ]  # fmt: skip


def test_arguments_obey_twenty_schemas_at_a_high_temperature(appliance: RunningAppliance) -> None:
    def body(i: int, schema: dict[str, Any]) -> dict[str, Any]:
        return asked(
            tools=[tool("f", schema)], tool_choice="required", parallel_tool_calls=False, temperature=1.5, seed=i,
        )  # fmt: skip

    schemas = _schemas()
    with appliance.client() as client, ThreadPoolExecutor(8) as pool:
        choices = pool.map(partial(choice_of, client), [body(i, schema) for i, schema in enumerate(schemas)])
        for choice, schema in zip(choices, schemas, strict=True):
            assert choice["finish_reason"] == "tool_calls"
            (call,) = choice["message"]["tool_calls"]
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_openais_helpers(appliance: RunningAppliance) -> None:
    class GetWeather(BaseModel):
        city: str

    named = {"type": "function", "function": {"name": "GetWeather"}}
    with openai.OpenAI(base_url=f"{appliance.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        completion = client.chat.completions.parse(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "The weather in Nice?"}], max_tokens=200,
            temperature=0, tools=[openai.pydantic_function_tool(GetWeather)], tool_choice=named,  # type: ignore[arg-type]
            parallel_tool_calls=False,
        )  # fmt: skip
        message = completion.choices[0].message
        assert message.tool_calls
        assert isinstance(message.tool_calls[0].function.parsed_arguments, GetWeather)
        with client.chat.completions.stream(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "The weather in Nice?"}], max_tokens=200,
            temperature=0, tools=[openai.pydantic_function_tool(GetWeather)], tool_choice=named,  # type: ignore[arg-type]
            parallel_tool_calls=False,
        ) as stream:  # fmt: skip
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls


def test_ollamas_client_gets_arguments_as_objects(appliance: RunningAppliance) -> None:
    client: Any = ollama.Client(appliance.url, timeout=60, trust_env=False)
    tools = [tool("ping"), tool("get_weather", WEATHER)]
    call = {"function": {"name": "get_weather", "arguments": {"city": "Nice", "unit": "C"}}}
    messages = [
        {"role": "user", "content": "How is Nice?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
    ]  # fmt: skip
    answer = client.chat(DEFAULT_MODEL, messages, tools=tools, options={"temperature": 0, "num_predict": 40})
    assert answer.done_reason in ("stop", "length")
    for called in answer.message.tool_calls or ():
        jsonschema.validate(dict(called.function.arguments), SCHEMAS[called.function.name])
    assert "tools" in client.show(DEFAULT_MODEL).capabilities
    client._client.close()


# ---------------------------------------------------------------- other chat templates on the same weights

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """The default model with templates that know tools, or thinking."""
    templates = {
        "qwen": (TEMPLATES / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text("utf-8"),
        "coder": (TEMPLATES / "Qwen3-Coder.jinja").read_text("utf-8"),
        "thinker": THINKS,
    }
    with running_appliance(tmp_path_factory.mktemp("home")) as running, running.client() as client:
        for name, template in templates.items():
            made = {"model": name, "from": DEFAULT_MODEL, "template": template, "stream": False}
            assert client.post("/api/create", json=made).status_code == 200
        yield running


@pytest.mark.parametrize("model", ["qwen", "coder"])
def test_templates_that_know_tools_are_used(crafted: RunningAppliance, model: str) -> None:
    kinds = [(0, 1), (1.5, 2)]
    bodies = [
        asked(model=model, tool_choice="required", temperature=t, seed=s, max_tokens=300, **ONE) for t, s in kinds
    ]  # fmt: skip
    with crafted.client() as client:
        for body in bodies:
            choice = choice_of(client, body)
            assert choice["finish_reason"] == "tool_calls"
            check_calls(choice["message"]["tool_calls"])
        parts = streamed(client, bodies[0])
        whole = choice_of(client, bodies[0])["message"]["tool_calls"]
        assert [c["function"] for c in parts["calls"]] == [c["function"] for c in whole]


def test_what_a_model_thinks_stands_apart(crafted: RunningAppliance) -> None:
    hello = chat_body("Hello", model="thinker", max_tokens=8)
    with crafted.client() as client:
        response = client.post("/v1/chat/completions", json=hello).json()
        message, usage = response["choices"][0]["message"], response["usage"]
        assert message["reasoning_content"]
        assert not message["content"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"]
        with client.stream("POST", "/v1/chat/completions", json={**hello, "stream": True}) as stream:
            deltas = [e["choices"][0]["delta"] for e in sse_events(stream.iter_lines())]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning_content"]

        quiet = client.post("/v1/chat/completions", json={**hello, "reasoning_effort": "none"}).json()
        assert quiet["choices"][0]["message"]["content"]
        assert "reasoning_content" not in quiet["choices"][0]["message"]
        assert "warnings" not in quiet
        kwargs = {**hello, "chat_template_kwargs": {"enable_thinking": False, "colour": "red"}}
        steered = client.post("/v1/chat/completions", json=kwargs).json()
        assert steered["choices"] == quiet["choices"]
        assert [w for w in steered["warnings"] if "chat_template_kwargs.colour" in w] == steered["warnings"]

        chat = {"model": "thinker", "messages": hello["messages"], "options": {"temperature": 0, "num_predict": 8}}
        lines = [json.loads(line) for line in client.post("/api/chat", json=chat).text.splitlines()]
        assert "".join(line["message"].get("thinking", "") for line in lines) == message["reasoning_content"]
        still = client.post("/api/chat", json={**chat, "think": False, "stream": False}).json()
        assert still["message"]["content"] == quiet["choices"][0]["message"]["content"]
        models = {m["id"]: m["capabilities"] for m in client.get("/v1/models").json()["data"]}
        assert models["thinker:latest"] == ["completion", "tools", "thinking"]


def test_a_form_begins_after_what_is_thought(crafted: RunningAppliance) -> None:
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    with crafted.client() as client:
        cut = choice_of(client, chat_body("Is it day?", model="thinker", max_tokens=8, **form))
        assert cut["finish_reason"] == "length"
        assert cut["message"]["reasoning_content"]
        choice = choice_of(client, chat_body("Is it day?", model="thinker", reasoning_effort="none", **form))
        assert choice["message"]["content"] in ("yes", "no")


def test_reasoning_effort_without_effect_is_warned(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        answer = client.post("/v1/chat/completions", json=chat_body("Hi", reasoning_effort="low", max_tokens=2)).json()
    assert any("reasoning_effort" in w for w in answer["warnings"])
