"""Generated schemas on the default model, hot: what ends obeys. And schemas that nobody can follow."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from typing import Any

import httpx
import jsonschema
import pytest

from tests.integration.schemas import keywords, schema
from tests.support import RunningAppliance, chat_body

PART = 100
"""Schemas of one soak test; there are ten."""
MAX_TOKENS = 400


def asked(body: Any, **more: Any) -> dict[str, Any]:
    fmt = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": body}}
    return chat_body("Make something up.", response_format=fmt, **more)


def check(http: httpx.Client, number: int) -> str:
    """Ask for an answer of one schema; how it ended."""
    body = schema(number)
    reply = http.post(
        "/v1/chat/completions", json=asked(body, temperature=1.5, seed=number, max_tokens=MAX_TOKENS), timeout=300
    )
    if (
        reply.status_code == 422
    ):  # the decoder takes 100.00 for more than 100; such an answer is an error, and no answer
        print(f"schema {number}: {reply.json()['error']['message']}")
        return reply.json()["error"]["code"]
    if reply.status_code != 200:
        return f"{reply.status_code} {number}: {reply.json()['error']['message']}"
    choice = reply.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        answer, exact = (json.loads(t, parse_float=Decimal) for t in (choice["message"]["content"], json.dumps(body)))
        checker = jsonschema.Draft202012Validator(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        errors = [str(e) for e in checker.iter_errors(answer)]  # pyright: ignore[reportUnknownMemberType]  # its stubs are partial
        assert not errors, f"{number}: {errors}"
    if choice["finish_reason"] != "stop":
        print(f"schema {number} did not end: {choice['message']['content'][-60:]!r}")
    return choice["finish_reason"]


def outcomes(appliance: RunningAppliance, numbers: range) -> Counter[str]:
    with appliance.client() as http, ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(partial(check, http), numbers))


def test_answers_obey_their_schemas(appliance: RunningAppliance) -> None:
    found = outcomes(appliance, range(25))
    assert set(found) <= {"stop", "length", "constraint_failed"}
    assert found["stop"] >= 23


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_schemas(appliance: RunningAppliance, part: int) -> None:
    found = outcomes(appliance, range(part * PART, (part + 1) * PART))
    print(f"schemas {part * PART} to {(part + 1) * PART - 1}: {dict(found)}")
    assert set(found) <= {"stop", "length", "constraint_failed"}
    assert found["stop"] >= 0.95 * PART


def test_the_schemas_are_of_all_kinds() -> None:
    used = set[str]().union(*(keywords(schema(n)) for n in range(1000)))
    assert used >= {
        "$ref", "$defs", "anyOf", "oneOf", "allOf", "prefixItems", "patternProperties", "multipleOf", "format",
        "pattern", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxProperties", "const", "enum", "名前",
    }  # fmt: skip
    assert len({json.dumps(schema(n)) for n in range(1000)}) > 950


# ---------------------------------------------------------------- what nobody can follow


def string(pattern: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern, **more}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def doubling(levels: int, how: str) -> dict[str, Any]:
    """Each definition refers to the next twice: written out, it would have two to the power of its levels."""
    definitions: dict[str, Any] = {f"d{levels}": {"type": "integer"}}
    for i in range(levels):
        both = [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]
        definitions[f"d{i}"] = {how: both}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


REFUSED: dict[str, Any] = {
    "a type and a value of another": {"type": "integer", "enum": ["a"]},
    "two types": {"allOf": [{"type": "string"}, {"type": "object"}]},
    "a least length above the greatest": {"type": "string", "minLength": 5, "maxLength": 3},
    "more items than there may be": {"type": "array", "items": {}, "minItems": 3, "maxItems": 2},
    "more items than there are": {"type": "array", "prefixItems": [{}], "items": False, "minItems": 2},
    "a least number above the greatest": {"type": "number", "minimum": 2, "maximum": 1},
    "no whole number between": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "no multiple between": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6},
    "a required property that cannot be": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "patterns without a common text": {"allOf": [string("^a+$"), string("^b+$")]},
    "a pattern longer than the text": string("^a{10}$", maxLength=5),
    "nothing": False,
    "two different values": {"allOf": [{"const": 1}, {"const": 2}]},
    "deep": nested(60),
    "deep lists": {"enum": [json.loads("[" * 200 + "]" * 200)]},
    "endless": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "endless objects": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "ten megabytes of words": {"enum": ["x" * 10_000 for _ in range(1000)]},
    "ten megabytes of descriptions": {"type": "integer", "description": "x" * 10_000_000},
    "a huge name": {"type": "object", "properties": {"x" * 1_000_000: {"type": "integer"}}},
    "many values": {"enum": list(range(5000))},
    "many references": {"anyOf": [{"$ref": "#/$defs/a"}] * 300, "$defs": {"a": {"type": "integer"}}},
    "many patterns": {"allOf": [string(f"(.*a){{9}}.{{{i}}}") for i in range(20)]},
    "a reference to nothing": {"$ref": "#/$defs/nobody"},
    "a reference to elsewhere": {"$ref": "https://example.com/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a keyword in other letters": {"tуpe": "integer"},
    "a name of a lone surrogate": {"type": "object", "properties": {"\ud800": {"type": "integer"}}},
    "look-ahead": string("(?=a)b"),
    "back-reference": string("(a)\\1"),
    "half an expression": string("(((("),
}
HEAVY: dict[str, Any] = {
    "catastrophic to others": string("^(a+)+$", maxLength=40),
    "catastrophic, too": string("^(([a-z])+.)+[A-Z]([a-z])+$", maxLength=40),
    "repetitions of repetitions": string("((a{1,1000}){1,1000}){1,1000}"),
    "unicode patterns": {
        "type": "object", "properties": {f"p{i}": string(f"^\\p{{L}}{{1,60}}-{i}\\w{{1,60}}$") for i in range(400)},
        "additionalProperties": False,
    },
    "intersections": {"allOf": [string(f"^(.*[a-z{i}]){{12}}.{{{i + 20}}}$", maxLength=200) for i in range(6)]},
    "patterns of names": {
        "type": "object", "patternProperties": {f"^(.*{i}){{6}}$": {"type": "integer"} for i in range(6)},
    },
    "counts of counts": {
        "type": "array", "minItems": 500, "items": {"type": "array", "minItems": 500, "items": {"type": "null"}},
    },
    "many ways": string("^(a|aa|aaa|aaaa){1,50}$"),
    "what ends in the middle": string("(.*a){12}.{12}"),
    "a choice of many": {"enum": [f"{i}: {'x' * 50}" for i in range(1500)]},
    "many properties": {
        "type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(900)}, "required": ["p0"],
        "additionalProperties": False,
    },
    "doubling choices": doubling(30, "anyOf"),
    "doubling sums": doubling(30, "allOf"),
    "doubling exclusions": doubling(12, "oneOf"),
    "products of choices": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"const": j}}} for j in range(4)]}
            for i in range(9)
        ]
    },
    "long counts": {"type": "array", "items": {"type": "string", "maxLength": 10_000}, "maxItems": 10_000},
    "large numbers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "fine multiples": {"type": "number", "multipleOf": 1e-12, "minimum": 0, "maximum": 1},
    "names of all letters": {
        "type": "object", "properties": {chr(0x4E00 + i): {"enum": [chr(0x3041 + i % 80)]} for i in range(300)},
        "required": [chr(0x4E00 + i) for i in range(0, 300, 50)], "additionalProperties": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(appliance: RunningAppliance, name: str) -> None:
    content = json.dumps(asked(REFUSED[name]))
    with appliance.client() as http:
        began = time.monotonic()
        reply = http.post("/v1/chat/completions", content=content)
        print(f"{name}: {time.monotonic() - began:.3f} s, {reply.text[:200]}")
        assert reply.status_code == 400, reply.text
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).status_code == 200


@pytest.mark.parametrize("name", HEAVY)
def test_what_is_heavy_is_followed_or_refused_and_others_go_on(appliance: RunningAppliance, name: str) -> None:
    """Nobody's worker dies of it."""
    pids = appliance.worker_pids()
    with appliance.client() as http:
        began = time.monotonic()
        reply = http.post("/v1/chat/completions", json=asked(HEAVY[name], max_tokens=24, temperature=1.0, seed=1))
        print(f"{name}: {time.monotonic() - began:.3f} s, {reply.text[:200]}")
        assert reply.status_code in (200, 400, 422), reply.text
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).status_code == 200
    assert set(pids) <= set(appliance.worker_pids())
