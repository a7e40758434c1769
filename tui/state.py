"""What the terminal knows, and how each event changes it. Pure: times come in as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import msgspec

from edge.errors import EdgeError
from runtime.api.schema import Alert, DeviceStatus, Job, JobState, ModelInfo, ModelState

from .client import ChatDelta, ChatMessage, Usage
from .format import clean, clean_line

Link = Literal["connecting", "live", "stale", "down"]
S = TypeVar("S", bound=msgspec.Struct)

STALE_AFTER_S = 3.0
"""Figures come each second: after this time they may no longer be true."""
HISTORY_SAMPLES = 300
_GAP_S = 2.5
"""Two samples further apart than this have something missing between them."""
MAX_JOBS = 50
FINISHED_JOB_STATES: tuple[JobState, ...] = ("done", "failed", "cancelled")

# A shape and a word for each state; colour only repeats them.
MODEL_MARKS: dict[ModelState, tuple[str, str]] = {
    "ready": ("●", "$success"),
    "loading": ("◐", "$warning"),
    "unloaded": ("○", "$text-muted"),
    "failed": ("✖", "$error"),
}
LINK_MARKS: dict[Link, tuple[str, str]] = {
    "live": ("●", "$success"),
    "connecting": ("◌", "$text-muted"),
    "stale": ("◐", "$warning"),
    "down": ("✖", "$error"),
}
JOB_MARKS: dict[JobState, tuple[str, str]] = {
    "queued": ("○", "$text-muted"),
    "running": ("↓", "$accent"),
    "done": ("●", "$success"),
    "failed": ("✖", "$error"),
    "cancelled": ("○", "$warning"),
}


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the screens show, at one moment. Foreign text in it is clean."""

    address: str = ""
    read_only: bool = False
    now: float = 0.0
    """Monotonic seconds, of the clock that `received_at` is of."""
    status: DeviceStatus | None = None
    """The last one that came, however long ago."""
    received_at: float = 0.0
    history: tuple[float | None, ...] = ()
    """Tokens per second, a sample a status, oldest first; None where one was missed."""
    error: str | None = None
    """Why there is no connection; None while there is one."""
    hint: str = ""

    @property
    def age_s(self) -> float | None:
        """Seconds since the figures came."""
        return None if self.status is None else max(0.0, self.now - self.received_at)

    @property
    def link(self) -> Link:
        """How far the figures can be trusted."""
        if self.error is not None:
            return "down"
        if self.status is None:
            return "connecting"
        return "stale" if self.now - self.received_at > STALE_AFTER_S else "live"

    @property
    def models(self) -> Sequence[ModelInfo]:
        """The models of the store, as last heard."""
        return self.status.models if self.status else ()

    @property
    def jobs(self) -> Sequence[Job]:
        """Running and lately finished jobs, newest first."""
        return sorted(self.status.jobs, key=lambda job: -job.created) if self.status else ()

    def model(self, ref: str | None) -> ModelInfo | None:
        """The model of that name."""
        return next((model for model in self.models if model.ref == ref), None)


def fold_status(view: View, status: DeviceStatus, now: float) -> View:
    """The view after a status came."""
    status = cleaned(status)
    missed = round(now - view.received_at) - 1 if view.history and now - view.received_at > _GAP_S else 0
    gap = (None,) * min(missed, HISTORY_SAMPLES)
    history = (*view.history, *gap, status.decode_tok_s)[-HISTORY_SAMPLES:]
    return replace(view, status=status, received_at=now, now=now, history=history, error=None, hint="")


def fold_job(view: View, job: Job) -> View:
    """The view after news of a job. A job says nothing about the other figures: their age stays."""
    if view.status is None:
        return view
    job = cleaned(job)
    others = [other for other in view.status.jobs if other.id != job.id]
    return replace(view, status=msgspec.structs.replace(view.status, jobs=[*others, job][-MAX_JOBS:]))


def fold_error(view: View, error: EdgeError, now: float) -> View:
    """The view after the connection failed."""
    return replace(view, now=now, error=clean_line(error.message), hint=clean_line(error.hint or ""))


def fold_time(view: View, now: float) -> View:
    """The view later, when nothing came."""
    return replace(view, now=now)


def finished_jobs(before: View, after: View) -> list[Job]:
    """Jobs that ended between two views."""
    running = {job.id for job in before.jobs if job.state not in FINISHED_JOB_STATES}
    return [job for job in after.jobs if job.id in running and job.state in FINISHED_JOB_STATES]


