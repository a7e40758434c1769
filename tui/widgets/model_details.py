"""What is known of the selected model."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from typing_extensions import override

from runtime.api.schema import DeviceStatus, ModelInfo

from ..css import beside
from ..format import UNKNOWN, age_text, count_text, fit, size_text
from ..state import name_text, restarts_text
from .panel import Panel
from .pieces import MUTED, label, line, lines

_LABEL = 9


class ModelDetails(Panel):
    """Origin, context, and what it does now, or why it failed."""

    DEFAULT_CSS = beside(__file__)
    TITLE = "Selected"
    ref: reactive[str | None] = reactive[str | None](None)

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        model = self.view.model(self.ref)
        if model is None:
            return line(("No model is selected.", MUTED))
        return lines(
            line((fit(name_text(model), width), "bold")),
            line(label("Digest", _LABEL), fit(model.digest, width - _LABEL)),
            line(label("Origin", _LABEL), fit(_origin(model), width - _LABEL)),
            _now(model, width),
        )


def _origin(model: ModelInfo) -> str:
    known = [model.architecture, f"{count_text(model.context_tokens)} tokens of context", model.license, model.source]
    return " · ".join(part for part in known if part)


def _now(model: ModelInfo, width: int) -> Content:
    if model.state == "failed":
        return line(("✖ ", "$text-error"), (fit(model.error or "no reason given", width - 2), "$text-error"))
    if model.state != "ready":
        return line(label("Now", _LABEL), "loading…" if model.state == "loading" else "not loaded")
    kv = f"KV {model.kv_cells_used:,}/{model.kv_cells:,}" if model.kv_cells else f"KV {UNKNOWN}"
    queue = f"{model.requests_active} running, {model.requests_waiting} waiting"
    memory = size_text(model.memory_bytes)
    figures = " · ".join((queue, kv, memory) if model.kind == "text" else (queue, memory))
    age = f"ready for {age_text(model.loaded_s)}"
    if not model.num_restarts:
        return line(label("Now", _LABEL), f"{figures} · {age}")
    # First, so that a narrow terminal does not cut it off.
    return line(label("Now", _LABEL), (f"▲ {restarts_text(model)}", "$warning"), f", {age} · {figures}")
