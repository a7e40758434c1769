"""Each widget alone in a small host."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from textual.widgets import Markdown

from runtime.api.schema import Alert, Job, OutboxStatus
from tests.tui.appliance import NOW, a_device, a_loaded_model, a_model, an_idle_device
from tests.tui.driving import Host, screen_text, shown
from tui.client import ChatDelta, InvalidReply, Usage
from tui.state import Turn, View, fold_error, fold_status, fold_time
from tui.widgets.alerts_panel import AlertsPanel
from tui.widgets.banner import Banner
from tui.widgets.chat_header import ChatHeader
from tui.widgets.device_panel import DevicePanel
from tui.widgets.job_list import JobList
from tui.widgets.log_view import MAX_LINES, LogView
from tui.widgets.model_details import ModelDetails
from tui.widgets.model_table import ModelTable
from tui.widgets.models_panel import ModelsPanel
from tui.widgets.panel import Panel
from tui.widgets.speed_panel import SpeedPanel
from tui.widgets.spool_panel import SpoolPanel
from tui.widgets.top_bar import TopBar
from tui.widgets.turn_view import TurnView


def a_view(**changes: object) -> View:
    return fold_status(View(), a_device(**changes), 100.0)


IDLE = fold_status(View(), an_idle_device(), 100.0)
PANELS = (AlertsPanel, DevicePanel, ModelsPanel, SpeedPanel, SpoolPanel, ModelDetails)


@pytest.mark.parametrize("panel", PANELS)
async def test_a_panel_before_the_first_news_says_so(panel: type[Panel]) -> None:
    assert "Nothing heard yet." in await shown(panel(), view=View())


@pytest.mark.parametrize("panel", PANELS)
async def test_a_panel_marks_old_figures_by_word_and_shape(panel: type[Panel]) -> None:
    assert "◐ 5 s old" in await shown(panel(), view=fold_time(a_view(), 105.0))
    assert "old" not in await shown(panel(), view=fold_time(a_view(), 102.0))


async def test_device() -> None:
    text = await shown(DevicePanel(), view=a_view())
    for part in ("edge 0.1.0", "42 % of 4 cores", "3.1 of 7.7 GB", "431 MB", "52.1 °C", "12 GB free", "up 3 d 4 h"):
        assert part in text
    assert "cannot be read here" in await shown(DevicePanel(), view=IDLE)
    full = await shown(DevicePanel(), view=a_view(cpu_percent=100.0, cpu_count=16), size=(40, 8))
    assert "CPU ▲    █████████ 100 % of 16 cores │" in full
    assert "83.0 °C ▲ hot" in await shown(DevicePanel(), view=a_view(temperature_c=83.0))


async def test_speed() -> None:
    view = a_view()
    for rate in (0.0, 10.0, 38.4):
        view = fold_status(view, a_device(decode_tok_s=rate), view.now + 1)
    text = await shown(SpeedPanel(), view=view)
    for part in (
        "38.4 tok/s",
        "reads 412",
        "peak 38.4",
        "0.21 s (median)",
        "2 running · 1 waiting",
        "1,204 · 3 failed",
    ):
        assert part in text
    assert "█" in text
    assert "no request yet" in await shown(SpeedPanel(), view=IDLE)


async def test_models_shows_the_troubled_first_and_counts_the_rest() -> None:
    models = [*(a_model(f"m:{i}") for i in range(9)), a_loaded_model("busy:1"), a_model("bad:1", state="failed")]
    text = await shown(ModelsPanel(), view=a_view(models=models), size=(80, 8))
    assert text.index("✖ failed") < text.index("● ready") < text.index("○ unloaded")
    assert "and 7 more (key 2)" in text
    assert "38.4    2+1  15 %" in text
    assert "No model in the store." in await shown(ModelsPanel(), view=a_view(models=[]))


async def test_spool() -> None:
    text = await shown(SpoolPanel(), view=a_view())
    for part in ("▲ 37 wait, next try in 12 s", "412 kB of 67 MB", "3 min, last sent 3 min ago", "connection refused"):
        assert part in text
    assert "○ off  nothing leaves this device" in await shown(SpoolPanel(), view=IDLE)
    sent = OutboxStatus(enabled=True, sent_batches=3, dropped_rows=2, quarantined_rows=1)
    text = await shown(SpoolPanel(), view=a_view(outbox=sent))
    assert "● everything sent" in text
    assert "3 ▲ 2 dropped, 1 refused" in text


async def test_alerts_show_the_worst_first_with_its_fix() -> None:
    assert "● nothing is wrong" in await shown(AlertsPanel(), view=IDLE)
    alerts = [
        Alert(level=level, what=f"{level} thing", fix="edge rm NAME") for level in ("info", "warning", "critical")
    ]
    text = await shown(AlertsPanel(), view=a_view(alerts=alerts), size=(42, 6))
    assert text.index("✖ critical") < text.index("fix: edge rm NAME") < text.index("and 2 more")
    long = Alert(level="warning", what="one two three four five six seven eight nine ten " * 3, fix="do it")
    text = await shown(AlertsPanel(), view=a_view(alerts=[long]), size=(42, 8))
    assert "▲ warning one two three four five six  │" in text
    assert "…" in text
    text = await shown(AlertsPanel(), view=a_view(alerts=alerts), size=(42, 8))
    assert text.index("✖ critical") < text.index("▲ warning") < text.index("· info")


async def test_a_restart_is_a_warning_everywhere() -> None:
    view = a_view(models=[a_loaded_model(num_restarts=1)], alerts=[])
    text = await shown(AlertsPanel(), view=view, size=(60, 6))
    assert "▲ warning the engine of smollm2:135m-instruct: 1 restart" in text
    assert "edge-07 ▲1 ● live" in await shown(TopBar("models"), view=view, size=(80, 3))
    for widget in (ModelsPanel(), ModelTable()):
        assert "● ready ▲1 " in await shown(widget, view=view, size=(80, 8))
    details = ModelDetails()
    details.ref = "smollm2:135m-instruct"
    assert "▲ 1 restart, ready for 12 min · 2 running" in await shown(details, view=view, size=(80, 8))


async def test_markup_in_foreign_text_is_text() -> None:
    alert = Alert(level="warning", what="[red]x[/red] [@click=app.quit]q[/]", fix="")
    assert "[red]x[/red]" in await shown(AlertsPanel(), view=a_view(alerts=[alert]))
    assert "[b]m[/b]:1" in await shown(ModelsPanel(), view=a_view(models=[a_model("[b]m[/b]:1")]), size=(80, 8))
    assert "[b]m[/b]:1" in await shown(ModelTable(), view=a_view(models=[a_model("[b]m[/b]:1")]), size=(80, 8))


async def test_top_bar() -> None:
    live = await shown(TopBar("models"), view=a_view(), size=(80, 3))
    assert "2 Models" in live
    assert live.splitlines()[0].rstrip().endswith("edge-07 ▲1 ● live")
    assert "◐ stale 7 s" in await shown(TopBar("chat"), view=fold_time(a_view(), 107.0), size=(80, 3))
    assert "◌ connecting" in await shown(TopBar("chat"), view=View(), size=(80, 3))
    assert "read-only" in await shown(TopBar("chat"), view=View(read_only=True), size=(80, 3))


async def test_banner_only_while_down() -> None:
    error = InvalidReply("It speaks another language.", hint="Compare versions.")
    down = await shown(Banner(), view=fold_error(View(), error, 1.0), size=(80, 4))
    assert "✖ It speaks another language." in down
    assert "Compare versions. Tries again by itself; r tries now." in down
    assert (await shown(Banner(), view=a_view(), size=(80, 4))).strip() == ""


async def test_the_tables_cursor_stays_on_its_model() -> None:
    table = ModelTable()
    app = Host(table)
    async with app.run_test(size=(80, 10)) as pilot:
        table.view = a_view(models=[a_model("a:1"), a_model("b:1")])
        await pilot.press("down")
        assert table.selected == "b:1"
        table.view = a_view(models=[a_model("a:1"), a_model("aa:1"), a_model("b:1", state="loading")])
        await pilot.pause()
        assert table.selected == "b:1"
        assert "◐ loading" in screen_text(app)
        await pilot.resize_terminal(140, 10)
        await pilot.pause()
        assert table.selected == "b:1"
        table.view = a_view(models=[])
        await pilot.pause()
        assert table.selected is None


async def test_model_details() -> None:
    details = ModelDetails()
    details.ref = "smollm2:135m-instruct"
    text = await shown(details, view=a_view(), size=(80, 8))
    for part in ("sha256:3f3f", "llama · 8,192 tokens of context · apache-2.0", "KV 1,204/8,192", "ready for 12 min"):
        assert part in text
    details = ModelDetails()
    details.ref = "bad:1"
    failed = a_view(models=[a_model("bad:1", state="failed", error="It is cut short.")])
    assert "✖ It is cut short." in await shown(details, view=failed, size=(80, 8))


async def test_jobs() -> None:
    job = Job(id="1", kind="pull", subject="hf://org/repo/m.gguf", state="running", done_bytes=42_000_000,
              total_bytes=98_000_000, rate_bytes_s=7e6, created=NOW)  # fmt: skip
    text = await shown(JobList(), view=a_view(jobs=[job]), size=(80, 6))
    for part in ("↓ running", "hf://org/", "43% of 98 MB", "7.0 MB/s", "8 s left"):
        assert part in text
    unknown = msgspec.structs.replace(job, total_bytes=None)
    assert "42 MB  7.0 MB/s" in await shown(JobList(), view=a_view(jobs=[unknown]), size=(80, 6))
    failed = msgspec.structs.replace(job, state="failed", error="no route")
    assert "✖ failed    hf://org/repo/m.gguf: no route" in await shown(
        JobList(), view=a_view(jobs=[failed]), size=(80, 6)
    )
    assert (await shown(JobList(), view=a_view(), size=(80, 6))).strip() == ""


async def test_the_reason_of_a_failed_pull_can_be_read() -> None:
    reason = (
        "The model hub cannot be reached for hf://org/repo/m.gguf: huggingface.co: Name or service not known. "
        "Without a hub in reach: edge pull smollm2:135m-instruct, or a file's path."
    )
    jobs = [
        Job(id=str(i), kind="pull", subject="hf://org/repo/m.gguf", state="failed", error=reason, created=NOW + i)
        for i in range(2)
    ]
    text = await shown(JobList(), view=a_view(jobs=jobs), size=(80, 12))
    told = " ".join(text.replace("│", " ").split())
    assert f"hf://org/repo/m.gguf: {reason}" in told
    assert text.count("✖ failed") == 2


async def test_the_log_adds_only_what_is_new_and_is_bounded() -> None:
    log = LogView()
    app = Host(log)
    async with app.run_test(size=(60, 10)) as pilot:
        log.follow(["INFO one", "ERROR two \x1b[2J"])
        log.follow(["INFO one", "ERROR two \x1b[2J", "INFO [bold]three[/bold]"])
        await pilot.pause()
        assert log.num_lines == 3
        assert "ERROR two \ufffd[2J" in screen_text(app)
        assert "[bold]three[/bold]" in screen_text(app)
        log.follow(["INFO rotated"])
        await pilot.pause()
        assert log.num_lines == 1
        log.follow([f"line {i}" for i in range(3 * MAX_LINES)])
        assert log.num_lines <= MAX_LINES


async def test_an_answer_grows_and_tells_its_cost() -> None:
    turn = Turn("assistant", model="m:1", started_at=1.0)
    view = TurnView(turn)
    app = Host(view)
    async with app.run_test(size=(80, 12)) as pilot:
        assert "… reading the question" in screen_text(app)
        for i, text in enumerate(["It is ", "**bold**", " and [not](http://a.b) markup: [red]x[/red]"]):
            await view.write(turn.add(ChatDelta(text), 2.0 + i))
        turn.add(ChatDelta(finish_reason="length", usage=Usage(5, 3)), 4.0)
        await view.finish()
        await view.finish()
        await pilot.pause()
        text = screen_text(app)
        assert "3 tokens · 1.0 tok/s · first after 1.00 s  ▲ cut at the token limit" in text
        assert "It is bold and not markup: [red]x[/red]" in text
        assert app.query_one(Markdown).source.startswith("It is **bold**")


@pytest.mark.parametrize("num_turns", range(1, 6))
async def test_an_answer_that_is_stopped_as_it_ends_has_ended(num_turns: int) -> None:
    turn = Turn("assistant", model="m:1", started_at=1.0)
    view = TurnView(turn)
    async with Host(view).run_test(size=(80, 12)) as pilot:
        await view.write(turn.add(ChatDelta("Yes."), 2.0))
        turn.add(ChatDelta(finish_reason="stop", usage=Usage(5, 1)), 2.0)
        finishing = asyncio.ensure_future(view.finish())
        for _ in range(num_turns):  # of the event loop, until it is in the midst of drawing
            await asyncio.sleep(0)
        finishing.cancel()
        await asyncio.wait([finishing])
        await pilot.pause()
        text = screen_text(pilot.app)
    assert "1 token" in text
    assert "…" not in text


async def test_a_question_is_shown_as_it_was_written() -> None:
    assert "**not bold** [b]x[/b]" in await shown(TurnView(Turn("user", "**not bold** [b]x[/b]")), size=(60, 6))


async def test_a_failed_answer_says_why() -> None:
    turn = Turn("assistant", model="m:1", error="The engine ended.")
    assert "✖ The engine ended." in await shown(TurnView(turn), size=(60, 6))
    turn = Turn("assistant", model="m:1", is_stopped=True)
    assert "m:1  ○ stopped" in await shown(TurnView(turn), size=(60, 6))


async def test_chat_header() -> None:
    header = ChatHeader()
    header.model = "stories:15m"
    text = await shown(header, view=a_view(), size=(80, 3))
    assert "stories:15m  ○ unloaded (loads with the first question)" in text
    header = ChatHeader()
    header.model = "smollm2:135m-instruct"
    header.system = "Answer in one word, always, and never in two."
    text = await shown(header, view=a_view(), size=(80, 3))
    assert "● ready  38.4 tok/s now  system: Answer in" in text
    assert "No model to talk with" in await shown(ChatHeader(), view=a_view(models=[]), size=(80, 3))
