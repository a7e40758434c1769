"""How events change what the terminal knows."""

from __future__ import annotations

import msgspec
import pytest

from edge.errors import ServerUnavailable
from runtime.api.schema import Job
from tests.tui.appliance import a_device, a_loaded_model, a_model
from tui.client import ChatDelta, ChatMessage, Usage
from tui.state import (
    HISTORY_SAMPLES,
    Chat,
    Turn,
    View,
    choose_model,
    cleaned,
    finished_jobs,
    fold_error,
    fold_job,
    fold_status,
    fold_time,
    new_lines,
    running_jobs,
)

RUNNING = Job(id="1", kind="pull", subject="x", state="running", created=1.0)
DONE = msgspec.structs.replace(RUNNING, state="done")


def test_a_view_grows_old_and_is_renewed() -> None:
    view = View()
    assert (view.link, view.age_s) == ("connecting", None)
    view = fold_status(view, a_device(), 10.0)
    assert (view.link, view.age_s) == ("live", 0.0)
    assert fold_time(view, 12.9).link == "live"
    assert fold_time(view, 13.1).link == "stale"
    lost = fold_error(view, ServerUnavailable("Nobody.", hint="Start one."), 14.0)
    assert (lost.link, lost.age_s, lost.error, lost.hint) == ("down", 4.0, "Nobody.", "Start one.")
    assert lost.status == view.status
    back = fold_status(lost, a_device(), 15.0)
    assert (back.link, back.error, back.hint) == ("live", None, "")


def test_history_is_bounded_and_shows_what_was_missed() -> None:
    view = View()
    for i in range(HISTORY_SAMPLES + 10):
        view = fold_status(view, a_device(decode_tok_s=float(i)), float(i))
    assert len(view.history) == HISTORY_SAMPLES
    late = fold_status(view, a_device(decode_tok_s=1.0), view.now + 5)
    assert late.history[-6:] == (view.history[-1], None, None, None, None, 1.0)
    assert len(fold_status(view, a_device(), view.now + 1e9).history) == HISTORY_SAMPLES


def test_a_job_changes_no_other_figures_age() -> None:
    view = fold_status(View(), a_device(), 10.0)
    view = fold_job(fold_time(view, 12.0), RUNNING)
    assert view.age_s == 2.0
    assert running_jobs(view) == [RUNNING]
    done = fold_job(view, DONE)
    assert (running_jobs(done), finished_jobs(view, done), finished_jobs(done, done)) == ([], [DONE], [])
    assert fold_job(View(), RUNNING) == View()


def test_text_from_outside_is_cleaned_at_any_depth() -> None:
    evil = "\x1b]0;owned\x07\u202e"
    device = a_device(
        hostname=evil, models=[a_model(error=evil)], jobs=[Job(id=evil, kind="", subject="", state="done")]
    )
    text = msgspec.json.encode(cleaned(device)).decode()
    assert text.count("\ufffd]0;owned\ufffd\ufffd") == 3
    assert "owned" not in text.replace("\ufffd]0;owned\ufffd\ufffd", "")
    assert cleaned(a_device()) == a_device()


def test_a_turn_counts_what_it_cost() -> None:
    turn = Turn("assistant", started_at=10.0)
    assert (turn.ttft_s, turn.rate_tok_s) == (None, None)
    assert turn.add(ChatDelta("Hel\x1blo"), 10.5) == "Hel\ufffdlo"
    assert (turn.ttft_s, turn.rate_tok_s, turn.num_tokens) == (0.5, None, 1)
    turn.add(ChatDelta(" you"), 11.0)
    assert turn.rate_tok_s == 2.0
    turn.add(ChatDelta(finish_reason="stop"), 11.1)
    turn.add(ChatDelta(usage=Usage(7, 5)), 11.1)
    assert (turn.num_tokens, turn.rate_tok_s, turn.finish_reason) == (5, 8.0, "stop")


def test_a_conversation_sends_what_has_text() -> None:
    chat = Chat(system="Be brief.", turns=[Turn("user", "Hi"), Turn("assistant", "Yes"), Turn("assistant")])
    assert chat.messages() == [
        ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Yes"),
    ]  # fmt: skip
    assert Chat().messages() == []


def test_the_model_to_talk_to() -> None:
    models = [a_model("a:1"), a_loaded_model("b:1")]
    assert choose_model(models, None) == "b:1"
    assert choose_model(models, "a:1") == "a:1"
    assert choose_model(models, "gone:1") == "b:1"
    assert choose_model([], "a:1") is None
    others = [
        a_loaded_model("0:1", kind="embeddings"),
        a_loaded_model("r:1", kind="reranking"),
        a_model("l:1", kind="adapter"),
    ]
    assert choose_model([*others, *models], "0:1") == "b:1"
    assert choose_model(others, None) is None


LogCase = tuple[list[str], list[str], tuple[bool, list[str]]]
LOG_CASES: list[LogCase] = [
    ([], ["a"], (True, ["a"])),
    (["a"], ["a"], (True, [])),
    (["a", "b"], ["a", "b", "c"], (True, ["c"])),
    (["a", "b", "c"], ["b", "c", "d"], (True, ["d"])),
    (["a", "a"], ["a", "a", "a"], (True, ["a"])),
    (["a", "b"], ["x", "y"], (False, ["x", "y"])),
    (["a"], [], (False, [])),
]


@pytest.mark.parametrize(("old", "new", "expected"), LOG_CASES)
def test_only_new_lines_of_a_log_are_added(old: list[str], new: list[str], expected: tuple[bool, list[str]]) -> None:
    assert new_lines(old, new) == expected
