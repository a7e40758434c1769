"""A titled box that shows part of the view and marks itself when that is old."""

from __future__ import annotations

from typing import ClassVar

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from typing_extensions import override

from runtime.api.schema import DeviceStatus

from ..css import beside
from ..format import age_text
from ..state import LINK_MARKS, View


class Panel(Widget):
    """Subclasses say what stands in it: `body`."""

    DEFAULT_CSS = beside(__file__)
    TITLE: ClassVar[str] = ""
    view: reactive[View] = reactive(View())

    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        """What to show in so many columns and lines."""
        raise NotImplementedError

    @override
    def render(self) -> Content:
        status = self.view.status
        if status is None:
            return Content.styled("Nothing heard yet.", "$text-muted")
        return self.body(status, self.content_size.width, self.content_size.height)

    def on_mount(self) -> None:
        self.border_title = self.TITLE

    def watch_view(self, view: View) -> None:
        """Mark figures that may no longer be true."""
        is_old = view.status is not None and view.link in ("stale", "down")
        self.border_subtitle = f"{LINK_MARKS['stale'][0]} {age_text(view.age_s)} old" if is_old else ""
        self.set_class(is_old, "-old")
