"""The appliance's log, followed."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static
from typing_extensions import override

from edge.errors import EdgeError

from ..actions import bindings_for
from ..client import RuntimeClient
from ..css import beside
from ..format import clean_line
from ..state import View
from ..widgets.log_view import LogView
from ..widgets.pieces import MUTED, line
from .base import EdgeScreen

NUM_LINES = 500


class LogsScreen(EdgeScreen):
    """Reads the log when an event says that the appliance lives, at most once an event, and only while it is seen."""

    CSS = beside(__file__)
    WHERE = "logs"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings_for("logs")]
    is_following: reactive[bool] = reactive(True, init=False)

    def __init__(self, client: RuntimeClient) -> None:
        super().__init__()
        self._client = client
        self._is_reading = False
        self._error = ""

    @override
    def content(self) -> ComposeResult:
        yield Static(id="state")
        yield LogView()

    def on_mount(self) -> None:
        self.query_one(LogView).focus()

    def on_screen_resume(self) -> None:
        self._read()

    def watch_view(self, before: View, after: View) -> None:
        """Read again when news came."""
        if self.is_current and self.is_following and after.received_at != before.received_at:
            self._read()

    def watch_is_following(self) -> None:
        """Hold the lines still, or go to the end."""
        log = self.query_one(LogView)
        log.auto_scroll = self.is_following
        if self.is_following:
            log.scroll_end(animate=False)
            self._read()
        self._show_state()

    def action_follow(self) -> None:
        """Follow, or hold still."""
        self.is_following = not self.is_following

    def _read(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self.run_worker(self._read_now(), group="log")

    async def _read_now(self) -> None:
        try:
            lines = await self._client.logs(num_lines=NUM_LINES)
            self._error = ""
            self.query_one(LogView).follow(lines)
        except EdgeError as e:
            self._error = clean_line(e.message)
        finally:
            self._is_reading = False
        self._show_state()

    def _show_state(self) -> None:
        following = ("● following", "$success") if self.is_following else ("○ held still", "$warning")
        count = f"   {self.query_one(LogView).num_lines} lines"
        error = (f"   ✖ {self._error}", "$text-error") if self._error else ""
        self.query_one("#state", Static).update(Content.assemble(line(following, (count, MUTED)), error))
