"""What is wrong, and the command that mends it."""

from __future__ import annotations

from textwrap import wrap

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import Alert, AlertLevel, DeviceStatus

from ..format import fit
from ..state import alerts_of
from .panel import Panel
from .pieces import MUTED, line, lines

ALERT_MARKS: dict[AlertLevel, tuple[str, str]] = {
    "critical": ("✖", "bold $text-error"),
    "warning": ("▲", "$text-warning"),
    "info": ("·", "$text-muted"),
}
_ORDER = ("critical", "warning", "info")
_MAX_LINES = 2
"""Of one alert, beside its fix."""


class AlertsPanel(Panel):
    """The worst first; what does not fit is counted."""

    TITLE = "Alerts"

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        if not (found := alerts_of(status)):
            return line(("● nothing is wrong", "$success"))
        rows: list[Content] = []
        alerts = sorted(found, key=lambda alert: _ORDER.index(alert.level))
        for i, alert in enumerate(alerts):
            rows_of_one = _alert(alert, width)
            if rows and len(rows) + len(rows_of_one) > height - (i < len(alerts) - 1):
                return lines(*rows[: height - 1], line((f"and {len(alerts) - i} more", MUTED)))
            rows += rows_of_one
        return lines(*rows)


def _alert(alert: Alert, width: int) -> list[Content]:
    glyph, style = ALERT_MARKS[alert.level]
    mark = f"{glyph} {alert.level} "
    first, *rest = wrap(
        mark + alert.what, max(width, 20), subsequent_indent="  ", max_lines=_MAX_LINES, placeholder="…"
    )
    fix = [line(("  fix: ", MUTED), fit(alert.fix, width - 7))] if alert.fix else []
    return [line((mark, style), first[len(mark) :]), *(line(text) for text in rest), *fix]
