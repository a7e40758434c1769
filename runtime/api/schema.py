"""The wire structs of the local API. They parse, validate and document it; nothing here does anything."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge.kinds import ModelKind, Role, Scope

# ---------------------------------------------------------------- admin API, /edge/v1

ModelState = Literal["unloaded", "loading", "ready", "failed"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
AlertLevel = Literal["info", "warning", "critical"]


class ModelInfo(msgspec.Struct, kw_only=True):
    """One model of the store and what the runtime is doing with it."""

    ref: str
    digest: str
    """Digest of the manifest, ``sha256:…``."""
    size_bytes: int
    state: ModelState
    kind: ModelKind = "text"
    capabilities: tuple[str, ...] = ()
    """As `/v1/models` lists them."""
    error: str | None = None
    """Why the model is `failed`."""
    architecture: str | None = None
    quantization: str | None = None
    num_parameters: int | None = None
    context_tokens: int | None = None
    """Context the model was trained for."""
    license: str | None = None
    source: str | None = None
    created: float | None = None
    """Unix time at which it came into the store."""
    # What follows is None or 0 while the model is not loaded.
    memory_bytes: int | None = None
    """Resident memory of the worker."""
    kv_cells_used: int = 0
    kv_cells: int = 0
    requests_active: int = 0
    requests_waiting: int = 0
    decode_tok_s: float = 0.0
    """Tokens generated per second over the last few seconds."""
    prefill_tok_s: float = 0.0
    num_restarts: int = 0
    draft: str | None = None
    """The smaller model that guesses for it."""
    draft_problem: str | None = None
    """Why none does, where one should."""
    drafted_tokens: int = 0
    """Guesses of the draft model that were checked, and those of them that were right."""
    draft_accepted_tokens: int = 0
    loaded_s: float | None = None
    """Seconds since the model became ready."""
    is_pinned: bool = False
    """Neither unloaded when idle nor to make room."""

    @property
    def rate_tok_s(self) -> float:
        """Tokens per second that it generates or, where it makes no text, reads."""
        return self.decode_tok_s if self.kind == "text" else self.prefill_tok_s


class ModelList(msgspec.Struct, kw_only=True):
    models: list[ModelInfo]


class ModelRequest(msgspec.Struct, kw_only=True):
    model: Annotated[str, msgspec.Meta(max_length=400)]


PinName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class WarmRequest(msgspec.Struct, kw_only=True):
    """A system prompt whose conversations shall begin fast."""

    model: Annotated[str, msgspec.Meta(max_length=400)]
    """Also with adapters: ``model+adapter``."""
    system: Annotated[str, msgspec.Meta(min_length=1, max_length=1 << 20)]
    name: PinName | None = None
    """Of the pin; what had that name before goes. Made from model and prompt where it is not given."""


class PinnedPrefix(msgspec.Struct, kw_only=True):
    """What conversations with one system prompt share, computed and kept for all."""

    model: str
    name: str
    num_tokens: int
    size_bytes: int
    in_memory: bool
    """Or read from the disk when a prompt wants it."""
    on_disk: bool
    """Whether it outlives the engine."""
    num_uses: int


class PinnedPrefixList(msgspec.Struct, kw_only=True):
    prefixes: list[PinnedPrefix]


class ActivateRequest(msgspec.Struct, kw_only=True):
    """A model for a slot."""

    model: Annotated[str, msgspec.Meta(max_length=400)]
    trial_s: Annotated[float, msgspec.Meta(ge=0, le=30 * 86400)] | None = None
    """How long it has to serve without a crash until it stays; 600 where it is not given."""
    within_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    """In which it has to answer its golden prompts. Where it is not given: what its package says, or 30; 10 where the
    other version had to make room."""
    force: bool = False
    """Take a release that is older than one that was confirmed here; for keys with the scope `admin`."""


class SlotVersion(msgspec.Struct, kw_only=True):
    """A version of a model in a slot."""

    ref: str
    """The name under which it came there; that may lead to another version by now."""
    digest: str


class SlotVerdict(msgspec.Struct, kw_only=True):
    """What came of the last change of a slot."""

    outcome: Literal["confirmed", "rolled_back", "withdrawn"]
    """It stayed; failed; or somebody asked it to go."""
    ref: str
    digest: str
    reason: str | None
    age_s: float
    """By the device's clock, which may have been wrong then."""


class SlotInfo(msgspec.Struct, kw_only=True):
    """A name that requests can use for a model, behind which versions take turns."""

    name: str
    state: Literal["empty", "serving", "checking", "trial"]
    """While a version is `checking`, the one before serves."""
    serves: str | None
    """The model that answers now."""
    current: SlotVersion | None
    """The last one that was confirmed."""
    previous: SlotVersion | None
    candidate: SlotVersion | None
    """The one on its way."""
    trial_s: float | None
    served_s: float | None
    """How much of its trial is over."""
    last: SlotVerdict | None


