"""Tokens per second now and over the last minutes, time to first token, the queue."""

from __future__ import annotations

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus

from ..format import count_text, rate_text, span_text, trend
from .panel import Panel
from .pieces import MUTED, label, line, lines

_LABEL = 13
_NUM_FIGURES = 4


class SpeedPanel(Panel):
    """How fast answers come. The chart takes what room is left; a column is a second, a gap was not heard."""

    TITLE = "Speed"

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        shown = [value for value in self.view.history[-width:] if value is not None]
        top = max([*shown, 1.0])
        chart = trend(self.view.history, width=width, height=max(1, height - _NUM_FIGURES), top=top)
        peak = f"peak {rate_text(max(shown, default=0.0))}"
        failed = f" · {count_text(status.requests_failed)} failed" if status.requests_failed else ""
        rate = f"{rate_text(status.decode_tok_s)} tok/s"
        prefill = f"  reads {rate_text(status.prefill_tok_s)}"
        space = " " * max(1, width - len(rate) - len(prefill) - len(peak))
        return lines(
            line((rate, "bold"), (prefill, MUTED), space, (peak, MUTED)),
            *(line((row, "$primary")) for row in chart),
            line(label("First token", _LABEL), _first_token(status)),
            line(label("Queue", _LABEL), f"{status.requests_active} running · {status.requests_waiting} waiting"),
            line(label("Requests", _LABEL), count_text(status.requests_total), (failed, "$text-error")),
        )


def _first_token(status: DeviceStatus) -> str:
    return "no request yet" if status.ttft_p50_s is None else f"{span_text(status.ttft_p50_s)} (median)"
