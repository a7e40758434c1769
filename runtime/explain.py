"""Why a model is served as it is: each thing that was decided for it, and what decided it."""

from __future__ import annotations

from dataclasses import dataclass

from edge.config import Origin, Settings
from edge.hardware.memory import usable_cores
from edge.store.models import StoredModel
from runtime import wire
from runtime.api.schema import Decision


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model and its worker.

    Attributes:
        load: What it was, or would be, loaded with.
        ready: What the worker said of itself; None while it is not loaded.
        beat: Its last word.
        keep_alive_s: How long it stays loaded unused; negative is for ever.
        drafts: Draft models that the operator chose, by the model they guess for.
    """

    model: StoredModel
    settings: Settings
    load: wire.Load
    ready: wire.Ready | None
    beat: wire.Heartbeat | None
    promised_bytes: int
    keep_alive_s: float
    is_pinned: bool
    drafts: dict[str, str]


def explain(facts: Facts) -> list[Decision]:
    """Every decision and its reason, in words for people."""
    of_kind = _of_text(facts) if facts.model.kind == "text" else []
    return [_backend(facts), _threads(facts), _tuning(facts), *of_kind, *_memory(facts), _residence(facts)]


def _backend(f: Facts) -> Decision:
    what = {"text": "text", "embeddings": "embeddings", "reranking": "scores", "adapter": "nothing by itself"}
    reason = f"it reads GGUF, which the package holds, and makes {what[f.model.kind]}, as the package says"
    return Decision("backend", f.ready.build if f.ready else "llama.cpp", reason)


def _threads(f: Facts) -> Decision:
    tuned = not f.settings.threads and (f.load.threads or f.load.decode_threads)
    if f.settings.threads:
        value, reason = str(f.settings.threads), _asked(f.settings, "threads")
    elif tuned:
        value = f"{f.load.threads or usable_cores()} for prompts, {f.load.decode_threads or usable_cores()} for answers"
        reason = "`edge tune` found that fastest on this device"
    else:
        value, reason = str(usable_cores()), "every core that it may run on"
    return Decision("threads", value, f"{reason}; fewer while other programs use the cores")


def _tuning(f: Facts) -> Decision:
    chosen = {"ubatch_tokens": f.load.ubatch_tokens, "flash_attention": f.load.flash_attention}
    given = ", ".join(f"{name} {value}" for name, value in chosen.items() if value or value is False)
    if given or (not f.settings.threads and (f.load.threads or f.load.decode_threads)):
        return Decision("tuning", given or "threads only", "`edge tune` measured it on this device")
    reason = "the threads are set" if f.settings.threads else f"nobody ran `edge tune {f.model.ref}` on this device"
    return Decision("tuning", None, reason)


def _of_text(f: Facts) -> list[Decision]:
    return [_context(f), _cells(f), *_shape(f), _speculation(f), _draft(f), _projector(f), _template(f)]


def _context(f: Facts) -> Decision:
    trained = f.model.context_tokens
    if f.ready is None:
        return Decision("context", None, "known when it is loaded: what it was trained for and has cells")
    is_short = trained is not None and f.ready.context_tokens < trained
    reason = (
        f"it has no more cells, and was trained for {trained:,}" if is_short and trained else "it was trained for it"
    )
    return Decision("context", f.ready.context_tokens, reason)


def _cells(f: Facts) -> Decision:
    if f.ready is not None:
        return Decision("cells", f.ready.num_cells, f.ready.cells_reason)
    if f.settings.context_tokens:
        return Decision("cells", f.settings.context_tokens, _asked(f.settings, "context_tokens"))
    return Decision("cells", None, "chosen when it is loaded, from its training and the memory there is")


def _shape(f: Facts) -> list[Decision]:
    return [
        Decision(name, getattr(f.settings, name), _asked(f.settings, name))
        for name in ("max_sequences", "step_tokens", "max_queue")
    ]


def _speculation(f: Facts) -> Decision:
    if f.settings.speculation == "off":
        return Decision("speculation", "off", _asked(f.settings, "speculation"))
    reason = "guesses what the text repeats, where that is faster; answers are the same"
    return Decision("speculation", "auto", reason)


def _draft(f: Facts) -> Decision:
    by = "the operator chose it (`edge draft`)" if str(f.model.ref) in f.drafts else "the package names it"
    if f.settings.speculation == "off":
        return Decision("draft", None, "speculation is off")
    if problem := f.ready.draft_problem if f.ready else f.load.draft_problem:
        return Decision("draft", None, f"{by}, and it cannot be used: {problem}")
    if not f.load.draft:
        chosen = "the operator wants none" if str(f.model.ref) in f.drafts else "neither package nor operator names one"
        return Decision("draft", None, chosen)
    return Decision("draft", f.load.draft, f"{by}; it guesses only where that is faster")


def _projector(f: Facts) -> Decision:
    reason = "the package holds it: the model reads images" if f.load.projector else "the package has none: text only"
    return Decision("projector", f.model.details.projector, reason)


def _template(f: Facts) -> Decision:
    if f.load.template:
        return Decision("chat template", "of the package", "it was given when the model was made")
    if f.ready is not None and not f.ready.has_chat_template:
        return Decision("chat template", "ChatML", "the weight file has none")
    return Decision("chat template", "of the weight file", "the package has no other")


def _memory(f: Facts) -> list[Decision]:
    """The memory contract: what it may take, and what it has taken."""
    weights = f.model.size_bytes
    found = [Decision("weights", weights, "bytes of its files; checked against free memory at each load")]
    if f.ready is not None and (budget := f.ready.budgets) is not None:
        states, disk = (_asked(f.settings, name) for name in ("state_bytes", "state_disk_bytes"))
        found += [
            Decision("cells' bytes", budget.cells, "taken as they are used, and promised until then"),
            Decision("states", budget.states, states if f.settings.state_bytes else _SHARE),
            Decision("states on disk", budget.disk, disk if f.settings.state_disk_bytes != -1 else _DISK),
            Decision("adapters", budget.adapters, "an eighth of what was free at the load, as it is used"),
        ]
    if f.beat is not None:
        reason = f"resident now; {f.promised_bytes:,} bytes of cells are promised. {_GROWTH}"
        found.append(Decision("memory", f.beat.memory_bytes, reason))
    return found


_SHARE = "a sixteenth of what was free at the load"
_DISK = "a twentieth of what was free on the disk at the load, 1 GiB at most"
_GROWTH = "Beyond all these it may take half of what is free, 1 GiB at most; one that takes more is ended and restarted"


def _residence(f: Facts) -> Decision:
    if f.is_pinned:
        return Decision("stays loaded", "always", "it is pinned")
    if f.keep_alive_s < 0:
        return Decision("stays loaded", "while there is room", _asked(f.settings, "keep_alive_s"))
    reason = "keep_alive_s, or the last request's keep_alive; sooner where another model needs the memory"
    return Decision("stays loaded", f"{f.keep_alive_s:g} s after its last use", reason)


_WHERE: dict[Origin, str] = {
    "default": "nobody set it: the default", "file": "the configuration file says so",
    "environment": "the environment says so", "flag": "a flag says so",
}  # fmt: skip


def _asked(settings: Settings, name: str) -> str:
    """Where a setting's value comes from."""
    return f"{_WHERE[settings.origins.get(name, 'default')]} ({name})"
