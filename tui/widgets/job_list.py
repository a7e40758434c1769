"""Pulls: how far each is, or how it ended."""

from __future__ import annotations

from textwrap import wrap

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus, Job

from ..css import beside
from ..format import age_text, bar, fit, pad, size_text
from ..state import FINISHED_JOB_STATES, JOB_MARKS, View
from .panel import Panel
from .pieces import MUTED, line, lines

_MAX_SHOWN = 3
_MAX_REASON_LINES = 4
"""Of the first failed pull; of the others there is one."""
_STATE, _BAR, _FIGURES = 12, 12, 34
_FRAME = 4
"""Columns of a panel's border and padding."""


class JobList(Panel):
    """The newest first; out of the way while there is none."""

    DEFAULT_CSS = beside(__file__)
    TITLE = "Pulls"

    @override
    def watch_view(self, view: View) -> None:
        super().watch_view(view)
        self.display = bool(view.jobs)
        self._fit_height()

    def on_resize(self) -> None:
        """A reason takes more lines where they are shorter."""
        self._fit_height()

    def _fit_height(self) -> None:
        # While it is out of the way it has no width of its own; it will have all of the screen's.
        width = self.app.size.width - _FRAME  # pyright: ignore[reportUnknownMemberType]  # Textual leaves `app` without its parameter
        self.styles.height = len(self._rows(width)) + 2

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        return lines(*self._rows(width))

    def _rows(self, width: int) -> list[Content]:
        order = sorted(self.view.jobs, key=lambda job: job.state in FINISHED_JOB_STATES)[:_MAX_SHOWN]
        first_failed = next((job for job in order if job.state == "failed"), None)
        return [row for job in order for row in (_failed(job, width) if job is first_failed else [_row(job, width)])]


def _failed(job: Job, width: int) -> list[Content]:
    """The reason over several lines: it says what to do."""
    glyph, style = JOB_MARKS["failed"]
    reason = f"{job.subject}: {job.error or 'no reason given'}"
    first, *rest = wrap(reason, max(width - _STATE, 20), max_lines=_MAX_REASON_LINES, placeholder="…")
    return [line((pad(f"{glyph} failed", _STATE), style), first), *(line(" " * _STATE, text) for text in rest)]


def _row(job: Job, width: int) -> Content:
    glyph, style = JOB_MARKS[job.state]
    state = (pad(f"{glyph} {job.state}", _STATE), style)
    if job.state == "failed":
        return line(state, fit(f"{job.subject}: {job.error or 'no reason given'}", width - _STATE))
    if job.state != "running":
        return line(state, fit(f"{job.subject}  {job.message}", width - _STATE))
    width_subject = max(8, width - _STATE - _BAR - _FIGURES)
    return line(state, pad(job.subject, width_subject - 1) + " ", *_progress(job))


def _progress(job: Job) -> tuple[tuple[str, str], ...]:
    rate = f"{size_text(job.rate_bytes_s)}/s"
    if not job.total_bytes:
        return ((f"{size_text(job.done_bytes)}  {rate}  {job.message}", ""),)
    fraction = job.done_bytes / job.total_bytes
    left = age_text((job.total_bytes - job.done_bytes) / job.rate_bytes_s) if job.rate_bytes_s > 0 else "–"
    return (
        (bar(fraction, _BAR), "$primary"),
        (f" {fraction:4.0%} of {size_text(job.total_bytes)}  {rate}", ""),
        (f"  {left} left", MUTED),
    )
