"""The telemetry spool: what waits, what left, and why not."""

from __future__ import annotations

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus, OutboxStatus

from ..format import age_text, bar, count_text, fit, size_text
from .panel import Panel
from .pieces import MUTED, Piece, label, line, lines

_LABEL = 7


class SpoolPanel(Panel):
    """Whether telemetry leaves, and what has not yet."""

    TITLE = "Telemetry spool"

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        return _active(status.outbox, width) if status.outbox.enabled else _off(status.outbox)


def _off(outbox: OutboxStatus) -> Content:
    kept = f"{count_text(outbox.rows)} batches kept, {size_text(outbox.size_bytes)}" if outbox.rows else "Nothing kept."
    return lines(
        line(("○ off", MUTED), "  nothing leaves this device"),
        line(kept),
        line(("To send it, set EDGE_GATEWAY_URL.", MUTED)),
    )


def _active(outbox: OutboxStatus, width: int) -> Content:
    size = f"{size_text(outbox.size_bytes)} of {size_text(outbox.limit_bytes)}"
    fraction = outbox.size_bytes / max(outbox.limit_bytes, 1)
    width_bar = max(4, width - _LABEL - len(size) - 1)
    return lines(
        _state(outbox),
        line(label("Size", _LABEL), (bar(fraction, width_bar), "$primary"), " ", size),
        line(label("Oldest", _LABEL), age_text(outbox.oldest_age_s), _last_sent(outbox)),
        line(label("Sent", _LABEL), *_sent(outbox, width - _LABEL)),
        line((fit(outbox.last_error or "", width), "$text-error")),
    )


def _state(outbox: OutboxStatus) -> Content:
    if outbox.last_error:
        again = "" if outbox.next_attempt_s is None else f", next try in {age_text(outbox.next_attempt_s)}"
        return line((f"▲ {count_text(outbox.rows)} wait", "bold $text-warning"), again)
    if outbox.rows:
        return line((f"◐ {count_text(outbox.rows)} batches wait", "bold"))
    return line(("● everything sent", "$success"))


def _last_sent(outbox: OutboxStatus) -> str:
    return "" if outbox.last_success_age_s is None else f", last sent {age_text(outbox.last_success_age_s)} ago"


def _sent(outbox: OutboxStatus, width: int) -> tuple[Piece, Piece]:
    lost = ((outbox.dropped_rows, "dropped"), (outbox.quarantined_rows, "refused"))
    told = ", ".join(f"{count_text(count)} {what}" for count, what in lost if count)
    sent = count_text(outbox.sent_batches)
    if not told:
        return f"{sent} batches", ""
    return sent, (fit(f" ▲ {told}", width - len(sent)), "$text-warning")