class SlotList(msgspec.Struct, kw_only=True):
    slots: list[SlotInfo]


class PullRequest(msgspec.Struct, kw_only=True):
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]
    """A catalog name, or ``hf://``, ``oci://``, ``pypi://``, ``https://`` or a file's path."""
    name: Annotated[str, msgspec.Meta(max_length=400)] | None = None


class Job(msgspec.Struct, kw_only=True):
    """Long work that the runtime does for somebody."""

    id: str
    kind: str
    """``pull``."""
    subject: str
    state: JobState
    done_bytes: int = 0
    total_bytes: int | None = None
    rate_bytes_s: float = 0.0
    message: str = ""
    error: str | None = None
    created: float = 0.0
    finished: float | None = None


class JobList(msgspec.Struct, kw_only=True):
    jobs: list[Job]


class OutboxStatus(msgspec.Struct, kw_only=True):
    """The telemetry spool."""

    enabled: bool
    """Whether a gateway is configured; without one nothing leaves the device."""
    gateway_url: str = ""
    rows: int = 0
    """Batches that wait."""
    size_bytes: int = 0
    limit_bytes: int = 0
    oldest_age_s: float | None = None
    sent_batches: int = 0
    dropped_rows: int = 0
    """Batches dropped for the size limit since the outbox was made; each was reported as a gap."""
    quarantined_rows: int = 0
    last_success_age_s: float | None = None
    last_error: str | None = None
    next_attempt_s: float | None = None


class Alert(msgspec.Struct, kw_only=True):
    level: AlertLevel
    what: str
    fix: str
    """The command or action that mends it; empty where there is none."""


class DeviceStatus(msgspec.Struct, kw_only=True):
    """How the device is, at one moment. What cannot be read is None."""

    version: str
    device_id: str
    hostname: str
    time: float
    uptime_s: float
    """Of the appliance."""
    cpu_percent: float
    cpu_count: int
    load_1m: float | None
    memory_total_bytes: int
    memory_available_bytes: int
    memory_used_bytes: int
    """Resident memory of the appliance: front and workers."""
    disk_free_bytes: int
    temperature_c: float | None
    accelerator: str
    requests_active: int
    requests_waiting: int
    requests_total: int
    requests_failed: int
    decode_tok_s: float
    prefill_tok_s: float
    ttft_p50_s: float | None
    """Time to first token, median of the last requests."""
    models: list[ModelInfo]
    outbox: OutboxStatus
    jobs: list[Job]
    alerts: list[Alert]


class LogLines(msgspec.Struct, kw_only=True):
    lines: list[str]


class Decision(msgspec.Struct):
    """One thing that was decided for a model, and what decided it."""

    name: str
    value: str | int | None
    """None where it is decided later, or against it."""
    reason: str


class Explanation(msgspec.Struct, kw_only=True):
    """Why a model is served as it is."""

    model: str
    state: ModelState
    decisions: list[Decision]


class Setting(msgspec.Struct, kw_only=True):
    """A setting in force; what is secret in its value is masked."""

    name: str
    value: str | int | float
    origin: Literal["default", "file", "environment", "flag"]


class SettingList(msgspec.Struct, kw_only=True):
    settings: list[Setting]


class KeyRequest(msgspec.Struct, kw_only=True):
    """A key to make. Without `role` and `scopes` it is a user's."""

    name: Annotated[str, msgspec.Meta(max_length=64)] = ""
    role: Role | None = None
    scopes: Annotated[list[Scope], msgspec.Meta(max_length=6)] | None = None
    models: Annotated[list[Annotated[str, msgspec.Meta(max_length=200)]], msgspec.Meta(max_length=64)] = []
    """Names it may use, ``*`` for any characters; empty is every model."""
    rpm: int | None = None
    tokens_per_day: int | None = None
    priority: int = 0


class KeyInfo(msgspec.Struct, kw_only=True):
    """A key, without its secret."""

    id: str
    name: str
    scopes: list[Scope]
    models: list[str]
    rpm: int | None
    tokens_per_day: int | None
    priority: int
    created: float
    """Unix time."""


class KeyList(msgspec.Struct, kw_only=True):
    keys: list[KeyInfo]


class NewKey(msgspec.Struct, kw_only=True):
    key: str
    """What to present. Nobody sees it again."""
    info: KeyInfo


class OllamaError(msgspec.Struct, kw_only=True):
    """Ollama's error body, under ``/api``."""

    error: str


class Problem(msgspec.Struct, kw_only=True):
    """RFC 9457 problem details, the error body outside ``/v1`` and ``/api``."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = None
