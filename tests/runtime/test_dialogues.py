"""What is made of a request for a chat: who reads its answer, and what is checked of it."""

from __future__ import annotations

import json

import pytest

from edge.errors import ConstraintFailed, InvalidRequest
from runtime import wire
from runtime.api import tools
from runtime.api.tools import CalledFunction, CallHistory, Promise, ToolCallField
from runtime.backends.base import Capabilities
from runtime.chat import CHATML
from runtime.dialogues import Dialogues
from runtime.request import Constraint, SamplingParams
from tests.support import ScriptedBackend

BACKEND = ScriptedBackend(Capabilities(num_slots=1, num_cells=64, context_tokens=64, max_step_tokens=8))
THINKS = CHATML + "{% if think %}<think>\n\n</think>{% endif %}"


def asked(*, has_form: bool = False, options: str = "") -> wire.Generate:
    form = Constraint("json_schema", '{"type":"object"}', "response_format") if has_form else None
    return wire.Generate(
        1, [wire.ChatMessage("user", "x")], None, SamplingParams(), 8, [], constraint=form,
        tools=(wire.Tool("ping", "", ""),) if has_form else (), template_options=options,
    )  # fmt: skip


def read(dialogues: Dialogues, message: wire.Generate, answer: str) -> wire.ChatMessage:
    reader = dialogues.reader(dialogues.of(message), message)
    if reader is None:
        return wire.ChatMessage("assistant", answer)
    parts = [reader.push(answer), reader.finish()]
    calls = tuple(wire.ToolCall("", c.name, "") for p in parts for c in p.calls if c.name)
    return wire.ChatMessage("assistant", "".join(p.text for p in parts), calls)


def test_calls_or_a_form_means_calls_first() -> None:
    dialogues, message = Dialogues(BACKEND, CHATML), asked(has_form=True)
    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    inside = json.dumps({"note": "<tool_call>\n{"}) + call
    assert read(dialogues, message, inside) == wire.ChatMessage("assistant", inside)
    assert read(dialogues, message, call).tool_calls == (wire.ToolCall("", "ping", ""),)


def test_thinking_that_the_prompt_ended_is_not_read() -> None:
    dialogues = Dialogues(BACKEND, THINKS)
    answer = "<think>a</think>b"
    assert read(dialogues, asked(), answer).content == "b"
    assert read(dialogues, asked(options='{"think": true}'), answer).content == answer


def test_only_tools_that_exist_are_called() -> None:
    promise = Promise(tools={"ping": ""})
    promise.check("", [wire.ToolCall("", "ping", "{}")], is_calling=True)
    with pytest.raises(ConstraintFailed, match="pong"):
        promise.check("", [wire.ToolCall("", "pong", "{}")], is_calling=True)


def called(arguments: str) -> ToolCallField:
    return ToolCallField(function=CalledFunction(name="ping", arguments=arguments))


@pytest.mark.parametrize(
    "arguments", ["[1]", '{"a":' + "[" * 70 + "]" * 70 + "}", '{"a":[' + "1," * 30_000 + "1]}", '{"a', '"\\"' * 99_999]
)
def test_arguments_in_a_conversation_are_bounded(arguments: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        CallHistory().read([called("{}"), called(arguments)], "messages[1].tool_calls")
    assert caught.value.field == "messages[1].tool_calls[1].function.arguments"


def test_they_are_bounded_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "MAX_ARGUMENTS_PARTS", 10)
    history, text = CallHistory(), json.dumps({"a": "[,{" * 99 + '"', "b": [1]})
    assert [c.arguments for c in history.read([called(text), called("")], "x")] == [text, ""]
    with pytest.raises(InvalidRequest, match="more than 10 values"):
        history.read([called(text), called(text)], "y")
