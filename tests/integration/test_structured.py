"""Answers of a form that was asked for, from the running appliance and the real model."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from runtime.engine import Engine
from runtime.grammar import Grammars
from runtime.request import Constraint, Request, RequestId, SamplingParams
from tests.support import (
    DEFAULT_MODEL,
    CollectingSink,
    GreedyLaw,
    RunningAppliance,
    chat_body,
    sse_events,
)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "country": {"enum": ["France", "Spain"]}},
            "required": ["city", "country"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}
TICKET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "bug", "feature_request"]},
        "needs_human_review": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["slow", "urgent"]}, "maxItems": 2},
    },
    "required": ["category", "needs_human_review", "tags"],
    "additionalProperties": False,
}


def by_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    fmt = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    return chat_body("Describe a person from Paris.", response_format=fmt, **{"max_tokens": 150, **more})


def answer(client: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_answers_obey_their_schema_greedy_sampled_and_streamed(appliance: RunningAppliance) -> None:
    with appliance.client() as client, ThreadPoolExecutor(6) as pool:
        bodies = [
            by_schema(schema, temperature=temperature, seed=seed)
            for schema in (PERSON, TICKET) for seed in (1, 2) for temperature in (0, 1.5)
        ]  # fmt: skip
        for body, (text, reason) in zip(bodies, pool.map(partial(answer, client), bodies), strict=True):
            assert reason == "stop"
            jsonschema.validate(json.loads(text), body["response_format"]["json_schema"]["schema"])
        with client.stream("POST", "/v1/chat/completions", json={**bodies[0], "stream": True}) as response:
            events = [e["choices"][0] for e in sse_events(response.iter_lines())]
        assert events[-1]["finish_reason"] == "stop"
        jsonschema.validate(json.loads("".join(e["delta"].get("content", "") for e in events)), PERSON)


def test_a_cut_answer_says_so(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        text, reason = answer(client, by_schema(PERSON, max_tokens=5))
    assert reason == "length"
    with pytest.raises(ValueError, match="char"):
        json.loads(text)


def test_json_that_a_stop_string_cuts_is_an_error_not_an_answer(appliance: RunningAppliance) -> None:
    body = by_schema(PERSON, stop="age")
    with appliance.client() as client:
        response = client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "constraint_failed")
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            events = list(sse_events(stream.iter_lines()))
        assert events[-1]["error"]["code"] == "constraint_failed"


@pytest.mark.parametrize(("asked", "pattern"), [
    ({"structured_outputs": {"regex": "[A-Z][a-z]{2,8}-[0-9]{3}"}}, "[A-Z][a-z]{2,8}-[0-9]{3}"),
    ({"structured_outputs": {"choice": ["sunny", "rainy"]}}, "sunny|rainy"),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "yes|no"),
    ({"structured_outputs": {"json": {"enum": [17, "x"]}}}, '17|"x"'),
    ({"structured_outputs": {"json": '{"const": null}'}}, "null"),
    ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
    ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ({"response_format": {"type": "json_object", "schema": {"const": {"a": 1}}}}, r'\{"a": 1\}'),
])  # fmt: skip
def test_both_endpoints_take_every_form(appliance: RunningAppliance, asked: dict[str, Any], pattern: str) -> None:
    with appliance.client() as client:
        text, reason = answer(client, chat_body("What is the weather?", **asked, max_tokens=200))
        body = {"model": DEFAULT_MODEL, "prompt": "The weather is", "temperature": 0, "max_tokens": 200, **asked}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
    for answered, why in ((text, reason), (choice["text"], choice["finish_reason"])):
        assert why == "stop" or "json_object" in str(asked)
        assert re.fullmatch(pattern, answered, re.DOTALL) or why == "length"


def test_bombs_are_refused_and_a_stream_goes_on_beside_them(appliance: RunningAppliance) -> None:
    bombs: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}" * 40}},
        {"grammar": 'start: a\na: a a | a a a | "x" |'},
        {"grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'},
        {"structured_outputs": {"choice": [f"{i}x" * 50 for i in range(1000)]}},
    ]
    with appliance.client() as client, ThreadPoolExecutor(5) as pool:
        steady = pool.submit(answer, client, chat_body("Count to ten.", max_tokens=100, ignore_eos=True))
        asked = [chat_body("Hi", max_tokens=40, **bomb) for bomb in bombs]
        posts = [pool.submit(client.post, "/v1/chat/completions", json=body) for body in asked]
        assert {p.result().status_code for p in posts} <= {200, 400, 422}
        assert steady.result()[1] == "length"


def test_openais_parse_helper(appliance: RunningAppliance) -> None:
    class Person(BaseModel):
        name: str
        age: int

    with openai.OpenAI(base_url=f"{appliance.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        completion = client.chat.completions.parse(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "Anna is 31."}], response_format=Person,
            temperature=0, max_tokens=200,
        )  # fmt: skip
    assert isinstance(completion.choices[0].message.parsed, Person)


# ---------------------------------------------------------------- forced tokens and the greedy law


@pytest.mark.parametrize("schema", [PERSON, TICKET])
def test_every_token_that_was_drawn_beside_forced_ones_is_the_best_allowed(
    law: GreedyLaw, schema: dict[str, Any]
) -> None:
    tokenizer, vocab = law.backend.tokenizer, law.backend.facts.vocab_size
    grammar = Grammars(tokenizer, vocab).compile(Constraint("json_schema", json.dumps(schema)))
    prompts = [
        tokenizer.encode(
            f"<|im_start|>user\n{topic}<|im_end|>\n<|im_start|>assistant\n", add_special=True, parse_special=True
        )
        for topic in ("Anna lives in Nice.", "The pump is slow!", "Write JSON.")
    ]
    law.backend.clear()
    sink = CollectingSink()
    engine = Engine(law.backend, sink, max_queue=10)
    for i, prompt in enumerate(prompts):
        greedy = SamplingParams(temperature=0)
        engine.submit(Request(RequestId(i), tuple(prompt), 150, greedy, return_tokens=True, grammar=grammar))
    while engine.advance():
        pass
    num_forced = num_drawn = 0
    for i, prompt in enumerate(prompts):
        tokens = list(sink.last[RequestId(i)].tokens or ())
        scores, guide = law.scores(tokens)[len(prompt) - 1 : -1], grammar.start()
        jsonschema.validate(json.loads(sink.texts[RequestId(i)]), schema)
        for row, token in zip(scores, tokens[len(prompt) :], strict=True):
            if guide.forced is None:
                guide.mask(row)
                assert float(np.max(row) - row[token]) <= law.epsilon
                num_drawn += 1
            num_forced += guide.forced is not None
            guide.consume(token)
        assert guide.is_complete
    assert num_forced > num_drawn / 2
