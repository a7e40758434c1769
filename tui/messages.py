"""What screens ask of the app. They go up; the answer comes down as a new view."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message


@dataclass
class LoadRequested(Message):
    """Load this model."""

    ref: str


@dataclass
class UnloadRequested(Message):
    """Unload this model."""

    ref: str


@dataclass
class DeleteRequested(Message):
    """Remove this model from the store; the operator has confirmed."""

    ref: str


@dataclass
class PullRequested(Message):
    """Fetch a model."""

    source: str
    name: str | None


@dataclass
class CancelRequested(Message):
    """Stop this job; the operator has confirmed."""

    job_id: str


class FlushRequested(Message):
    """Send what waits in the telemetry spool."""


@dataclass
class TalkRequested(Message):
    """Open the chat with this model."""

    ref: str
