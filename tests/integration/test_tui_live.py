"""The terminal against the real appliance and a real model.

The README's picture is made here: ``EDGE_PICTURES=1 pytest tests/integration/test_tui_live.py -k picture``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from textual.events import Paste
from textual.pilot import Pilot
from typing_extensions import override

from runtime.api.schema import DeviceStatus, Job, LogLines, ModelInfo
from tests.support import DEFAULT_MODEL, RunningAppliance, free_port, run_edge, running_appliance, start_appliance, stop
from tests.tui.driving import screen_text
from tui.app import EdgeTerminal
from tui.client import Address, ChatMessage, ChatParams, RuntimeClient
from tui.widgets.model_table import ModelTable

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "tui.svg"
PARTS = ("1 Overview", "2 Models", "3 Chat", "4 Logs", "Device · edge", "Speed", "Telemetry spool", "Alerts", "● ready",
         DEFAULT_MODEL, "tok/s", "First token", "f Flush spool : Commands ? Help q Quit")  # fmt: skip
SLOW_S = 120.0


@dataclass
class Live:
    """The terminal on a real appliance."""

    app: EdgeTerminal
    pilot: Pilot[None]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(SLOW_S):
                while not condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"not in {SLOW_S:.0f} s; the screen:\n{screen_text(self.app)}")

    async def until_shown(self, *texts: str) -> None:
        """Wait until the screen shows all of these."""
        await self.until(lambda: all(text in screen_text(self.app) for text in texts))

    def model(self) -> ModelInfo:
        """The default model, as last heard."""
        return next(model for model in self.app.view.models if model.ref == DEFAULT_MODEL)

    def select(self, ref: str) -> None:
        """Put the cursor of the table of models on one."""
        table = self.app.screen.query_one(ModelTable)
        table.move_cursor(row=[model.ref for model in self.app.view.models].index(ref))


@asynccontextmanager
async def terminal(client: RuntimeClient) -> AsyncGenerator[Live]:
    app = EdgeTerminal(client)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        live = Live(app, pilot)
        await live.until(lambda: app.view.link == "live")
        yield live


async def test_load_ask_stop_and_unload(appliance: RunningAppliance) -> None:
    async with terminal(RuntimeClient(Address("http://localhost", appliance.socket, socket_only=True))) as live:
        await live.pilot.press("2")
        live.select(DEFAULT_MODEL)
        await live.pilot.press("l")
        await live.until_shown("● ready", f"{DEFAULT_MODEL} is ready.")
        await live.pilot.press("c")
        assert live.app.focused
        live.app.focused.post_message(Paste("Count from one to one hundred."))
        await live.pilot.press("enter")
        await live.until_shown("Count from one", "tok/s · first after")
        await live.pilot.press("escape")
        await live.until(lambda: " s …" not in screen_text(live.app))
        await live.pilot.press("f4")
        await live.until_shown("● following", "is ready")
        await live.until(lambda: live.model().requests_active == 0)
        await live.pilot.press("f2", "u")
        await live.until(lambda: live.model().state == "unloaded")


async def test_pull_a_file_and_delete_it(appliance: RunningAppliance, tmp_path: Path) -> None:
    shown = run_edge("show", "--json", DEFAULT_MODEL, home=appliance.home)
    weights = next(f["path"] for f in json.loads(shown.stdout)["files"] if f["name"].endswith(".gguf"))
    (tmp_path / "copy.gguf").symlink_to(weights)
    async with terminal(RuntimeClient(Address(appliance.url))) as live:
        await live.pilot.press("2", "p")
        await live.until_shown("Pull a model")
        assert live.app.focused
        live.app.focused.post_message(Paste(str(tmp_path / "copy.gguf")))
        await live.pilot.press("enter")
        await live.until_shown("● done", "copy:q4_1")
        await live.until(lambda: "copy:q4_1" in [model.ref for model in live.app.view.models])
        live.select("copy:q4_1")
        await live.pilot.press("d")
        await live.until_shown("Delete?", "copy:q4_1, 98 MB, leaves the store.")
        await live.pilot.press("y")
        await live.until_shown("copy:q4_1 is deleted.")
        await live.until(lambda: "copy:q4_1" not in [model.ref for model in live.app.view.models])


async def test_a_killed_appliance_is_marked_and_found_again(tmp_path: Path) -> None:
    with running_appliance(tmp_path / "home") as appliance:
        async with terminal(RuntimeClient(Address(appliance.url))) as live:
            appliance.process.kill()
            await live.until_shown("✖ down", "Start it with: edge serve", "old")
            again = await asyncio.to_thread(start_appliance, appliance.home, port=appliance.port)
            try:
                await live.pilot.press("r")
                await live.until_shown("● live")
            finally:
                stop(again.process)


class Renamed(RuntimeClient):
    """A client whose device goes by a name that belongs to nobody."""

    @override
    async def events(self) -> AsyncGenerator[DeviceStatus | Job | LogLines]:
        async with contextlib.aclosing(super().events()) as events:
            async for event in events:
                yield msgspec.structs.replace(event, hostname="edge-07") if isinstance(event, DeviceStatus) else event


async def ask(client: RuntimeClient, *, num_tokens: int) -> None:
    """Have one answer, to its end."""
    params = ChatParams(max_tokens=num_tokens)
    async with contextlib.aclosing(
        client.chat(DEFAULT_MODEL, [ChatMessage("user", "Tell a story.")], params)
    ) as deltas:
        async for _ in deltas:
            pass


async def keep_asking(client: RuntimeClient, *, seconds: float) -> None:
    """Keep the model at work for so long, so that the chart has a shape."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                await ask(client, num_tokens=60)
                await asyncio.sleep(1.5)


@pytest.fixture
def cut_off(tmp_path: Path) -> Generator[RunningAppliance]:
    """An appliance whose gateway does not answer: its spool holds something and an alert says so."""
    with running_appliance(tmp_path / "home", EDGE_GATEWAY_URL=f"http://127.0.0.1:{free_port()}") as running:
        yield running


async def test_the_picture_in_the_docs(cut_off: RunningAppliance) -> None:
    """The committed picture shows what the terminal shows today; its figures are of the day it was made."""
    is_new = bool(os.environ.get("EDGE_PICTURES"))
    async with RuntimeClient(Address(cut_off.url)) as asking, terminal(Renamed(Address(cut_off.url))) as live:
        await ask(asking, num_tokens=4)
        if is_new:
            await keep_asking(asking, seconds=40)
        await live.until_shown(*PARTS, "(median)", " wait", "▲ warning", "fix:")
        if is_new:
            # Without the fonts of a far host: a picture asks nobody for anything.
            svg = re.sub(r"@font-face \{.*?\}\s*", "", live.app.export_screenshot(title="edge tui"), flags=re.DOTALL)
            PICTURE.write_text(svg, "utf-8")
    picture = PICTURE.read_text("utf-8")
    shown = re.sub(r"<[^>]*>", " ", picture).replace("&#160;", " ")
    words = " ".join(shown.split())
    assert [part for part in PARTS if " ".join(part.split()) not in words] == []
    assert "url(http" not in picture
