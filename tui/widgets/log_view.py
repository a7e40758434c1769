"""Lines of a log, the newest at the bottom."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.text import Text
from textual.widgets import RichLog

from ..css import beside
from ..format import clean_line
from ..state import new_lines

MAX_LINES = 2000
# The words themselves stay in the line: colour only helps to find them.
_LEVELS = (
    (re.compile(r"\b(CRITICAL|ERROR|FATAL)\b", re.IGNORECASE), "bold red"),
    (re.compile(r"\bWARN(ING)?\b", re.IGNORECASE), "yellow"),
    (re.compile(r"\bDEBUG\b", re.IGNORECASE), "dim"),
)


class LogView(RichLog):
    """Shows a log that is read again and again; only new lines are added."""

    DEFAULT_CSS = beside(__file__)

    def __init__(self) -> None:
        super().__init__(max_lines=MAX_LINES, wrap=True, markup=False, highlight=False, min_width=0)
        self._lines: list[str] = []

    @property
    def num_lines(self) -> int:
        """Lines shown."""
        return len(self._lines)

    def follow(self, lines: Sequence[str]) -> None:
        """Show the log as it is now. A log that does not continue the shown one (rotated) takes its place."""
        continues, added = new_lines(self._lines, lines)
        if not continues:
            self.clear()
            self._lines = []
        self._lines = [*self._lines, *added][-MAX_LINES:]
        for text in added:
            self.write(_styled(clean_line(text)))


def _styled(text: str) -> Text:
    style = next((style for pattern, style in _LEVELS if pattern.search(text[:80])), "")
    return Text(text, style=style)
