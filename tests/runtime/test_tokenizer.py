"""Detokenizing and stop strings: what comes out, in pieces, is what goes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import Detokenizer, StopMatcher


@given(st.text(), st.lists(st.integers(1, 5), min_size=1))
def test_bytes_in_any_pieces_give_the_text(text: str, cuts: list[int]) -> None:
    data, out, detokenizer, at, i = text.encode("utf-8", "replace"), "", Detokenizer(), 0, 0
    while at < len(data):
        out += detokenizer.push(data[at : at + cuts[i % len(cuts)]])
        at += cuts[i % len(cuts)]
        i += 1
    assert out + detokenizer.finish() == data.decode()


def test_an_incomplete_character_is_shown_at_the_end_only() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def whole(text: str, stops: list[str]) -> str:
    found = [text.index(s) for s in stops if s and s in text]
    return text[: min(found)] if found else text


letters = st.text(alphabet="abc", max_size=30)


@given(letters, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4), st.integers(1, 4))
def test_stops_in_any_pieces_cut_where_they_cut_the_whole(text: str, stops: list[str], size: int) -> None:
    matcher, out, stopped = StopMatcher(stops), "", False
    for i in range(0, len(text), size):
        emission = matcher.push(text[i : i + size])
        out += emission.text
        if emission.stopped:
            stopped = True
            break
    if not stopped:
        out += matcher.finish()
    assert text.startswith(out)
    # A longer piece may complete two stop strings at once; the first to begin wins, as in the whole text.
    assert stopped == any(s in text for s in stops)
    if size == 1 and stopped:
        assert any(text[len(out) :].startswith(s) for s in stops)
    if not stopped:
        assert out == whole(text, stops)
