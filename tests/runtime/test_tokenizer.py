"""Detokenizing and stop strings: what comes out, in pieces, is what goes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import Detokenizer, StopMatcher


@given(st.text(), st.lists(st.integers(1, 5), min_size=1))
def test_bytes_in_any_pieces_give_the_text(text: str, cuts: list[int]) -> None:
    data, detokenizer = text.encode("utf-8", "replace"), Detokenizer()
    out = "".join(map(detokenizer.push, pieces_of(data, cuts)))
    assert out + detokenizer.finish() == data.decode()


def test_an_incomplete_character_is_shown_at_the_end_only() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


@given(st.binary(max_size=40), st.lists(st.integers(1, 5), min_size=1))
def test_so_do_bytes_that_are_no_text(data: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer()
    out = "".join(map(detokenizer.push, pieces_of(data, cuts)))
    assert out + detokenizer.finish() == data.decode("utf-8", "replace")


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    found, at = list[bytes](), 0
    while at < len(data):
        size = cuts[len(found) % len(cuts)]
        found.append(data[at : at + size])
        at += size
    return found


def cut_at(text: str, stops: list[str]) -> tuple[str, bool]:
    """A text as it is with these stop strings, and whether one stood in it: plainly, letter by letter."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text(alphabet="aé€😀", max_size=30), st.lists(st.text(alphabet="aé€😀", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 9), min_size=1),
)  # fmt: skip
def test_any_split_into_tokens_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    """Tokens end in the middle of characters, and of stop strings; what is passed on is never taken back."""
    detokenizer, matcher, out, stopped = Detokenizer(), StopMatcher(stops), "", False
    for piece in pieces_of(text.encode(), cuts):
        emission = matcher.push(detokenizer.push(piece))
        out += emission.text
        assert text.startswith(out)
        if stopped := emission.stopped:
            break
    if not stopped:
        out += matcher.finish()
    assert (out, stopped) == cut_at(text, stops)
    assert matcher.found in (stops if stopped else [""])
    assert not stopped or text[len(out) :].startswith(matcher.found)
