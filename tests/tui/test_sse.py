"""The event-stream parser: the standard's rules, bounds, and no dependence on how bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.sse import Event, EventParser, InvalidReply


def parse(*chunks: bytes) -> list[Event]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event("message", b"a")]),
        (b"data:a\r\n\r\n", [Event("message", b"a")]),
        (b"data:  a\r\rdata:b\n\n", [Event("message", b" a"), Event("message", b"b")]),
        (b"event: status\ndata: {\ndata: }\n\n", [Event("status", b"{\n}")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event("message", b"a")]),
        (b": a comment\nid: 4\nretry: 9\nunknown: x\ndata: a\n\n", [Event("message", b"a")]),
        (b"event: lost\n\ndata: a\n\n", [Event("message", b"a")]),
        (b"data\n\n", [Event("message", b"")]),
        (b"data: half", []),
        (b"data: half\n", []),
        (b"\n\n\n", []),
    ],
)
def test_the_standards_rules(stream: bytes, events: list[Event]) -> None:
    assert parse(stream + (b"" if not events else b"\n")) == events


TEXT = st.binary(max_size=12).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))


@given(
    events=st.lists(
        st.tuples(st.sampled_from([b"status", b"job"]), st.lists(TEXT, min_size=1, max_size=3)), max_size=5
    ),
    # A carriage return before a line feed is one end, so lone ones stand in streams of their own.
    ends=st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=1, max_size=7) | st.just([b"\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_cuts_and_line_ends_change_nothing(
    events: list[tuple[bytes, list[bytes]]], ends: list[bytes], cuts: list[int]
) -> None:
    lines = [line for name, data in events for line in (b"event: " + name, *(b"data: " + d for d in data), b"")]
    stream = b"".join(line + ends[i % len(ends)] for i, line in enumerate(lines)) + b": the end\n"
    edges = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert parse(*chunks) == [Event(name.decode(), b"\n".join(data)) for name, data in events]


def test_a_line_is_bounded_whether_or_not_it_ends() -> None:
    for chunk in (b"data: " + b"x" * 100 + b"\n", b"data: " + b"x" * 100):
        parser = EventParser(max_line_bytes=64)
        with pytest.raises(InvalidReply, match="line of more than 64 bytes"):
            parser.feed(chunk)


def test_a_line_that_grows_over_many_chunks_is_bounded() -> None:
    parser = EventParser(max_line_bytes=64)
    for _ in range(6):
        assert parser.feed(b"x" * 10) == []
    with pytest.raises(InvalidReply):
        parser.feed(b"x" * 10)


def test_an_event_of_many_lines_is_bounded() -> None:
    parser = EventParser(max_line_bytes=64, max_event_bytes=100)
    with pytest.raises(InvalidReply, match="event of more than 100 bytes"):
        parser.feed(b"data: xxxxxxxxxxxxxxxxxxxxxxx\n" * 10)


def test_a_name_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidReply, match="not UTF-8"):
        parse(b"event: \xff\ndata: a\n\n")
