"""The first line: the screens, the device, and whether the figures are live."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from typing_extensions import override

from ..actions import Where
from ..css import beside
from ..format import age_text, columns, fit
from ..state import LINK_MARKS, View, alerts_of
from .pieces import line

_TABS: tuple[tuple[Where, str], ...] = (
    ("overview", "1 Overview"), ("models", "2 Models"), ("chat", "3 Chat"), ("logs", "4 Logs"),
)  # fmt: skip


class TopBar(Widget):
    """Which screen this is, and how far what it shows can be trusted."""

    DEFAULT_CSS = beside(__file__)
    view: reactive[View] = reactive(View())

    def __init__(self, where: Where) -> None:
        super().__init__()
        self._where = where

    @override
    def render(self) -> Content:
        tabs = line(*((f" {text} ", "bold reverse" if where == self._where else "") for where, text in _TABS))
        right = self._right(self.size.width - tabs.cell_length - 1)
        space = " " * max(1, self.size.width - tabs.cell_length - right.cell_length)
        return line(tabs, space, right)

    def _right(self, width: int) -> Content:
        view = self.view
        glyph, style = LINK_MARKS[view.link]
        age = f" {age_text(view.age_s)}" if view.link == "stale" else ""
        link = f"{glyph} {view.link}{age} "
        alerts = [alert for alert in alerts_of(view.status) if alert.level != "info"] if view.status else []
        marks = (f" ▲{len(alerts)}" if alerts else "") + (" read-only" if view.read_only else "")
        host = fit(view.status.hostname, max(0, width - columns(link + marks) - 1)) if view.status else ""
        return line(host, (marks, "bold $text-warning"), " ", (link, f"bold {style}"))
