"""Every key, what it does, and the same from a shell."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static
from typing_extensions import override

from ..actions import ACTIONS, Action, Where, key_text
from ..css import beside
from ..format import pad
from ..widgets.pieces import MUTED, line, lines

_KEY, _LABEL, _WHAT = 6, 14, 33
_TITLES: dict[Where, str] = {
    "everywhere": "Everywhere", "overview": "Overview", "models": "Models", "chat": "Chat", "logs": "Logs",
}  # fmt: skip


class HelpScreen(ModalScreen[None]):
    """The key table; this screen's keys first."""

    CSS = beside(__file__)
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "dismiss", "Close")]

    def __init__(self, where: Where) -> None:
        super().__init__()
        self._where = where

    @override
    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = "Keys"
            box.border_subtitle = "esc closes"
            yield Static(self._text())

    def _text(self) -> Content:
        order = sorted(_TITLES, key=lambda where: (where != self._where, where != "everywhere"))
        return Content("\n\n").join(_section(where) for where in order)


def _section(where: Where) -> Content:
    return lines(
        line((_TITLES[where], "bold $text-accent")), *(_row(action) for action in ACTIONS if action.where == where)
    )


def _row(action: Action) -> Content:
    return line(
        (pad(key_text(action), _KEY), "bold"),
        pad(action.label, _LABEL),
        (pad(action.what, _WHAT), MUTED),
        action.twin,
    )
