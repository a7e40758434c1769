"""Says that no appliance answers, and what to do."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from typing_extensions import override

from ..css import beside
from ..state import View
from .pieces import line, lines


class Banner(Widget):
    """Shown only while there is no connection."""

    DEFAULT_CSS = beside(__file__)
    view: reactive[View] = reactive(View(), layout=True)

    def watch_view(self, view: View) -> None:
        """Appear and go with the trouble."""
        self.display = view.link == "down"

    @override
    def render(self) -> Content:
        view = self.view
        return lines(
            line(("✖ ", "bold"), view.error or ""),
            line("  ", f"{view.hint.rstrip('.')}. " if view.hint else "", "Tries again by itself; r tries now."),
        )
