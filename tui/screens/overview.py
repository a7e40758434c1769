"""How the device is, at a glance."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal
from typing_extensions import override

from ..actions import bindings_for
from ..css import beside
from ..messages import FlushRequested
from ..widgets.alerts_panel import AlertsPanel
from ..widgets.device_panel import DevicePanel
from ..widgets.models_panel import ModelsPanel
from ..widgets.speed_panel import SpeedPanel
from ..widgets.spool_panel import SpoolPanel
from .base import EdgeScreen


class OverviewScreen(EdgeScreen):
    """Device, speed, models, spool, alerts."""

    CSS = beside(__file__)
    WHERE = "overview"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings_for("overview")]

    @override
    def content(self) -> ComposeResult:
        with Horizontal(id="figures"):
            yield DevicePanel().data_bind(EdgeScreen.view)
            yield SpeedPanel().data_bind(EdgeScreen.view)
        yield ModelsPanel().data_bind(EdgeScreen.view)
        with Horizontal(id="worries"):
            yield SpoolPanel().data_bind(EdgeScreen.view)
            yield AlertsPanel().data_bind(EdgeScreen.view)

    def action_flush(self) -> None:
        """Send what waits in the spool."""
        self.post_message(FlushRequested())
