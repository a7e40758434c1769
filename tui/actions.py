"""The one table of what an operator can do: key, action, the same on the command line. Footer, help, palette and
docs/tui.md are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual.binding import Binding

Where = Literal["everywhere", "overview", "models", "chat", "logs"]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    Attributes:
        keys: Textual's key names, comma between; the first is shown.
        action: Textual's action, found on the screen, or on the app with the prefix ``app.``.
        changes: Whether it changes the device; `--readonly` refuses those.
        twin: The same from a shell; empty where the command line has none.
        of_selection: Whether it is about what is selected on its screen, and so needs that screen to be seen first.
        while_writing: A key that does the same where letters go into an input line.
    """

    id: str
    where: Where
    keys: str
    label: str
    what: str
    action: str
    changes: bool = False
    twin: str = ""
    in_footer: bool = True
    of_selection: bool = False
    while_writing: str = ""


ACTIONS: tuple[Action, ...] = (
    Action("overview", "everywhere", "1,f1", "Overview", "Device, speed, spool, alerts",
           "app.switch_mode('overview')", twin="edge ps", in_footer=False),
    Action("models", "everywhere", "2,f2", "Models", "The store and what is loaded",
           "app.switch_mode('models')", twin="edge list", in_footer=False),
    Action("chat", "everywhere", "3,f3", "Chat", "Talk with a model",
           "app.switch_mode('chat')", twin="edge chat", in_footer=False),
    Action("logs", "everywhere", "4,f4", "Logs", "What the appliance writes down",
           "app.switch_mode('logs')", in_footer=False),
    Action("flush", "overview", "f", "Flush spool", "Send now what waits in the spool",
           "flush", changes=True, twin="edge telemetry flush"),
    Action("load", "models", "l", "Load", "Load it into memory",
           "load", changes=True, twin="edge load MODEL", of_selection=True),
    Action("unload", "models", "u", "Unload", "Give its memory back",
           "unload", changes=True, twin="edge unload MODEL", of_selection=True),
    Action("pull", "models", "p", "Pull", "Fetch a model into the store",
           "pull", changes=True, twin="edge pull SOURCE"),
    Action("delete", "models", "d,delete", "Delete", "Remove it; asks first",
           "delete", changes=True, twin="edge rm MODEL", of_selection=True),
    Action("cancel", "models", "x", "Cancel pull", "Stop a pull; asks first",
           "cancel", changes=True),
    Action("talk", "models", "c,enter", "Talk", "Talk with it",
           "talk", twin="edge chat MODEL", of_selection=True),
    Action("send", "chat", "enter", "Send", "Ask; loads the model if need be",
           "send", changes=True, twin="edge chat MODEL PROMPT", in_footer=False),
    Action("stop", "chat", "escape", "Stop", "Stop the answer; leave the line",
           "stop"),
    Action("choose", "chat", "ctrl+o", "Model", "Choose the model",
           "choose"),
    Action("system", "chat", "ctrl+t", "System prompt", "What the model is told first",
           "system"),
    Action("clear", "chat", "ctrl+l", "Clear", "Forget this conversation",
           "clear"),
    Action("write", "chat", "i", "Write", "Back to the input line",
           "write", in_footer=False),
    Action("follow", "logs", "f", "Follow", "Follow the log, or hold it still",
           "follow"),
    Action("reconnect", "everywhere", "r", "Reconnect", "Try to reach the appliance now",
           "app.reconnect", in_footer=False),
    Action("palette", "everywhere", "colon", "Commands", "Find a command by name; also ^p",
           "app.command_palette", while_writing="ctrl+p"),
    Action("help", "everywhere", "question_mark", "Help", "This list; also ^g",
           "app.help", while_writing="ctrl+g"),
    Action("quit", "everywhere", "q", "Quit", "Leave (^q); the appliance goes on",
           "app.quit", while_writing="ctrl+q"),
)  # fmt: skip

_KEY_NAMES = {"colon": ":", "question_mark": "?", "escape": "esc"}
CHANGING: frozenset[str] = frozenset(action.action for action in ACTIONS if action.changes)


def bindings_for(where: Where) -> list[Binding]:
    """Textual's bindings of one screen, or of the app."""
    return [
        Binding(
            a.keys, a.action, a.label, show=a.in_footer, tooltip=a.what, id=a.id,
        )
        for a in ACTIONS
        if a.where == where
    ]  # fmt: skip


def bindings_while_writing() -> list[Binding]:
    """For a screen with an input line: what everywhere is a letter, which the line would take."""
    # With priority, as Textual has its own ctrl+q and ctrl+p, which no footer shows.
    return [Binding(a.while_writing, a.action, a.label, priority=True) for a in ACTIONS if a.while_writing]


def key_text(action: Action) -> str:
    """Its first key as people write it."""
    first = action.keys.partition(",")[0]
    return _KEY_NAMES.get(first, first.replace("ctrl+", "^"))
