"""Schemas that requests bring: what is taken, what is refused with its path, and how answers are held against them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.errors import ConstraintFailed, InvalidRequest
from runtime.api.json_schema import check_answer, parse_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


TAKEN: list[dict[str, Any]] = [
    {},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/x", "type": "object"},
    {"type": ["string", "null"], "title": "t", "description": "d", "default": 3, "examples": [1], "x-order": 1},
    {"type": "object", "properties": {"a": True, "pattern": {"type": "string"}}, "required": ["a"]},
    {"$defs": {"a": {"enum": [1, {"not": "a keyword"}]}}, "anyOf": [{"$ref": "#/$defs/a"}, {"const": {"if": 1}}]},
    {"type": "number", "multipleOf": 0.1, "minimum": -1.5, "exclusiveMaximum": 7},
    {"prefixItems": [{"type": "string"}], "items": False, "maxItems": 3},
]


@pytest.mark.parametrize("schema", TAKEN)
def test_common_schemas_are_taken(schema: dict[str, Any]) -> None:
    assert json.loads(parse_schema(schema, "s")) == {k: v for k, v in schema.items() if k not in ("$schema", "$id")}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {}}, "s.not"),
    ({"properties": {"a": {"if": {}, "then": {}}}}, "s.properties.a.if"),
    ({"type": "array", "uniqueItems": True}, "s.uniqueItems"),
    ({"items": {"contains": {}}}, "s.items.contains"),
    ({"maxLenght": 3}, "s.maxLenght"),
    ({"nullable": True}, "s.nullable"),
    ({"x-guidance": {"lenient": True}}, "s.x-guidance"),
    ({"type": "strin"}, "s.type"),
    ({"type": []}, "s.type"),
    ({"enum": []}, "s.enum"),
    ({"anyOf": []}, "s.anyOf"),
    ({"anyOf": [{"minimum": "3"}]}, "s.anyOf[0].minimum"),
    ({"minLength": -1}, "s.minLength"),
    ({"minLength": True}, "s.minLength"),
    ({"exclusiveMinimum": True}, "s.exclusiveMinimum"),
    ({"multipleOf": 0}, "s.multipleOf"),
    ({"properties": []}, "s.properties"),
    ({"items": [{}]}, "s.items"),
    ({"required": "a"}, "s.required"),
    ({"$ref": "http://example.com/x"}, "s.$ref"),
    ({"$ref": "#name"}, "s.$ref"),
    ({"properties": {"a": {"$id": "x"}}}, "s.properties.a.$id"),
    (nested(40), "s" + ".items" * 32 + ".type"),
    ({"enum": list(range(3000))}, "s.enum"),
    ({"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(300)}}, "s"),
    ({"allOf": [{"pattern": f"(.*a){{10}}.{{{i}}}"} for i in range(20)]}, "s"),
]


@pytest.mark.parametrize(("schema", "field"), REFUSED, ids=range(len(REFUSED)))
def test_what_nobody_would_enforce_is_refused_with_its_path(schema: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_schema(schema, "s")
    assert caught.value.field == field


OBEYED: list[tuple[dict[str, Any], str]] = [
    ({"type": "number", "multipleOf": 0.1}, "0.3"),
    ({"type": "string", "pattern": "(a+)+$"}, json.dumps("a" * 40 + "!")),
    ({"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": False}, '{"a1": "x"}'),
    ({"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "[[], [[]]]"),
]


@pytest.mark.parametrize(("schema", "answer"), OBEYED)
def test_answers_that_obey_pass(schema: dict[str, Any], answer: str) -> None:
    check_answer(answer, parse_schema(schema, "s"))


DOUBLING: dict[str, Any] = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"type": "object"}, '{"a": 1'),
    ({"type": "object"}, ""),
    ({"type": "object"}, "[]"),
    ({"properties": {"a": {"maximum": 3}}}, '{"a": 4}'),
    ({"type": "number", "multipleOf": 0.1}, "0.35"),
    ({"type": "number", "multipleOf": 0.1}, "1e999"),
    ({"type": "integer"}, "7" * 5000),
    ({"type": "array"}, "[" * 50_000),
    ({"$defs": {**DOUBLING, "a40": {}}, "$ref": "#/$defs/a0"}, "1"),
    ({"$ref": "#"}, "1"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "answer"), BROKEN, ids=range(len(BROKEN)))
def test_answers_that_do_not_or_cannot_be_checked_fail(schema: dict[str, Any], answer: str) -> None:
    with pytest.raises(ConstraintFailed) as caught:
        check_answer(answer, parse_schema(schema, "s"))
    assert len(caught.value.message) < 400


def test_references_may_name_definitions_in_any_letters() -> None:
    """As programs write them that make schemas of classes; an answer is checked by the same text."""
    part = {"type": "integer", "maximum": 3}
    schema = {"anyOf": [{"$ref": "#/$defs/Größe (m)"}, {"$ref": "#/$defs/Gr%C3%B6%C3%9Fe%20(m)"}]}
    text = parse_schema({**schema, "$defs": {"Größe (m)": part}}, "schema")
    refs = [option["$ref"] for option in json.loads(text)["anyOf"]]
    assert refs == ["#/$defs/Gr%C3%B6%C3%9Fe%20(m)"] * 2
    check_answer("3", text)
    with pytest.raises(ConstraintFailed):
        check_answer("4", text)
