"""One turn of a conversation; an answer grows as it comes."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream
from typing_extensions import override

from ..css import beside
from ..format import UNKNOWN, clean, rate_text, span_text
from ..state import Turn
from .pieces import MUTED, line

_ENDS = {"length": "▲ cut at the token limit", "content_filter": "▲ held back by a filter"}


class TurnView(Vertical):
    """Shows one turn. What a person wrote stays as it is; what a model wrote is Markdown, its links dead."""

    DEFAULT_CSS = beside(__file__)

    def __init__(self, turn: Turn) -> None:
        super().__init__(classes=turn.role)
        self.turn = turn
        self._head = Static(classes="head")
        self._body = Markdown(open_links=False) if turn.role == "assistant" else Static(Content(clean(turn.content)))
        self._stream: MarkdownStream | None = None

    @override
    def compose(self) -> ComposeResult:
        yield self._head
        yield self._body

    def on_mount(self) -> None:
        self.refresh_head()

    async def write(self, text: str) -> None:
        """Add text to an answer."""
        if isinstance(self._body, Markdown):
            self._stream = self._stream or Markdown.get_stream(self._body)
            await self._stream.write(text)

    async def finish(self) -> None:
        """Draw what is left of an answer. A second call does nothing."""
        self.refresh_head()  # first: who stops an answer that has just ended cuts the wait below short
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()

    def refresh_head(self) -> None:
        """Draw the line above the text again: who, how fast, how it ended."""
        turn = self.turn
        if turn.role == "user":
            self._head.update(line(("You", "bold $accent")))
            return
        self._head.update(line((turn.model, "bold $primary"), (_figures(turn), MUTED), (_end(turn), "$text-warning")))


def _figures(turn: Turn) -> str:
    if turn.first_at is None:
        return "" if turn.error or turn.is_stopped else "  … reading the question"
    rate = UNKNOWN if turn.rate_tok_s is None else rate_text(turn.rate_tok_s)
    going_on = "" if turn.finish_reason or turn.error or turn.is_stopped else " …"
    return f"  {turn.num_tokens} tokens · {rate} tok/s · first after {span_text(turn.ttft_s)}{going_on}"


def _end(turn: Turn) -> str:
    if turn.error:
        return f"\n✖ {turn.error}"
    if turn.is_stopped:
        return "  ○ stopped"
    return f"  {_ENDS[turn.finish_reason]}" if turn.finish_reason in _ENDS else ""
