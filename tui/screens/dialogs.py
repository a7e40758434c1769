"""Questions: yes or no, one line, one of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, OptionList
from textual.widgets.option_list import Option
from typing_extensions import override

from ..css import beside

_ESCAPE: list[BindingType] = [Binding("escape", "dismiss", "Close")]


class ConfirmScreen(ModalScreen[bool]):
    """Gives True only for the named button or the key y; the other button has the focus."""

    CSS = beside(__file__)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "No"),
        Binding("y", "answer(True)", "Yes"),
        Binding("left,right", "app.focus_next", "Other button", show=False),
    ]

    def __init__(self, title: str, text: str, *, yes: str, no: str = "Keep it") -> None:
        super().__init__()
        self._title, self._text, self._yes, self._no = title, text, yes, no

    @override
    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = self._title
            yield Label(Content(self._text))
            with Horizontal(classes="buttons"):
                yield Button(f"{self._no} (n)", id="no", compact=True)
                yield Button(f"{self._yes} (y)", id="yes", compact=True)

    @on(Button.Pressed)
    def _on_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        """Answer from the keyboard."""
        self.dismiss(answer)


class AskScreen(ModalScreen[str | None]):
    """Asks for one line; gives None when it is left."""

    CSS = beside(__file__)
    BINDINGS: ClassVar[list[BindingType]] = _ESCAPE

    def __init__(self, title: str, help_text: str, *, value: str = "", placeholder: str = "", empty: bool = False):
        super().__init__()
        self._title, self._help, self._value = title, help_text, value
        self._placeholder, self._may_be_empty = placeholder, empty

    @override
    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = self._title
            box.border_subtitle = "enter accepts, esc leaves"
            line = Input(self._value, placeholder=self._placeholder, compact=True)
            line.cursor_blink = False
            yield line
            yield Label(Content(self._help), classes="hint")

    @on(Input.Submitted)
    def _on_submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        if text or self._may_be_empty:
            self.dismiss(text)


class ChooseScreen(ModalScreen[str | None]):
    """One of several; gives its key, or None when it is left."""

    CSS = beside(__file__)
    BINDINGS: ClassVar[list[BindingType]] = _ESCAPE

    def __init__(self, title: str, choices: Sequence[tuple[str, str]], *, current: str | None = None) -> None:
        super().__init__()
        self._title, self._choices, self._current = title, choices, current

    @override
    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = self._title
            box.border_subtitle = "enter accepts, esc leaves"
            yield OptionList(*(Option(Content(text)) for _, text in self._choices), compact=True)

    def on_mount(self) -> None:
        keys = [key for key, _ in self._choices]
        self.query_one(OptionList).highlighted = keys.index(self._current) if self._current in keys else 0

    @on(OptionList.OptionSelected)
    def _on_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._choices[event.option_index][0])
