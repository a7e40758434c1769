"""Talk with a model and see what it costs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.widgets import Input
from textual.worker import Worker
from typing_extensions import override

from edge.errors import EdgeError

from ..actions import bindings_for, bindings_while_writing
from ..client import RuntimeClient
from ..css import beside
from ..format import clean_line, size_text
from ..state import MODEL_MARKS, Chat, Turn, View, choose_model
from ..widgets.chat_header import ChatHeader
from ..widgets.turn_view import TurnView
from .base import EdgeScreen
from .dialogs import AskScreen, ChooseScreen

_REFRESH_S = 0.25
"""The figures above a growing answer change no oftener: faster is not read, only sent."""
MAX_TURNS = 200


class ChatScreen(EdgeScreen):
    """One conversation at a time; it lives as long as the terminal."""

    CSS = beside(__file__)
    WHERE = "chat"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings_for("chat"), *bindings_while_writing()]

    def __init__(self, client: RuntimeClient, *, clock: Callable[[], float]) -> None:
        super().__init__()
        self._client = client
        self._clock = clock
        self._chat = Chat()
        self._answering: Worker[None] | None = None

    @override
    def content(self) -> ComposeResult:
        yield ChatHeader().data_bind(EdgeScreen.view)
        yield VerticalScroll(id="turns")
        line = Input(
            placeholder="Ask, then enter. esc leaves this line.", id="question", compact=True, max_length=100_000
        )
        line.cursor_blink = False
        yield line

    def on_mount(self) -> None:
        self.query_one("#turns", VerticalScroll).anchor()
        self.action_write()

    def watch_view(self, view: View) -> None:
        """Have a model to talk with as soon as there is one."""
        if self.is_mounted:
            self._show_model(choose_model(view.models, self._chat.model))

    @property
    def is_answering(self) -> bool:
        """Whether an answer is under way."""
        return self._answering is not None and self._answering.is_running

    def talk_with(self, ref: str) -> None:
        """Go on with another model; the conversation stays."""
        self._show_model(ref)
        self.action_write()

    def _show_model(self, ref: str | None) -> None:
        self._chat.model = ref
        self.query_one(ChatHeader).model = ref

    @on(Input.Submitted, "#question")
    def action_send(self) -> None:
        """Ask what stands in the input line."""
        line = self.query_one("#question", Input)
        text = line.value.strip()
        if not text or self.is_answering:
            return
        if refusal := self._refusal():
            self.notify(refusal, severity="warning", markup=False)
            return
        line.clear()
        self._answering = self._ask(text)

    def _refusal(self) -> str:
        if self.view.read_only:
            return "This terminal is read only: a question would load models and take their time."
        if self._chat.model is None:
            return "There is no model to talk with: 2, then p pulls one."
        if len(self._chat.turns) >= MAX_TURNS:
            return "This conversation is long enough: ctrl+l begins a new one."
        return ""

    @work(group="answer")
    async def _ask(self, text: str) -> None:
        question = Turn("user", text)
        answer = Turn("assistant", model=self._chat.model or "", started_at=self._clock())
        self._chat.turns.append(question)
        messages = self._chat.messages()
        self._chat.turns.append(answer)
        shown = TurnView(answer)
        await self.query_one("#turns").mount(TurnView(question), shown)
        try:
            async with contextlib.aclosing(self._client.chat(answer.model, messages)) as deltas:
                drawn_at = self._clock()
                async for delta in deltas:
                    await shown.write(answer.add(delta, self._clock()))
                    if self._clock() - drawn_at >= _REFRESH_S:
                        drawn_at = self._clock()
                        shown.refresh_head()
        except EdgeError as e:
            answer.error = clean_line(str(e))
        except asyncio.CancelledError:
            answer.is_stopped = True
            raise
        finally:
            await shown.finish()

    def action_stop(self) -> None:
        """Stop the answer; without one leave the input line."""
        if self.is_answering and self._answering is not None:
            self._answering.cancel()
        else:
            self.query_one("#turns").focus()

    def action_write(self) -> None:
        """Back to the input line."""
        self.query_one("#question").focus()

    @work
    async def action_clear(self) -> None:
        """Forget the conversation."""
        if self.is_answering and self._answering is not None:
            self._answering.cancel()
            with contextlib.suppress(Exception):
                await self._answering.wait()
        self._chat.turns.clear()
        await self.query_one("#turns").remove_children()

    @work
    async def action_choose(self) -> None:
        """Choose the model."""
        choices = [
            (m.ref, f"{MODEL_MARKS[m.state][0]} {m.state:<9} {m.ref}  {size_text(m.size_bytes)}")
            for m in self.view.models
            if m.kind == "text"
        ]
        if not choices:
            self.notify("There is no model to talk with: 2, then p pulls one.", severity="warning")
            return
        dialog = ChooseScreen("Talk with", choices, current=self._chat.model)
        if ref := await self.ask(dialog):
            self.talk_with(ref)

    @work
    async def action_system(self) -> None:
        """Write the system prompt."""
        hint = "Stands before the conversation, from the next question on. Empty: none, or the model's own."
        dialog = AskScreen("System prompt", hint, value=self._chat.system, empty=True)
        text = await self.ask(dialog)
        if text is not None:
            self._chat.system = text
            self.query_one(ChatHeader).system = clean_line(text)
