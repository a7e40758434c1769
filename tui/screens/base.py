"""What the four main screens share: the view coming down, the frame around the content, and `--readonly`."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.reactive import reactive
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer
from typing_extensions import override

from ..actions import CHANGING, Where
from ..state import View
from ..widgets.banner import Banner
from ..widgets.top_bar import TopBar

T = TypeVar("T")


class EdgeScreen(Screen[None]):
    """A main screen. Subclasses give `WHERE`, bindings and `content`."""

    WHERE: ClassVar[Where]
    view: reactive[View] = reactive(View())

    @override
    def compose(self) -> ComposeResult:
        yield TopBar(self.WHERE).data_bind(EdgeScreen.view)
        yield Banner().data_bind(EdgeScreen.view)
        yield from self.content()
        yield Footer(compact=True, show_command_palette=False)

    def content(self) -> ComposeResult:
        """What stands between the top line and the keys."""
        raise NotImplementedError

    @override
    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        # None shows the key, but dim: the operator sees that it is there and why it does nothing.
        return None if self.view.read_only and action in CHANGING else super().check_action(action, parameters)

    async def ask(self, dialog: ModalScreen[T]) -> T | None:
        """Show a dialog and wait for its answer; None when it is left. Only inside a worker."""
        return await self.app.push_screen_wait(dialog)  # pyright: ignore[reportUnknownMemberType]  # Textual leaves `app` without its parameter
