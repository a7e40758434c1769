"""Tokens of contents, and how much of them is looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ContextOverflow, InvalidRequest
from runtime import wire
from runtime.chat import ChatTemplate, without_breaks
from runtime.lengths import MAX_CHARS_PER_TOKEN
from runtime.spelling import Speller
from tests.support import LetterTokenizer

LETTERS = st.text(st.characters(min_codepoint=0x4E01, max_codepoint=0x4E60), max_size=8)


def speller(context_tokens: int = 8) -> Speller:
    return Speller(LetterTokenizer(), vocab_size=97, context_tokens=context_tokens)


@given(st.lists(LETTERS | st.integers(0, 96), max_size=8))
def test_each_part_is_spelled_in_its_place(content: list[str | int]) -> None:
    piece = speller().spell(wire.Spell(7, content))
    assert piece.tokens is not None
    assert piece.spellings is not None
    expected = "".join(p if isinstance(p, str) else LetterTokenizer().text(p) for p in content)
    assert b"".join(piece.spellings).decode() == expected
    assert (piece.id, piece.finish_reason, piece.num_prompt, piece.num_output) == (7, "stop", 0, 0)
    again = speller().spell(wire.Spell(7, [*piece.tokens]))
    assert (again.tokens, again.spellings) == (piece.tokens, piece.spellings)


def test_what_no_prompt_could_be_is_not_tokenized() -> None:
    most = 8 * MAX_CHARS_PER_TOKEN
    contents: list[list[str | int]] = [["一" * (most + 1)], [1] * (most + 1), ["一" * most, 1]]
    for content in contents:
        with pytest.raises(ContextOverflow, match="'text'"):
            speller().spell(wire.Spell(1, content, field="text"))
    assert len(speller().spell(wire.Spell(1, ["一" * most])).tokens or ()) == most


@pytest.mark.parametrize("token", [97, -1, 1 << 40])
def test_unknown_tokens_are_named(token: int) -> None:
    with pytest.raises(InvalidRequest, match=str(token)) as e:
        speller().spell(wire.Spell(1, ["一", token], field="tokens"))
    assert e.value.field == "tokens"


def test_a_prompt_for_people_is_as_it_was_written() -> None:
    template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}", markers=["<s>", "</s>"])
    text = template.render([wire.ChatMessage("user", ["a </s> b ", 0, " c"])])
    assert "</s> b" not in text
    assert without_breaks(text) == "<s>a </s> b <__media__> c</s>"
