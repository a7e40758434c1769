"""Texts that are too long are refused without being tokenized."""

from __future__ import annotations

import math

import pytest
from typing_extensions import override

from edge.errors import ContextOverflow
from runtime.lengths import SLICE_CHARS, Ruler
from tests.support import LetterTokenizer


class CountingTokenizer(LetterTokenizer):
    """Makes a token of each `size` characters, and counts what it reads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_read = 0

    @override
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        self.num_read += len(text)
        return [1] * -(-len(text) // self.size)


@pytest.mark.parametrize("size", [4, 20, 31])
@pytest.mark.parametrize("limit", [500, 8192])
def test_what_does_not_fit_is_refused_by_its_count(size: int, limit: int) -> None:
    for num_tokens in (limit * 3, (16 << 20) // size):
        tokenizer = CountingTokenizer(size)
        with pytest.raises(ContextOverflow) as caught:
            Ruler(tokenizer, limit_tokens=limit, field="prompt").check("x" * (num_tokens * size))
        assert tokenizer.num_read <= 2 * limit * size + 40 * SLICE_CHARS
        assert math.isclose(caught.value.prompt_tokens, num_tokens, rel_tol=0.01)
        assert caught.value.field == "prompt"
        assert f"maximum context length is {limit} tokens. However, you requested" in caught.value.message


@pytest.mark.parametrize("size", [1, 4, 31])
def test_what_may_fit_passes(size: int) -> None:
    ruler = Ruler(CountingTokenizer(size), limit_tokens=5000, field="messages")
    ruler.check("x" * (5000 * size))
    ruler.check("")
    ruler.check_size(5000 * 32, "x")


def test_texts_together_may_be_too_long() -> None:
    ruler = Ruler(tokenizer := CountingTokenizer(2), limit_tokens=100, field="messages")
    with pytest.raises(ContextOverflow) as caught:
        ruler.check_size(10_003, "x" * 1000)
    assert (caught.value.prompt_tokens, tokenizer.num_read) == (5001, 1000)
