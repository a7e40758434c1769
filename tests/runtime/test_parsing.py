"""Bodies that cost more to read than they should."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.errors import InvalidRequest
from runtime.api.embeddings import EmbeddingRequest
from runtime.api.openai_schema import ChatRequest
from runtime.api.parsing import MAX_VALUES, parse_body

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


@pytest.mark.parametrize("text", [", " * MAX_VALUES, '\\",' * MAX_VALUES, "\\" * 7 + "," * 2 * MAX_VALUES])
def test_commas_in_texts_are_no_values(text: str) -> None:
    body, _ = parse_body(json.dumps({"model": "m", "input": [text, text]}).encode(), EmbeddingRequest)
    assert body.input == [text, text]
    assert parse_body(json.dumps({"model": "m", "input": text}).encode(), EmbeddingRequest)[0].input == text