def running_jobs(view: View) -> list[Job]:
    """Jobs that can be cancelled, newest first."""
    return [job for job in view.jobs if job.state not in FINISHED_JOB_STATES]


def alerts_of(status: DeviceStatus) -> list[Alert]:
    """What is wrong: the appliance's alerts, and each model whose engine had to be started again."""
    restarted = [
        Alert(level="warning", what=f"the engine of {model.ref}: {restarts_text(model)}", fix="the log says why (4)")
        for model in status.models
        if model.num_restarts
    ]
    return [*status.alerts, *restarted]


def state_text(model: ModelInfo) -> str:
    """``● ready``, or ``● ready ▲2`` where its engine was started again: at most ten columns for each state."""
    mark = f" ▲{min(model.num_restarts, 9)}" if model.state == "ready" and model.num_restarts else ""
    return f"{MODEL_MARKS[model.state][0]} {model.state}{mark}"


def name_text(model: ModelInfo) -> str:
    """``minilm:l6-v2 embeddings``: what it is for, where that is not text."""
    return model.ref if model.kind == "text" else f"{model.ref} {model.kind}"


def restarts_text(model: ModelInfo) -> str:
    """``1 restart``."""
    return f"{model.num_restarts:,} restart{'s' if model.num_restarts != 1 else ''}"


def cleaned(struct: S) -> S:
    """The same struct, every text in it one harmless line."""
    return msgspec.convert(_clean_all(msgspec.to_builtins(struct)), type(struct))


def _clean_all(value: object) -> object:
    if isinstance(value, str):
        return clean_line(value)
    if isinstance(value, list):
        items: list[object] = value  # pyright: ignore[reportUnknownVariableType]  # to_builtins gives plain lists
        return [_clean_all(item) for item in items]
    if isinstance(value, dict):
        table: dict[object, object] = value  # pyright: ignore[reportUnknownVariableType]  # and plain dicts
        return {key: _clean_all(item) for key, item in table.items()}
    return value


@dataclass(slots=True)
class Turn:
    """One turn of a conversation and, for an answer, what it cost. Grows while the answer comes."""

    role: Literal["user", "assistant"]
    content: str = ""
    model: str = ""
    started_at: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    num_chunks: int = 0
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None
    is_stopped: bool = False
    """Whether the operator ended it."""

    def add(self, delta: ChatDelta, now: float) -> str:
        """Take in one step of the answer; gives the clean text to show."""
        text = clean(delta.content)
        if text:
            self.content += text
            self.num_chunks += 1
            self.first_at = now if self.first_at is None else self.first_at
            self.last_at = now
        self.usage = delta.usage or self.usage
        self.finish_reason = delta.finish_reason or self.finish_reason
        return text

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: as counted by the appliance once it is whole, till then the steps that came."""
        return self.usage.completion_tokens if self.usage else self.num_chunks

    @property
    def rate_tok_s(self) -> float | None:
        """Tokens per second between the first text and the last; None before there are two."""
        if self.first_at is None or self.last_at is None or self.num_tokens < 2 or self.last_at <= self.first_at:
            return None
        return (self.num_tokens - 1) / (self.last_at - self.first_at)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the question to the first text."""
        return None if self.first_at is None else self.first_at - self.started_at


@dataclass(slots=True)
class Chat:
    """One conversation."""

    model: str | None = None
    system: str = ""
    turns: list[Turn] = field(default_factory=list[Turn])

    def messages(self) -> list[ChatMessage]:
        """What to send: the system prompt and every turn that has text."""
        system = [ChatMessage("system", self.system)] if self.system else []
        return [*system, *(ChatMessage(turn.role, turn.content) for turn in self.turns if turn.content)]


def choose_model(models: Sequence[ModelInfo], wanted: str | None) -> str | None:
    """The model to talk to, among those that make text: the wanted one while it exists, else one that is ready, else
    the first."""
    refs = [model.ref for model in sorted(models, key=lambda model: model.state != "ready") if model.kind == "text"]
    return wanted if wanted in refs else next(iter(refs), None)


def new_lines(old: Sequence[str], new: Sequence[str]) -> tuple[bool, Sequence[str]]:
    """How a log went on: whether it continues `old`, and the lines to add (all of `new` where it does not)."""
    if not old:
        return True, new
    for overlap in range(min(len(old), len(new)), 0, -1):
        if new[overlap - 1] == old[-1] and list(old[-overlap:]) == list(new[:overlap]):
            return True, new[overlap:]
    return False, new
