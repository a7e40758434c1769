"""Figures as people read them. Sizes are decimal (1 MB = 10^6 bytes), as disks and model pages state them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

UNKNOWN = "–"
_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SPARKS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BIDI_CONTROLS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
# What a terminal obeys and what turns text around (CVE-2021-42574): from a log or a model it could repaint the screen.
_HARMFUL = {
    code: "\ufffd"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_BIDI_CONTROLS)
    if chr(code) not in "\n\t"
}


def clean(text: str) -> str:
    """Foreign text without the characters that a terminal obeys; tabs and line feeds stay."""
    return text.translate(_HARMFUL)


def clean_line(text: str, *, limit: int = 2000) -> str:
    """Foreign text as one harmless line of at most `limit` characters."""
    line = clean(text[: limit + 1].replace("\r\n", " ").replace("\n", " ")).expandtabs(4)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def fit(text: str, width: int) -> str:
    """Text cut to `width` columns, its end marked where something is missing."""
    if columns(text) <= width:
        return text
    kept = ""
    for character in text:
        if columns(kept + character) > width - 1:
            break
        kept += character
    return kept + "…" if width > 0 else ""


def pad(text: str, width: int) -> str:
    """Text cut or filled to exactly `width` columns."""
    cut = fit(text, width)
    return cut + " " * (width - columns(cut))


def columns(text: str) -> int:
    """Columns a terminal gives to `text`."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def size_text(size_bytes: float | None) -> str:
    """``98 MB``, ``1.2 GB``."""
    if size_bytes is None:
        return UNKNOWN
    value, unit = float(size_bytes), 0
    while value >= 999.5 and unit < len(_SIZE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit > 0 and value < 9.95 else 0
    return f"{value:.{digits}f} {_SIZE_UNITS[unit]}"


def count_text(count: int | None) -> str:
    """``1,204``."""
    return UNKNOWN if count is None else f"{count:,}"


def parameters_text(num_parameters: int | None) -> str:
    """``135 M``, ``1.1 B``."""
    if num_parameters is None:
        return UNKNOWN
    if num_parameters < 999_500_000:
        return f"{num_parameters / 1e6:.0f} M"
    return f"{num_parameters / 1e9:.1f} B"


def rate_text(tokens_per_s: float | None) -> str:
    """Tokens per second, without the unit."""
    if tokens_per_s is None:
        return UNKNOWN
    return f"{tokens_per_s:.1f}" if tokens_per_s < 99.95 else f"{tokens_per_s:,.0f}"


def span_text(seconds: float | None) -> str:
    """``0.21 s``, ``42 s``, ``3 min``, ``4 h 12 min``, ``3 d 4 h``."""
    if seconds is None:
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if hours == 0:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def age_text(seconds: float | None) -> str:
    """Whole seconds and coarser: an age of tenths would only flicker."""
    if seconds is None:
        return UNKNOWN
    return f"{int(seconds)} s" if seconds < 120 else span_text(seconds)


def bar(fraction: float, width: int) -> str:
    """A bar of exactly `width` cells; `fraction` is held to 0..1."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    drawn = "█" * full + (_EIGHTHS[part] if part else "")
    return drawn + "░" * (width - len(drawn))


def trend(values: Sequence[float | None], *, width: int, height: int, top: float) -> list[str]:
    """A column chart of the last `width` values, newest at the right, `height` lines from the top.

    None is a gap: nothing is known of that moment. `top` is the value of a full column; a value above zero always
    shows.
    """
    last = [*([None] * (width - len(values))), *values[max(0, len(values) - width) :]]
    steps = [_steps(value, height=height, top=top) for value in last]
    return ["".join(_cell(step - 8 * row) for step in steps) for row in reversed(range(height))]


def _steps(value: float | None, *, height: int, top: float) -> int:
    if value is None or value <= 0 or top <= 0:
        return 0
    return max(1, round(min(value / top, 1.0) * height * 8))


def _cell(step: int) -> str:
    return " " if step <= 0 else _SPARKS[min(step, 8) - 1]
