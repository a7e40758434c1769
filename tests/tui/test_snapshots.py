"""How each screen looks. Renew with ``pytest --snapshot-update`` and look at the pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import msgspec
import pytest
from textual.pilot import Pilot

from runtime.api.schema import Alert, Job
from tests.tui.appliance import NOW, ScriptedAppliance, a_device, a_model, an_idle_device
from tests.tui.driving import Clock, screen_text, terminal_of
from tui.app import EdgeTerminal, Timing
from tui.client import Address, RuntimeClient
from tui.feed import Backoff

NUM_SAMPLES = 80
PULL = Job(
    id="1", kind="pull", subject="hf://org/repo/model-q4_0.gguf", state="running", done_bytes=42_000_000,
    total_bytes=98_000_000, rate_bytes_s=12.3e6, created=NOW,
)  # fmt: skip
BUSY = a_device(
    jobs=[PULL],
    models=[
        *a_device().models,
        a_model(
            "broken:1b", state="failed", error="The file is cut short: tensor blk.3 ends past the end of the file."
        ),
        a_model("qwen3-with-a-very-long-name:0.6b-instruct-q4_k_m", num_parameters=600_000_000),
    ],
    alerts=[
        *a_device().alerts,
        Alert(level="critical", what="The model broken:1b failed.", fix="edge verify broken:1b"),
    ],
)


class SnapCompare(Protocol):
    """The fixture of pytest-textual-snapshot."""

    def __call__(
        self,
        app: EdgeTerminal,
        press: tuple[str, ...] = (),
        terminal_size: tuple[int, int] = (80, 24),
        run_before: Callable[[Pilot[None]], Awaitable[None]] | None = None,
    ) -> bool: ...


async def wait(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, screen_text(pilot.app)
        await pilot.pause(0.01)
    await pilot.pause()


def steps(
    appliance: ScriptedAppliance, *keys: str, until: str, num_samples: int = NUM_SAMPLES
) -> Callable[[Pilot[None]], Awaitable[None]]:
    """Feed a history, press keys, and wait for a text."""

    async def run(pilot: Pilot[None]) -> None:
        app = pilot.app
        assert isinstance(app, EdgeTerminal)
        await wait(pilot, lambda: app.view.link == "live")
        for i in range(num_samples):
            appliance.tell(msgspec.structs.replace(appliance.status, decode_tok_s=19 + 19 * math.sin(i / 9)))
        await wait(pilot, lambda: len(app.view.history) == num_samples + 1)
        for key in keys:
            await pilot.press(key)
        await wait(pilot, lambda: until in screen_text(app))

    return run


@pytest.mark.parametrize("size", [(80, 24), (140, 40)], ids=["80x24", "140x40"])
def test_overview(snap_compare: SnapCompare, scripted: ScriptedAppliance, size: tuple[int, int]) -> None:
    scripted.status = BUSY
    assert snap_compare(terminal_of(scripted), terminal_size=size, run_before=steps(scripted, until="● ready"))


def test_overview_idle(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    scripted.status = an_idle_device()
    run = steps(scripted, until="○ unloaded", num_samples=0)
    assert snap_compare(terminal_of(scripted), run_before=run)


def test_overview_in_16_colours(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    scripted.status = BUSY
    app = terminal_of(scripted)
    app.theme = "edge-16"
    assert snap_compare(app, run_before=steps(scripted, until="● ready"))


def test_models(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    scripted.status = BUSY
    run = steps(scripted, "2", "down", "down", until="✖ The file is cut short")
    assert snap_compare(terminal_of(scripted), run_before=run)


def test_models_read_only(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    run = steps(scripted, "2", until="read-only")
    assert snap_compare(terminal_of(scripted, read_only=True), run_before=run)


def test_delete_asks(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    assert snap_compare(terminal_of(scripted), run_before=steps(scripted, "2", "d", until="Delete?"))


def test_pull_asks(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    assert snap_compare(terminal_of(scripted), run_before=steps(scripted, "2", "p", until="From the web"))


def test_chat(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    scripted.answer = [
        "I run **on this device**:\n\n",
        "- no cloud\n- no key\n\n",
        "```sh\nedge chat\n```\n",
        "Ask on.",
    ]
    run = steps(scripted, "3", *"Hi!", "enter", until="Ask on.")
    assert snap_compare(terminal_of(scripted), run_before=run)


def test_logs(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    levels = ("INFO", "INFO", "WARNING", "DEBUG", "ERROR")
    scripted.log_lines = [f"2026-10-01T12:00:{i:02d}Z {levels[i % 5]:<7} edge.pool: line {i}" for i in range(40)]
    assert snap_compare(terminal_of(scripted), run_before=steps(scripted, "4", until="line 39"))


def test_help(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    run = steps(scripted, "2", "question_mark", until="edge rm MODEL")
    assert snap_compare(terminal_of(scripted), run_before=run)


def test_palette(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    run = steps(scripted, "colon", until="Talk with a model")
    assert snap_compare(terminal_of(scripted), run_before=run)


def test_down_with_old_figures(snap_compare: SnapCompare, scripted: ScriptedAppliance) -> None:
    clock = Clock()
    timing = Timing(clock=clock, stale_after_s=0.05, backoff=Backoff(first_s=600, most_s=600))
    app = EdgeTerminal(RuntimeClient(Address(scripted.url)), timing=timing)

    async def run(pilot: Pilot[None]) -> None:
        await steps(scripted, until="● ready")(pilot)
        scripted.stop()
        clock.now += 7
        await wait(pilot, lambda: "7 s old" in screen_text(app) and app.view.link == "down")
        # The port is another in each run.
        error = "No appliance answers at http://127.0.0.1:8080."
        app.view = replace(app.view, error=error, hint="Start it with: edge serve")
        await pilot.pause()

    assert snap_compare(app, run_before=run)


def test_nobody_there(snap_compare: SnapCompare) -> None:
    # Port 9 is discard (RFC 863): nobody answers there, and its number is the same in each run.
    timing = Timing(clock=Clock(), backoff=Backoff(first_s=600, most_s=600))
    app = EdgeTerminal(RuntimeClient(Address("http://127.0.0.1:9")), timing=timing)

    async def run(pilot: Pilot[None]) -> None:
        await wait(pilot, lambda: "No appliance answers" in screen_text(app))

    assert snap_compare(app, run_before=run)
