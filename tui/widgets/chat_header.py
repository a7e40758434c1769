"""Whom the operator talks with."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from typing_extensions import override

from ..css import beside
from ..format import fit, rate_text
from ..state import MODEL_MARKS, View
from .pieces import MUTED, line


class ChatHeader(Widget):
    """Model, its state, the device's speed, the system prompt."""

    DEFAULT_CSS = beside(__file__)
    view: reactive[View] = reactive(View())
    model: reactive[str | None] = reactive[str | None](None)
    system: reactive[str] = reactive("")

    @override
    def render(self) -> Content:
        model = self.view.model(self.model)
        if model is None:
            text = "No model to talk with: 2, then p pulls one." if self.view.status else "Nothing heard yet."
            return line((text, MUTED))
        glyph, style = MODEL_MARKS[model.state]
        note = " (loads with the first question)" if model.state == "unloaded" else ""
        rate = f"  {rate_text(model.decode_tok_s)} tok/s now" if model.state == "ready" else ""
        left = line((model.ref, "bold"), "  ", (f"{glyph} {model.state}", style), (note, MUTED), rate)
        room = self.size.width - left.cell_length - 12
        system = f"  system: {fit(self.system, room)}" if self.system and room > 4 else ""
        return line(left, (system, MUTED))
