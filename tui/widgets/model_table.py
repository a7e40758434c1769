"""The models as a table with a cursor that stays on its model."""

from __future__ import annotations

from rich.text import Text
from textual.events import Resize
from textual.reactive import reactive
from textual.widgets import DataTable

from runtime.api.schema import ModelInfo

from ..css import beside
from ..format import UNKNOWN, fit, parameters_text, rate_text, size_text
from ..state import View, name_text, state_text

_COLUMNS = (("state", "State", 10), ("ref", "Model", 0), ("size", "Size", 7), ("quant", "Quant", 6),
            ("params", "Params", 6), ("memory", "Memory", 7), ("rate", "Tok/s", 6))  # fmt: skip
_FIGURES = ("size", "params", "memory", "rate")
_PADDING = 2 * len(_COLUMNS)
_FIXED = sum(width for _, _, width in _COLUMNS)
_MIN_REF = 16


class ModelTable(DataTable[Text]):
    """Follows the view; only what changed is drawn again."""

    DEFAULT_CSS = beside(__file__)
    view: reactive[View] = reactive(View())

    def __init__(self) -> None:
        super().__init__(cursor_type="row", zebra_stripes=False)
        self._shown: dict[str, tuple[Text, ...]] = {}
        self._width_ref = 0

    def on_resize(self, event: Resize) -> None:
        """Give the names what the figures leave."""
        width = max(_MIN_REF, event.size.width - _FIXED - _PADDING)
        if width != self._width_ref:
            self._width_ref = width
            self._lay_out()

    def _lay_out(self) -> None:
        selected = self.selected
        self.clear(columns=True)
        for key, name, width in _COLUMNS:
            label = Text(name, justify="right" if key in _FIGURES else "left")
            self.add_column(label, key=key, width=width or self._width_ref)
        self._shown = {}
        self._follow(self.view)
        if selected in self._shown:
            self.move_cursor(row=list(self._shown).index(selected))

    def watch_view(self, view: View) -> None:
        if self.columns:
            self._follow(view)

    @property
    def selected(self) -> str | None:
        """The model under the cursor."""
        refs = list(self._shown)
        return refs[self.cursor_row] if 0 <= self.cursor_row < len(refs) else None

    def _follow(self, view: View) -> None:
        rows = {model.ref: _cells(model, self._width_ref) for model in view.models}
        if list(rows) != list(self._shown):
            self._fill(rows)
        else:
            for ref, cells in rows.items():
                for (key, _, _), cell, old in zip(_COLUMNS, cells, self._shown[ref], strict=True):
                    if cell != old:
                        self.update_cell(ref, key, cell)
        self._shown = rows

    def _fill(self, rows: dict[str, tuple[Text, ...]]) -> None:
        selected = self.selected
        self.clear()
        for ref, cells in rows.items():
            self.add_row(*cells, key=ref)
        if selected in rows:
            self.move_cursor(row=list(rows).index(selected))


def _cells(model: ModelInfo, width_ref: int) -> tuple[Text, ...]:
    is_loaded = model.state == "ready"
    return (
        Text(state_text(model), style="bold" if is_loaded else ""),
        Text(fit(name_text(model), width_ref), style="bold" if is_loaded else ""),
        Text(size_text(model.size_bytes), justify="right"),
        Text(model.quantization or UNKNOWN),
        Text(parameters_text(model.num_parameters), justify="right"),
        Text(size_text(model.memory_bytes), justify="right"),
        Text(rate_text(model.rate_tok_s) if is_loaded else UNKNOWN, justify="right"),
    )
