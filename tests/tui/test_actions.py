"""The table of actions: whole, without contradiction, and the same in the docs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edge.cli.main import COMMANDS
from tui.actions import ACTIONS, Action, Where, key_text
from tui.app import EdgeTerminal
from tui.screens.base import EdgeScreen
from tui.screens.chat import ChatScreen
from tui.screens.logs import LogsScreen
from tui.screens.models import ModelsScreen
from tui.screens.overview import OverviewScreen

SCREENS: dict[Where, type[EdgeScreen] | type[EdgeTerminal]] = {
    "everywhere": EdgeTerminal, "overview": OverviewScreen, "models": ModelsScreen, "chat": ChatScreen,
    "logs": LogsScreen,
}  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs" / "tui.md"


def by_id(action: Action) -> str:
    return action.id


def test_ids_are_unique_and_no_screen_has_a_key_twice() -> None:
    assert len({action.id for action in ACTIONS}) == len(ACTIONS)
    for where in SCREENS:
        keys = Counter(key for a in ACTIONS if a.where in ("everywhere", where) for key in a.keys.split(","))
        assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize("action", ACTIONS, ids=by_id)
def test_every_action_is_there(action: Action) -> None:
    name = action.action.partition("(")[0]
    owner = EdgeTerminal if name.startswith("app.") else SCREENS[action.where]
    assert callable(getattr(owner, f"action_{name.removeprefix('app.')}"))


@pytest.mark.parametrize("action", [a for a in ACTIONS if a.twin], ids=by_id)
def test_every_twin_is_a_command(action: Action) -> None:
    program, command, *_ = action.twin.split()
    assert program == "edge"
    assert command in COMMANDS


@pytest.mark.parametrize("action", ACTIONS, ids=by_id)
def test_the_docs_have_every_action(action: Action) -> None:
    changes = "yes" if action.changes else ""
    twin = f"`{action.twin}`" if action.twin else ""
    row = f"| {action.where} | `{key_text(action)}` | {action.label} | {action.what} | {changes} | {twin} |"
    assert row in DOCS.read_text("utf-8").splitlines()
