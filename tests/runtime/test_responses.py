"""A response as it comes to be, and items as messages: what is told in which order, and what clients read of it."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import InvalidRequest
from runtime.api.errors import fault_of
from runtime.api.openai_schema import ChatMessage, TokenDetails, Usage
from runtime.api.responses_chat import chat_request, named_as_sent
from runtime.api.responses_events import Composer
from runtime.api.responses_items import Messages, item_id, named, response_of
from runtime.api.responses_schema import Item, ReasoningField, ResponseObject, ResponsesRequest, TextField
from runtime.request import TokenLogprob
from runtime.wire import CallDelta

ID = f"resp_{'0' * 32}"
USAGE = Usage(
    prompt_tokens=7, completion_tokens=3, total_tokens=10, prompt_tokens_details=TokenDetails(cached_tokens=2)
)


def response() -> ResponseObject:
    return ResponseObject(
        id=ID, created_at=1, instructions=None, max_output_tokens=None, max_tool_calls=None, metadata={}, model="m",
        parallel_tool_calls=True, previous_response_id=None, prompt_cache_key=None, reasoning=ReasoningField(),
        safety_identifier=None, store=True, temperature=1, text=TextField(), tool_choice="auto", tools=[],
        top_logprobs=0, top_p=1, truncation="disabled", user=None,
    )  # fmt: skip


def events_of(composer: Composer) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for block in composer.take().decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def composed(
    *, reason: str = "stop", reasoning: str = "", texts: tuple[str, ...] = ("Hel", "lo")
) -> list[dict[str, Any]]:
    composer = Composer(response())
    composer.begin()
    if reasoning:
        composer.add_reasoning(reasoning)
    for text in texts:
        composer.add_text(text)
    composer.end(reason, USAGE, completed_at=2)
    composer.tell_end()
    return events_of(composer)


def test_the_events_of_a_text_are_openais_in_their_order() -> None:
    events = composed()
    assert [e["type"].removeprefix("response.") for e in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in events] == list(range(10))
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]]
    assert last["output"][0]["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (last["status"], last["usage"]["total_tokens"], last["completed_at"]) == ("completed", 10, 2)
    assert last["usage"]["input_tokens_details"]["cached_tokens"] == 2


def test_thinking_is_an_item_before_the_answer() -> None:
    events = composed(reasoning="Hm.")
    assert [e["type"].removeprefix("response.") for e in events[2:8]] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
    ]  # fmt: skip
    thought, said = events[-1]["response"]["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert {e["output_index"] for e in events if e.get("item_id") == said["id"]} == {1}


def test_an_answer_that_was_cut_is_incomplete() -> None:
    events = composed(reason="length")
    assert events[-1]["type"] == "response.incomplete"
    last = events[-1]["response"]
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["output"][0]["status"] == last["status"] == "incomplete"


def test_an_empty_answer_is_one() -> None:
    (item,) = composed(texts=())[-1]["response"]["output"]
    assert item["content"][0]["text"] == ""


def test_a_failure_ends_what_is_open() -> None:
    composer = Composer(response())
    composer.begin()
    composer.add_text("Hal")
    composer.fail(fault_of(InvalidRequest("No.", hint="Send less.")))
    last = events_of(composer)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {
        "code": "invalid_prompt", "message": "No. Send less.", "type": "invalid_request", "param": None,
    }  # fmt: skip


def test_a_kept_response_reads_as_it_was_written() -> None:
    told = msgspec.convert(composed(reasoning="Hm.")[-1]["response"], ResponseObject)
    assert msgspec.json.decode(msgspec.json.encode(told), type=ResponseObject) == told


def test_items_are_kept_under_names_that_tell_their_response() -> None:
    items = [Item(role="user", content="hi"), Item(type="message", id="theirs", role="assistant", content="ho")]
    kept = named(items, ID)
    assert [(i.id, i.type) for i in kept] == [(item_id(ID, "message", n, is_input=True), "message") for n in (0, 1)]
    assert [msgspec.to_builtins(i)["content"][0]["type"] for i in kept] == ["input_text", "output_text"]
    assert {response_of(i.id or "") for i in kept} == {ID}
    assert named(kept, ID) == kept


@given(st.text())
def test_no_other_name_tells_one(name: str) -> None:
    assert response_of(name) is None


def test_fields_are_named_as_they_were_sent() -> None:
    sources = {
        "messages[0]": "instructions[0]",
        "messages[1]": "input[4]",
        "messages[1].tool_calls[0].function": "input[5]",
    }
    for field, name in {
        "messages[1].content[0].image_url": "input[4].content[0].image_url",
        "messages": "input",
        "response_format.json_schema.schema.type": "text.format.schema.type",
        "max_completion_tokens": "max_output_tokens",
        "tools[2].function.parameters.type": "tools[2].parameters.type",
        "messages[1].tool_calls[0].function.arguments": "input[5].arguments",
        "messages_of_mine": "messages_of_mine",
    }.items():
        with pytest.raises(InvalidRequest, match=f"^'{re.escape(name)}' is wrong") as caught, named_as_sent(sources):
            raise InvalidRequest(f"'{field}' is wrong.", field=field)
        assert caught.value.field == name


def test_messages_know_where_they_came_from() -> None:
    found = Messages()
    found.add([Item(role="system", content="Be brief.")], "instructions")
    found.add([Item(type="reasoning", summary=[]), Item(role="user", content="hi")], "input")
    assert [m.role for m in found.messages] == ["system", "user"]
    assert found.sources == {"messages[0]": "instructions[0]", "messages[1]": "input[1]"}


def test_function_calls_are_items_one_after_the_other() -> None:
    composer = Composer(response())
    composer.begin()
    composer.add_text("Let me look.")
    composer.add_call(0, "", call_id="call_a", name="weather")
    composer.add_call(0, '{"town":')
    composer.add_call(0, '"Nice"}')
    composer.add_call(1, "{}", call_id="call_b", name="time")
    composer.end("tool_calls", USAGE, completed_at=2)
    composer.tell_end()
    events = events_of(composer)
    assert [e["type"].removeprefix("response.") for e in events[8:17]] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    _, first, second = events[-1]["response"]["output"]
    assert events[-1]["type"] == "response.completed"
    assert first == {
        "type": "function_call", "id": first["id"], "status": "completed", "call_id": "call_a", "name": "weather",
        "arguments": '{"town":"Nice"}',
    }  # fmt: skip
    assert (second["call_id"], second["arguments"]) == ("call_b", "{}")
    assert [e["arguments"] for e in events if e["type"].endswith("arguments.done")] == ['{"town":"Nice"}', "{}"]


def output_of(composer: Composer, reason: str) -> list[dict[str, Any]]:
    composer.end(reason, USAGE, completed_at=2)
    composer.tell_end()
    return events_of(composer)[-1]["response"]["output"]


def test_logprobs_neither_cut_what_is_open_nor_open_a_message() -> None:
    composer, token = Composer(response()), [TokenLogprob(b"a", -0.5, (), 0)]
    composer.add("", token, reasoning="Hm")
    composer.add("", token)
    composer.add("", token, reasoning="m.")
    composer.add("", token)
    composer.add("", token, calls=[CallDelta(0, "call_a", "weather")])
    composer.add("", token)
    composer.add("", token, calls=[CallDelta(0, arguments="{}")])
    output = output_of(composer, "tool_calls")
    assert [(i["type"], i.get("arguments")) for i in output] == [("reasoning", None), ("function_call", "{}")]
    whole = Composer(response())
    whole.add("", token, calls=[CallDelta(0, "call_a", "weather", "{}")])
    assert [i["type"] for i in output_of(whole, "tool_calls")] == ["function_call"]


def test_tokens_before_the_first_text_are_the_messages() -> None:
    token = [TokenLogprob(b"a", -0.5, (), 0)]
    for texts in (("", "a", ""), ("", "", "")):
        composer = Composer(response())
        for text in texts:
            composer.add(text, token)
        (message,) = output_of(composer, "stop")
        assert len(message["content"][0]["logprobs"]) == 3


def test_what_was_thought_said_and_called_is_one_message() -> None:
    found = Messages()
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "Sunny."},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "Noon."}]},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "assistant", "content": "And noon."},
    ]
    found.add(msgspec.convert(items, list[Item]), "input")
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "tool", "assistant", "assistant"]
    turn = found.messages[1]
    assert (turn.reasoning_content, [c.id for c in turn.tool_calls or ()]) == ("Hm.", ["a", "b"])
    assert [m.name for m in found.messages[2:4]] == ["weather", "time"]
    assert found.sources["messages[1].tool_calls[1].function"] == "input[4]"


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"type": "function_call", "call_id": "a"}, "input[0].name"),
        ({"type": "function_call", "name": "a"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "a", "output": "x"}, "input[0].call_id"),
    ],
)
def test_calls_that_lack_something(item: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Messages().add([msgspec.convert(item, Item)], "input")
    assert caught.value.field == field


def request(**more: Any) -> ResponsesRequest:
    tools = [{"type": "function", "name": name} for name in ("weather", "time")]
    return msgspec.convert({"model": "m", "input": "x", "tools": tools, **more}, ResponsesRequest)


def test_a_choice_among_tools() -> None:
    messages = [ChatMessage(role="user", content="x")]

    def asked(choice: object) -> tuple[list[str], object]:
        chat = chat_request(request(tool_choice=choice), messages)
        return [t.function.name for t in chat.tools or ()], msgspec.to_builtins(chat.tool_choice)

    both = ["weather", "time"]
    assert asked("required") == (both, "required")
    chosen = {"type": "function", "function": {"name": "time"}}
    assert asked({"type": "function", "name": "time"}) == (both, chosen)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    assert asked(allowed) == (["time"], "required")
    for bad in ({"type": "web_search"}, {"type": "allowed_tools", "tools": [{"type": "function", "name": "no"}]}):
        with pytest.raises(InvalidRequest, match="tool_choice"):
            asked(bad)
