"""Small pieces of text that several widgets put together."""

from __future__ import annotations

from textual.content import Content

from ..format import pad

Piece = str | Content | tuple[str, str]

MUTED = "$text-muted"


def line(*pieces: Piece) -> Content:
    """One line of text and ``(text, style)`` pairs. No markup: a bracket is a bracket."""
    return Content.assemble(*pieces)


def label(text: str, width: int) -> tuple[str, str]:
    """The name of a figure, of fixed width."""
    return pad(text, width), MUTED


def lines(*parts: Content) -> Content:
    """Lines under each other."""
    return Content("\n").join(parts)
