"""The whole terminal against a scripted appliance over real HTTP."""

from __future__ import annotations

import msgspec
from textual.widgets import Input

from runtime.api.schema import Job, PullRequest
from tests.tui.appliance import Refusal, ScriptedAppliance, a_device, a_loaded_model, a_model, an_idle_device
from tests.tui.driving import Clock, running, screen_text, soon, terminal_of
from tui.actions import ACTIONS
from tui.screens.dialogs import AskScreen, ChooseScreen, ConfirmScreen
from tui.screens.logs import LogsScreen

PULL = Job(id="job-1", kind="pull", subject="hf://o/r/m.gguf", state="running", total_bytes=98_000_000, created=1.0)


async def test_overview_shows_the_device_and_follows_it(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.until_shown("Device · edge 0.1.0", "42 % of 4 cores", "● ready", "▲ 37 wait", "● live", "fix:")
        scripted.tell(a_device(cpu_percent=97.0))
        await terminal.until_shown("97 % of 4 cores")


async def test_an_idle_terminal_asks_for_nothing(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        for i in range(20):
            scripted.tell(a_device(cpu_percent=float(i)))
        await terminal.until_shown("19 % of 4 cores")
    assert scripted.asked == ["/edge/v1/events"]


async def test_old_figures_are_marked_within_their_time(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        terminal.clock.now += 5
        await terminal.until_shown("◐ stale 5 s", "◐ 5 s old")
        scripted.tell(a_device())
        await terminal.until_shown("● live")
        assert "old" not in screen_text(terminal.app)


async def test_a_dead_appliance_is_a_state_and_it_comes_back(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        scripted.stop()
        await terminal.until_shown("✖ down", f"No appliance answers at {scripted.url}", "Start it with: edge serve")
        await terminal.until_shown("42 % of 4 cores")
        scripted.start()
        await terminal.until_shown("● live")
        assert "No appliance" not in screen_text(terminal.app)


async def test_it_opens_without_an_appliance(scripted: ScriptedAppliance) -> None:
    scripted.stop()
    app = terminal_of(scripted)
    async with app.run_test(size=(80, 24)) as pilot:
        while app.view.link != "down":
            await pilot.pause(0.01)
        await pilot.pause()
        assert "✖ No appliance answers at" in screen_text(app)
        assert "Nothing heard yet." in screen_text(app)
        for key in ("2", "3", "escape", "4", "1", "r"):
            await pilot.press(key)
        await pilot.press("2", "l", "d", "u", "c", "x")
        await pilot.pause()
        assert app.is_running


async def test_reconnect_does_not_wait(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        scripted.stop()
        await terminal.until_shown("✖ down")
        scripted.start()
        await terminal.press("r")
        await terminal.until_shown("● live")


async def test_load_and_unload(scripted: ScriptedAppliance) -> None:
    scripted.status = an_idle_device()
    async with running(scripted) as terminal:
        await terminal.press("2", "l")
        await terminal.until_shown("● ready", "smollm2:135m-instruct is ready.")
        await terminal.press("u")
        await terminal.until_shown("○ unloaded")
    assert scripted.calls == [
        ("models/load", "smollm2:135m-instruct"), ("models/unload", "smollm2:135m-instruct"),
    ]  # fmt: skip


async def test_unloading_a_busy_model_asks(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("2", "u")
        await terminal.until_shown("Unload?", "is working on 3 requests")
        await terminal.press("n")
        await terminal.until(lambda: not isinstance(terminal.app.screen, ConfirmScreen))
        assert scripted.calls == []
        await terminal.press("u")
        await terminal.until_shown("Unload?")
        await terminal.press("y")
        await soon(lambda: scripted.calls == [("models/unload", "smollm2:135m-instruct")])


async def test_delete_asks_and_enter_alone_keeps(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("2", "down", "d")
        await terminal.until_shown("Delete?", "stories:15m, 17 MB, leaves the store.")
        await terminal.press("enter")
        await terminal.until(lambda: not isinstance(terminal.app.screen, ConfirmScreen))
        await terminal.press("d")
        await terminal.until_shown("Delete?")
        assert scripted.calls == []
        await terminal.press("tab", "enter")
        await terminal.until_shown("stories:15m is deleted.")
        await terminal.until(lambda: [m.ref for m in terminal.app.view.models] == ["smollm2:135m-instruct"])


async def test_pull_progress_and_cancel(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("2", "p")
        await terminal.until_shown("Pull a model", "hf://ORG/REPO/FILE.gguf")
        await terminal.type("hf://o/r/m.gguf")
        await terminal.press("enter")
        await terminal.until_shown("↓ running", "hf://o/r/m.gguf", "0% of 98 MB")
        assert scripted.calls == [("models/pull", PullRequest(source="hf://o/r/m.gguf"))]
        scripted.tell(msgspec.structs.replace(PULL, done_bytes=49_000_000, rate_bytes_s=7e6))
        await terminal.until_shown("50% of 98 MB", "7.0 MB/s", "7 s left")
        await terminal.press("x")
        await terminal.until_shown("Cancel the pull?")
        await terminal.press("y")
        await terminal.until_shown("○ cancelled")
    assert scripted.calls[-1] == ("jobs/cancel", "job-1")


async def test_a_pull_tells_its_end_on_every_screen(scripted: ScriptedAppliance) -> None:
    scripted.status = a_device(jobs=[PULL])
    async with running(scripted) as terminal:
        await terminal.press("4")
        scripted.tell(msgspec.structs.replace(PULL, state="failed", error="No space is left."))
        await terminal.until_shown("pull: failed", "No space is left.")


async def test_with_several_pulls_cancel_asks_which(scripted: ScriptedAppliance) -> None:
    scripted.status = a_device(jobs=[PULL, msgspec.structs.replace(PULL, id="job-2", subject="second", created=2.0)])
    async with running(scripted) as terminal:
        await terminal.press("2", "x")
        await terminal.until(lambda: isinstance(terminal.app.screen, ChooseScreen))
        await terminal.press("down", "enter")
        await terminal.until_shown("Cancel the pull?", "hf://o/r/m.gguf")
        await terminal.press("y")
        await soon(lambda: scripted.calls == [("jobs/cancel", "job-1")])


async def test_leaving_a_dialog_does_nothing(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("2", "p")
        await terminal.until(lambda: isinstance(terminal.app.screen, AskScreen))
        await terminal.press("enter", "escape")
        await terminal.until(lambda: not isinstance(terminal.app.screen, AskScreen))
        await terminal.press("x")
        await terminal.until_shown("Nothing is being pulled.")
    assert scripted.calls == []


async def test_a_refusal_is_told_with_its_hint(scripted: ScriptedAppliance) -> None:
    scripted.refusals["models/load"] = Refusal(507, "does_not_fit", "It needs 9 GB.", "What would fit: Q4_0.")
    async with running(scripted) as terminal:
        await terminal.press("2", "l")
        await terminal.until_shown("It needs 9 GB.", "What would fit: Q4_0.")


async def test_flush(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("f")
        await terminal.until_shown("● everything sent")
    assert scripted.calls == [("telemetry/flush", None)]


async def test_chat_streams_and_tells_its_cost(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("3")
        await terminal.type("Who are you?")
        await terminal.press("enter")
        await terminal.until_shown("You", "Who are you?", "Hello from the edge.", "5 tokens")
        await terminal.type("Again")
        await terminal.press("enter")
        await soon(lambda: len(scripted.calls) == 2)
        body = scripted.calls[1][1]
        assert isinstance(body, dict)
        assert body["messages"] == [
            {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Hello from the **edge**."},
            {"role": "user", "content": "Again"},
        ]  # fmt: skip


async def test_chat_stop_keeps_what_came_and_hangs_up(scripted: ScriptedAppliance) -> None:
    scripted.hold_after = 2
    async with running(scripted) as terminal:
        await terminal.press("3", "H", "i", "enter")
        await terminal.until_shown("Hello from")
        await terminal.press("escape")
        await terminal.until_shown("Hello from", "○ stopped")
        await soon(lambda: scripted.num_streams_cut == 1)


async def test_chat_goes_on_while_another_screen_is_seen(scripted: ScriptedAppliance) -> None:
    scripted.hold_after = 2
    async with running(scripted) as terminal:
        await terminal.press("3", "H", "i", "enter")
        await terminal.until_shown("Hello from")
        await terminal.press("f1")
        await terminal.until_shown("Telemetry spool")
        scripted.release()
        await terminal.press("f3")
        await terminal.until_shown("Hello from the edge.")


async def test_chat_clear_in_the_middle_of_an_answer(scripted: ScriptedAppliance) -> None:
    scripted.hold_after = 1
    async with running(scripted) as terminal:
        await terminal.press("3", "H", "i", "enter")
        await terminal.until_shown("Hello")
        await terminal.press("ctrl+l")
        await terminal.until(lambda: "Hello" not in screen_text(terminal.app))
        scripted.hold_after = None
        await terminal.press("Y", "o", "enter")
        await terminal.until_shown("Hello from the edge.")
        body = scripted.calls[-1][1]
        assert isinstance(body, dict)
        assert body["messages"] == [{"role": "user", "content": "Yo"}]


async def test_chat_error_says_why_and_the_next_question_works(scripted: ScriptedAppliance) -> None:
    scripted.answer_end = b'event: error\ndata: {"error":{"message":"The engine ended.","code":"worker_died"}}\n\n'
    async with running(scripted) as terminal:
        await terminal.press("3", "H", "i", "enter")
        await terminal.until_shown("✖ The engine ended.")
        scripted.answer_end = b"data: [DONE]\n\n"
        await terminal.press("Y", "o", "enter")
        await terminal.until(lambda: screen_text(terminal.app).count("Hello from the edge.") == 2)


async def test_chat_system_prompt_and_model(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("3", "ctrl+t")
        await terminal.until_shown("System prompt")
        await terminal.type("Be brief.")
        await terminal.press("enter")
        await terminal.until_shown("system: Be brief.")
        await terminal.press("ctrl+o")
        await terminal.until_shown("Talk with", "○ unloaded")
        await terminal.press("down", "enter")
        await terminal.until_shown("stories:15m  ○ unloaded (loads with the first question)")
        await terminal.press("H", "i", "enter")
        await soon(lambda: bool(scripted.calls))
    body = scripted.calls[0][1]
    assert isinstance(body, dict)
    assert body["model"] == "stories:15m"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


async def test_talk_from_the_models_table(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("2", "down", "enter")
        await terminal.until_shown("stories:15m  ○ unloaded")
        assert isinstance(terminal.app.focused, Input)


async def test_nobody_talks_with_a_model_that_makes_no_text(scripted: ScriptedAppliance) -> None:
    others = {"a:1": "embeddings", "b:1": "reranking", "c:1": "adapter"}
    says = ("a:1 makes embeddings, not text: /v1/embeddings.", "b:1 makes scores", "c:1 is an adapter")
    models = [a_loaded_model(ref, kind=kind) for ref, kind in others.items()]
    scripted.status = a_device(models=[*models, a_model("text:1")])
    async with running(scripted) as terminal:
        await terminal.until_shown("a:1 embeddings", "b:1 reranking", "c:1 adapter")
        await terminal.press("2")
        for told in says:
            await terminal.press("enter")
            await terminal.until_shown(told)
            await terminal.press("down")
        await terminal.press("3")
        await terminal.until_shown("text:1  ○ unloaded")
        await terminal.press("ctrl+o")
        await terminal.until_shown("Talk with")
        assert "● ready" not in screen_text(terminal.app), "the others are"
        await terminal.press("escape")
        scripted.tell(a_device(models=models))
        await terminal.until_shown("No model to talk with")


async def test_what_a_terminal_obeys_never_reaches_it(scripted: ScriptedAppliance) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold]\u202e"
    scripted.answer = [evil, "\x9b31m"]
    scripted.log_lines = [evil]
    scripted.status = a_device(hostname=evil, models=[a_loaded_model(evil)])
    async with running(scripted) as terminal:
        for keys in (("1",), ("2",), ("3", "H", "i", "enter"), ("escape", "4")):
            await terminal.press(*keys)
            await terminal.until_shown("owned")
            assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(screen_text(terminal.app))


async def test_logs_follow_and_hold_still(scripted: ScriptedAppliance) -> None:
    scripted.log_lines = [f"INFO line {i}" for i in range(100)]
    async with running(scripted) as terminal:
        await terminal.press("4")
        await terminal.until_shown("● following", "100 lines", "INFO line 99")
        scripted.log_lines.append("ERROR the newest")
        scripted.tell(a_device(time=1.0))
        terminal.clock.now += 1
        scripted.tell(a_device(time=2.0))
        await terminal.until_shown("ERROR the newest")
        await terminal.press("f")
        await terminal.until_shown("○ held still")
        num_asked = scripted.asked.count("/edge/v1/logs")
        terminal.clock.now += 1
        scripted.tell(a_device(time=3.0, cpu_percent=1.0))
        await terminal.press("1")
        await terminal.until_shown("1 % of 4 cores")
        assert scripted.asked.count("/edge/v1/logs") == num_asked
        await terminal.press("4", "f")
        await terminal.until_shown("● following")


async def test_read_only_changes_nothing_whatever_is_pressed(scripted: ScriptedAppliance) -> None:
    scripted.status = a_device(jobs=[PULL])
    async with running(scripted, read_only=True) as terminal:
        await terminal.until_shown("read-only")
        for where in ("1", "2", "4"):
            await terminal.press(where)
            for action in ACTIONS:
                if action.changes and action.where in ("overview", "models"):
                    await terminal.press(action.keys.split(",")[0])
            await terminal.pilot.pause()
            assert not isinstance(terminal.app.screen, ConfirmScreen | AskScreen)
        await terminal.press("3", "H", "i", "enter")
        await terminal.until_shown("This terminal is read only")
    assert scripted.calls == []


async def test_help_lists_every_key_and_closes(scripted: ScriptedAppliance) -> None:
    async with running(scripted, size=(100, 60)) as terminal:
        await terminal.press("question_mark")
        await terminal.until_shown(*(action.what for action in ACTIONS), "edge telemetry flush")
        await terminal.press("question_mark")
        await terminal.until(lambda: "Keys" not in screen_text(terminal.app))


async def test_the_palette_runs_an_action(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("colon")
        await terminal.until_shown("Talk with a model")
        await terminal.type("models")
        await terminal.until(lambda: "Talk with a model" not in screen_text(terminal.app))
        await terminal.press("enter")
        await terminal.until_shown("Selected")


async def test_the_palette_finds_what_another_screen_does(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("colon")
        await terminal.type("Pull")
        await terminal.until_shown("Pull (models)")
        await terminal.press("enter")
        await terminal.until_shown("Pull a model", "Selected")
        await terminal.press("escape", "3", "ctrl+p")
        await terminal.type("Unload")
        await terminal.until_shown("Unload (models)")
        await terminal.press("enter")
        await terminal.until_shown("Choose one, then u: Unload.", "Selected")
    assert scripted.calls == []


async def test_help_and_quit_are_in_reach_while_writing(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("3")
        await terminal.until_shown("^p Commands", "^g Help", "^q Quit")
        await terminal.press("ctrl+g")
        await terminal.until_shown("Keys", "esc closes")
        await terminal.press("escape", "f1")
        await terminal.until_shown("? Help", "q Quit")
        await terminal.press("f3", "ctrl+q")
        await terminal.until(lambda: not terminal.app.is_running)


async def test_it_follows_the_size_of_the_terminal(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        for size in ((40, 10), (20, 5), (200, 60), (80, 24)):
            await terminal.pilot.resize_terminal(*size)
            for key in ("2", "f3", "f4", "1"):
                await terminal.press(key)
        await terminal.until_shown("● ready")


async def test_deleting_the_model_one_talks_with_chooses_another(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("3")
        await terminal.until_shown("smollm2:135m-instruct  ● ready")
        scripted.tell(a_device(models=[a_model("other:1")]))
        await terminal.until_shown("other:1  ○ unloaded")


async def test_the_log_is_not_read_twice_at_once(scripted: ScriptedAppliance) -> None:
    async with running(scripted) as terminal:
        await terminal.press("4")
        assert isinstance(terminal.app.screen, LogsScreen)
        for i in range(30):
            terminal.clock.now += 1
            scripted.tell(a_device(cpu_percent=float(i)))
        await terminal.until(lambda: terminal.app.view.status == a_device(cpu_percent=29.0))
        assert scripted.asked.count("/edge/v1/logs") <= 31


def test_the_clock_of_the_tests_stands_still() -> None:
    assert Clock()() == Clock()()
