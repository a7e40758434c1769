"""Ways to drive the terminal from a test and to read its screen."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from textual.app import App, ComposeResult
from textual.events import Paste
from textual.pilot import Pilot
from textual.widget import Widget
from typing_extensions import override

from tests.tui.appliance import ScriptedAppliance
from tui.app import EdgeTerminal, Timing
from tui.client import Address, RuntimeClient
from tui.feed import Backoff
from tui.format import pad
from tui.state import View

_TEXT = re.compile(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]* clip-path=[^>]*>([^<]*)</text>')
_COLUMN_WIDTH = 12.2
"""Of Rich's SVG export, in its units."""


@dataclass
class Clock:
    """Monotonic seconds that only a test moves."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Terminal:
    """The running terminal and what a test needs around it."""

    app: EdgeTerminal
    pilot: Pilot[None]
    clock: Clock
    appliance: ScriptedAppliance

    async def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        await self.pilot.press(*keys)

    async def type(self, text: str) -> None:
        """Paste text into what has the focus."""
        assert self.app.focused
        self.app.focused.post_message(Paste(text))
        await self.pilot.pause()

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not in time; the screen:\n{screen_text(self.app)}"
            await self.pilot.pause(0.04)

    async def until_shown(self, *texts: str) -> None:
        """Wait until the screen shows all of these."""
        await self.until(lambda: all(text in screen_text(self.app) for text in texts))


def terminal_of(appliance: ScriptedAppliance, *, clock: Clock | None = None, read_only: bool = False) -> EdgeTerminal:
    """The terminal of a scripted appliance, its clock held still and its waits short."""
    timing = Timing(clock=clock or Clock(), stale_after_s=0.05, backoff=Backoff(first_s=0.02, most_s=0.05))
    return EdgeTerminal(RuntimeClient(Address(appliance.url), read_only=read_only), read_only=read_only, timing=timing)


@asynccontextmanager
async def running(
    appliance: ScriptedAppliance, *, size: tuple[int, int] = (80, 24), read_only: bool = False
) -> AsyncGenerator[Terminal]:
    """The terminal, running and with its first figures."""
    clock = Clock()
    app = terminal_of(appliance, clock=clock, read_only=read_only)
    async with app.run_test(size=size, notifications=True) as pilot:
        terminal = Terminal(app, pilot, clock, appliance)
        await terminal.until(lambda: app.view.link == "live")
        yield terminal


def screen_text(app: App[None]) -> str:
    """What the screen shows, as lines of text."""
    rows: dict[float, str] = {}
    for x, y, text in _TEXT.findall(app.export_screenshot()):
        before = pad(rows.get(float(y), ""), round(float(x) / _COLUMN_WIDTH))
        rows[float(y)] = before + html.unescape(text).replace("\xa0", " ")
    return "\n".join(text.rstrip() for _, text in sorted(rows.items()))


class Host(App[None]):
    """A small app around one widget."""

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self._widget = widget

    @override
    def compose(self) -> ComposeResult:
        yield self._widget


async def shown(widget: Widget, *, view: View | None = None, size: tuple[int, int] = (42, 10)) -> str:
    """What a widget shows of a view, alone in a small host."""
    app = Host(widget)
    async with app.run_test(size=size) as pilot:
        if view is not None:
            setattr(widget, "view", view)  # noqa: B010  # each widget declares the reactive for itself
            await pilot.pause()
        return screen_text(app)


async def soon(condition: Callable[[], bool]) -> None:
    """Wait for something outside the app."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
