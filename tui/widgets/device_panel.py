"""The machine: processor, memory, temperature, disk."""

from __future__ import annotations

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus

from ..format import bar, pad, size_text, span_text
from ..state import View
from .panel import Panel
from .pieces import label, line, lines

_LABEL = 9
_HOT_C = 80.0
"""Raspberry Pi and Jetson boards begin to throttle between 80 and 85 °C."""
_FULL = 0.9


class DevicePanel(Panel):
    """How the machine is. What cannot be read says so."""

    TITLE = "Device"

    @override
    def watch_view(self, view: View) -> None:
        super().watch_view(view)
        if view.status is not None:
            self.border_title = f"{self.TITLE} · edge {view.status.version}"

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        used = status.memory_total_bytes - status.memory_available_bytes
        total = max(status.memory_total_bytes, 1)
        of_total = f"{size_text(used).removesuffix(' GB')} of {size_text(status.memory_total_bytes)}"
        width_bar = max(4, width - _LABEL - 18)
        load = "" if status.load_1m is None else f", load {status.load_1m:.1f}"
        return lines(
            _gauge(
                "CPU", status.cpu_percent / 100, f"{status.cpu_percent:.0f} % of {status.cpu_count} cores", width_bar
            ),
            _gauge("Memory", used / total, of_total, width_bar),
            _gauge("edge", status.memory_used_bytes / total, size_text(status.memory_used_bytes), width_bar),
            line(label("Temp", _LABEL), _temperature(status.temperature_c)),
            line(label("Disk", _LABEL), f"{size_text(status.disk_free_bytes)} free"),
            line(label("Engine", _LABEL), f"{status.accelerator}, up {span_text(status.uptime_s)}{load}"),
        )


def _gauge(name: str, fraction: float, text: str, width: int) -> Content:
    is_full = fraction >= _FULL
    title = (pad(f"{name} ▲", _LABEL), "$text-warning") if is_full else label(name, _LABEL)
    return line(title, (bar(fraction, width), "$warning" if is_full else "$primary"), " ", text)


def _temperature(celsius: float | None) -> Content:
    if celsius is None:
        return line(("cannot be read here", "$text-muted"))
    is_hot = celsius >= _HOT_C
    return line(f"{celsius:.1f} °C", (" ▲ hot", "$text-warning") if is_hot else "")
