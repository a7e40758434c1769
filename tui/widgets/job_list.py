"""Pulls: how far each is, or how it ended."""

from __future__ import annotations

from textual.content import Content
from typing_extensions import override

from runtime.api.schema import DeviceStatus, Job

from ..css import beside
from ..format import age_text, bar, fit, pad, size_text
from ..state import FINISHED_JOB_STATES, JOB_MARKS, View
from .panel import Panel
from .pieces import MUTED, line, lines

_MAX_SHOWN = 3
_STATE, _BAR, _FIGURES = 12, 12, 34


class JobList(Panel):
    """The newest first; out of the way while there is none."""

    DEFAULT_CSS = beside(__file__)
    TITLE = "Pulls"

    @override
    def watch_view(self, view: View) -> None:
        super().watch_view(view)
        num_shown = min(_MAX_SHOWN, len(view.jobs))
        self.display = num_shown > 0
        self.styles.height = num_shown + 2

    @override
    def body(self, status: DeviceStatus, width: int, height: int) -> Content:
        order = sorted(self.view.jobs, key=lambda job: job.state in FINISHED_JOB_STATES)
        return lines(*(_row(job, width) for job in order[:_MAX_SHOWN]))


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
