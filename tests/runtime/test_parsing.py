"""Bodies that cost more to read than they should."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextvars import copy_context
from typing import Any

import pytest

from edge.errors import InvalidRequest
from runtime.api.embeddings import EmbeddingRequest
from runtime.api.ollama_schema import option_warnings
from runtime.api.openai_schema import ChatRequest
from runtime.api.parsing import MAX_FIELDS, MAX_PARTS, MAX_VALUES, MAX_WARNINGS, check_items, parse_body, set_strict

NUMBERS = [999] * (MAX_VALUES + 2)


@pytest.mark.parametrize("values", [NUMBERS, [NUMBERS], ['a, \\" b', *NUMBERS], ["\\", *NUMBERS, "\\"]])
def test_millions_of_small_values_are_refused_unread(values: list[Any]) -> None:
    """Each number of four bytes would take forty."""
    with pytest.raises(InvalidRequest, match="300,000 values") as caught:
        parse_body(json.dumps({"model": "m", "input": values}).encode(), EmbeddingRequest)
    assert caught.value.field == "input"


def test_so_are_messages() -> None:
    messages = [{"role": "user", "content": "x"}] * MAX_VALUES
    with pytest.raises(InvalidRequest, match="'messages' holds more than"):
        parse_body(json.dumps({"model": "m", "messages": messages}).encode(), ChatRequest)


@pytest.mark.parametrize("space", ["", " \n\t"])
def test_so_are_schemas(space: str) -> None:
    body = json.dumps({"model": "m", "messages": [], "response_format": "SCHEMA"})
    schema = json.dumps({"type": "json_schema", "json_schema": {"schema": {"enum": list(range(MAX_PARTS + 1))}}})
    with pytest.raises(InvalidRequest, match="10,000 values") as caught:
        parse_body(body.replace('"SCHEMA"', space + schema).encode(), ChatRequest)
    assert caught.value.field == "response_format"


@pytest.mark.parametrize("names", [map(str, range(160_000)), ["model"] * 160_000, map(str, range(MAX_FIELDS + 1))])
def test_fields_without_number_are_refused(names: Iterable[str]) -> None:
    body = ",".join(['{"model": "m", "input": "x"', *(f'"{name}": "m"' for name in names)]) + "}"
    with pytest.raises(InvalidRequest, match="1,000 fields"):
        parse_body(body.encode(), EmbeddingRequest)


@pytest.mark.parametrize("num_messages", [1, 50_000])
def test_so_are_those_of_messages(num_messages: int) -> None:
    unknown = {f"unknown{i}": 1 for i in range(100_000 // num_messages)}
    body = json.dumps({"messages": [{"role": "user", "content": "x"} | unknown] * num_messages}).encode()
    with pytest.raises(InvalidRequest, match="1,000 fields"):
        check_items(body, "messages", frozenset({"role", "content"}), frozenset())
    plain = json.dumps({"messages": [{"role": "user", "content": "x: y"}] * num_messages}).encode()
    check_items(plain, "messages", frozenset({"role", "content"}), frozenset())


def test_so_are_options() -> None:
    body = json.dumps({"options": {f"unknown{i}": None for i in range(100_000)}}).encode()
    with pytest.raises(InvalidRequest, match="1,000 fields"):
        option_warnings(body)


def test_warnings_end_where_nobody_reads_on() -> None:
    body = {"model": "m", "input": "x"} | {f"unknown{i}": 1 for i in range(MAX_FIELDS // 2)}
    assert len(parse_body(json.dumps(body).encode(), EmbeddingRequest)[1]) == MAX_WARNINGS
    chat = body | {"messages": [{"role": "user", "content": "x"}], "functions": [1]}
    with pytest.raises(InvalidRequest, match="'functions' is not supported"):
        parse_body(json.dumps(chat).encode(), ChatRequest)


def test_colons_of_known_fields_are_no_fields() -> None:
    messages = [{"role": "user", "content": "a: b"}] * 10_000
    body = {"model": "m", "messages": messages, "metadata": {"note": ":" * 20_000}}
    assert len(parse_body(json.dumps(body).encode(), ChatRequest)[0].messages) == 10_000


@pytest.mark.parametrize("text", [", " * MAX_VALUES, '\\",' * MAX_VALUES, "\\" * 7 + "," * 2 * MAX_VALUES])
def test_commas_in_texts_are_no_values(text: str) -> None:
    body, _ = parse_body(json.dumps({"model": "m", "input": [text, text]}).encode(), EmbeddingRequest)
    assert body.input == [text, text]
    assert parse_body(json.dumps({"model": "m", "input": text}).encode(), EmbeddingRequest)[0].input == text


def parsed(header: str | None, by_default: bool) -> list[str]:
    set_strict(header, by_default=by_default)
    return parse_body(b'{"model": "m", "input": "x", "colour": 1, "mood": null}', EmbeddingRequest)[1]


@pytest.mark.parametrize(("header", "by_default"), [(None, False), ("false", True), ("False", False)])
def test_a_request_that_is_not_strict_is_warned(header: str | None, by_default: bool) -> None:
    assert copy_context().run(parsed, header, by_default) == ["unknown field 'colour' was ignored"]


@pytest.mark.parametrize(("header", "by_default"), [(None, True), ("true", False), ("True", True)])
def test_a_strict_request_names_the_field(header: str | None, by_default: bool) -> None:
    with pytest.raises(InvalidRequest, match="unknown field 'colour'") as caught:
        copy_context().run(parsed, header, by_default)
    assert caught.value.field == "colour"


@pytest.mark.parametrize("header", ["", "1", "yes"])
def test_strictness_is_true_or_false(header: str) -> None:
    with pytest.raises(InvalidRequest, match="true or false"):
        copy_context().run(parsed, header, False)


def test_fields_inside_of_fields_are_listed_once() -> None:
    url = {"url": "data:x", "size": 3}
    parts = [{"type": "text", "text": "x", "mood": 1}, {"type": "image_url", "image_url": url}]
    message = {"role": "user", "content": parts, "mood": "good", "nothing": None}
    body = {"model": "m", "messages": [message] * 3, "stream_options": {"include_usage": True, "pace": 2}, "lora": []}
    assert parse_body(json.dumps(body).encode(), ChatRequest)[1] == [
        f"unknown field '{name}' in {where} was ignored"
        for where, name in (
            ("messages", "mood"), ("messages.content", "mood"), ("messages.content.image_url", "size"),
            ("stream_options", "pace"),
        )
    ]  # fmt: skip
    schema = {"type": "object", "properties": {"anything": {"x-note": 1}}}
    body |= {"messages": [{"role": "user", "content": "x"}], "stream_options": None, "metadata": {"a": "b"}}
    body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    assert parse_body(json.dumps(body).encode(), ChatRequest)[1] == []


def test_so_many_fields_inside_are_refused() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"} | {f"unknown{i}": 1 for i in range(100_000)}]}
    with pytest.raises(InvalidRequest, match="1,000 fields"):
        parse_body(json.dumps(body).encode(), ChatRequest)
