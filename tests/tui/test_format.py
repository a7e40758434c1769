"""Figures as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.format import (
    UNKNOWN,
    age_text,
    bar,
    clean,
    clean_line,
    columns,
    count_text,
    fit,
    pad,
    parameters_text,
    rate_text,
    size_text,
    span_text,
    trend,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, UNKNOWN), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_000_000, "98 MB"), (1_234_000_000, "1.2 GB"),
     (9_990_000_000, "10 GB"), (999_600_000, "1.0 GB"), (10**21, "1000000 PB")],
)  # fmt: skip
def test_sizes(size: float | None, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, UNKNOWN), (0.214, "0.21 s"), (9.999, "10 s"), (42, "42 s"), (200, "3 min"), (15_120, "4 h 12 min"),
     (273_900, "3 d 4 h"), (-1, "0.00 s")],
)  # fmt: skip
def test_spans(seconds: float | None, text: str) -> None:
    assert span_text(seconds) == text


def test_other_figures() -> None:
    assert (count_text(1204), count_text(None)) == ("1,204", UNKNOWN)
    assert (parameters_text(134_515_008), parameters_text(1_100_048_384)) == ("135 M", "1.1 B")
    assert (rate_text(38.42), rate_text(1234.0), rate_text(None)) == ("38.4", "1,234", UNKNOWN)
    assert (age_text(4.9), age_text(130), age_text(None)) == ("4 s", "2 min", UNKNOWN)


@given(text=st.text(), width=st.integers(0, 40))
def test_padded_text_has_exactly_its_width(text: str, width: int) -> None:
    assert columns(pad(text, width)) == width
    assert columns(fit(text, width)) <= width


def test_wide_and_combining_characters_count_as_a_terminal_draws_them() -> None:
    assert columns("日本") == 4
    assert columns("e\u0301") == 1
    assert fit("日本語", 4) == "日…"


@given(fraction=st.floats(allow_nan=False), width=st.integers(0, 60))
def test_a_bar_has_exactly_its_width(fraction: float, width: int) -> None:
    assert len(bar(fraction, width)) == width


def test_a_bar_fills_in_eighths() -> None:
    assert [bar(f, 4) for f in (0, 0.125, 0.5, 1, 7)] == ["░░░░", "▌░░░", "██░░", "████", "████"]


@given(values=st.lists(st.none() | st.floats(0, 1e6), max_size=80), width=st.integers(1, 40), height=st.integers(1, 8))
def test_a_trend_has_exactly_its_size(values: list[float | None], width: int, height: int) -> None:
    rows = trend(values, width=width, height=height, top=100.0)
    assert [len(row) for row in rows] == [width] * height


def test_a_trend_shows_the_newest_at_the_right_and_gaps_as_gaps() -> None:
    assert trend([8, 4, None, 0, 0.01, 8], width=6, height=1, top=8) == ["█▄  ▁█"]
    assert trend([8, 4], width=4, height=2, top=8) == ["  █ ", "  ██"]
    assert trend([1, 2, 8], width=1, height=1, top=8) == ["█"]


@given(st.text())
def test_clean_text_holds_nothing_a_terminal_obeys(text: str) -> None:
    assert all(c >= " " or c in "\n\t" for c in clean(text))
    assert not {"\x7f", "\x9b", "\u202e", "\u2066"} & set(clean(text))


def test_a_clean_line_is_one_bounded_line() -> None:
    assert clean_line("\x1b[31mred\r\nnext") == "\ufffd[31mred next"
    assert clean_line("a\tb") == "a   b"
    assert len(clean_line("x" * 10_000)) == 2000
