"""The models and their states, one a line."""

from __future__ import annotations

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus, ModelInfo

from ..format import pad, rate_text, size_text
from ..state import MODEL_MARKS, name_text, state_text
from .panel import Panel
from .pieces import MUTED, line, lines

_STATE, _QUANT, _SIZE, _RATE, _QUEUE, _KV = 11, 8, 8, 8, 7, 6
_ORDER = ("failed", "loading", "ready", "unloaded")


class ModelsPanel(Panel):
    """Failed and loaded models first; what does not fit is counted."""

    TITLE = "Models"

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        if not status.models:
            return lines(line("No model in the store."), line(("Get one: 2, then p (edge pull).", MUTED)))
        models = sorted(status.models, key=lambda model: _ORDER.index(model.state))
        num_rows = max(1, height - 1)
        shown = models if len(models) <= num_rows else models[: num_rows - 1]
        more = len(models) - len(shown)
        rest = [line((f"and {more} more (key 2)", MUTED))] if more else []
        width_ref = max(8, width - _STATE - _QUANT - _SIZE - _RATE - _QUEUE - _KV)
        return lines(_heading(width_ref), *(_row(model, width_ref) for model in shown), *rest)


def _heading(width_ref: int) -> Content:
    names = (("STATE", _STATE), ("MODEL", width_ref), ("QUANT", _QUANT))
    figures = (("SIZE", _SIZE), ("TOK/S", _RATE), ("QUEUE", _QUEUE), ("KV", _KV))
    return line((
        "".join(pad(name, width) for name, width in names) + "".join(name.rjust(width) for name, width in figures),
        MUTED,
    ))  # fmt: skip


def _row(model: ModelInfo, width_ref: int) -> Content:
    _, style = MODEL_MARKS[model.state]
    is_loaded = model.state == "ready"
    kv = f"{100 * model.kv_cells_used / model.kv_cells:.0f} %" if model.kv_cells else ""
    figures = (
        (size_text(model.size_bytes), _SIZE),
        (rate_text(model.rate_tok_s) if is_loaded else "", _RATE),
        (f"{model.requests_active}+{model.requests_waiting}" if is_loaded else "", _QUEUE),
        (kv if is_loaded else "", _KV),
    )
    return line(
        (pad(state_text(model), _STATE), style),
        (pad(name_text(model), width_ref - 1) + " ", "bold" if is_loaded else ""),
        pad(model.quantization or "", _QUANT),
        "".join(text.rjust(width) for text, width in figures),
    )
