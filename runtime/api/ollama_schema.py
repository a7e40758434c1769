"""The wire structs of Ollama's endpoints, and how they are said in OpenAI's."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from typing_extensions import override

from edge.errors import InvalidRequest
from edge.store.details import Sampling
from runtime.api.json_schema import parse_schema
from runtime.api.openai_schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentLogprob,
    ImagePart,
    LastN,
    Penalty,
    Probability,
    RepeatPenalty,
    Seed,
    StopList,
    StopString,
    Temperature,
    TextPart,
    TokenCount,
    TopLogprobs,
)
from runtime.api.parsing import CHECKED_APART, MAX_WARNINGS, check_num_fields, passed_over
from runtime.api.structured import Schema, Structure
from runtime.api.tools import MAX_TOOLS, CalledFunction, Id, ReasoningEffort, ToolCallField, ToolField, ToolName, Tools
from runtime.request import Constraint

FOREVER_S = -1.0
MAX_KEPT_S = 1e9
"""More than this is for ever."""
_FOREVER = datetime.timedelta(days=106_751)
"""What Ollama calls for ever: the most nanoseconds that 64 bits hold."""
MAX_TEXT_CHARS = 256 << 10

Name = Annotated[str, msgspec.Meta(max_length=400)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
Image = Annotated[str, msgspec.Meta(max_length=64 << 20)]
Role = Literal["system", "user", "assistant", "tool"]


def ollama_name(name: str) -> str:
    """A model's name as the store has it: Ollama's do not tell small letters from large ones before the tag."""
    head, colon, tag = name.partition(":")
    return f"{head.lower()}{colon}{tag}"


# ---------------------------------------------------------------- durations

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(ns|us|µs|μs|ms|s|m|h)")
_PLAIN = re.compile(r"[+-]?[0-9]{1,15}(?:\.[0-9]{1,9})?")
KeepAlive = float | Annotated[str, msgspec.Meta(max_length=64)] | None


def kept_s(keep_alive: KeepAlive) -> float | None:
    """`keep_alive` in seconds: a number of them, or a text such as Go's ``1h30m``. Below 0 is for ever; None says
    nothing.

    Raises:
        InvalidRequest: It is neither.
    """
    if keep_alive is None or keep_alive == "":
        return None
    seconds = keep_alive if not isinstance(keep_alive, str) else _go_duration_s(keep_alive)
    return FOREVER_S if seconds < 0 or seconds > MAX_KEPT_S else float(seconds)


def _go_duration_s(text: str) -> float:
    if _PLAIN.fullmatch(text):
        return float(text)
    parts = list(_PART.finditer(text.lstrip("+-")))
    if not parts or "".join(p[0] for p in parts) != text[text[:1] in ("+", "-") :]:
        hint = 'Seconds, or a text such as "10m" or "1h30m"; 0 unloads at once, a negative one never.'
        raise InvalidRequest(f"'keep_alive' is no duration: {text!r}.", field="keep_alive", hint=hint)
    seconds = sum(float(p[1]) * _UNIT_S[p[2]] for p in parts)
    return -seconds if text.startswith("-") else seconds


def nanoseconds(seconds: float) -> int:
    """As Ollama counts durations."""
    return round(max(0.0, seconds) * 1e9)


def rfc3339(time: datetime.datetime) -> str:
    """A time as Ollama writes it, in UTC."""
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now() -> str:
    """This moment."""
    return rfc3339(datetime.datetime.now(datetime.UTC))


def after(seconds: float) -> str:
    """The moment in so many seconds; a negative number is for ever."""
    span = _FOREVER if seconds < 0 else datetime.timedelta(seconds=seconds)
    return rfc3339(datetime.datetime.now(datetime.UTC) + span)


# ---------------------------------------------------------------- options


class Options(msgspec.Struct, kw_only=True):
    """`options` of a request, and `parameters` of a model: those that are done."""

    temperature: Temperature | None = None
    top_k: TokenCount | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    repeat_last_n: LastN | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    """-1 draws one."""
    num_predict: Annotated[int, msgspec.Meta(ge=-2, le=1 << 31)] | None = None
    """Below 1: as many as fit."""
    num_ctx: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    """The whole context is there in any case."""
    stop: StopString | StopList | None = None
    mirostat: Annotated[int, msgspec.Meta(ge=0, le=2)] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    @property
    def max_tokens(self) -> int | None:
        """Of the answer; None is as many as fit."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self, field: str) -> None:
        """Refuse what is not done.

        Raises:
            InvalidRequest: An option asks for it.
        """
        if self.mirostat:
            path = f"{field}.mirostat"
            raise InvalidRequest(f"'{path}' is not supported by this version.", field=path, hint="Leave it out.")

    def sampling(self) -> Sampling:
        """As the defaults of a model."""
        seed = None if self.seed in (None, -1) else self.seed
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            typical_p=self.typical_p, repeat_penalty=self.repeat_penalty, repeat_last_n=self.repeat_last_n,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            seed=None if seed is None else seed % (1 << 63), max_tokens=self.max_tokens,
            stop=tuple(self.stops()) or None,
        )  # fmt: skip


_OPTIONS = frozenset(f.encode_name for f in msgspec.structs.fields(Options))
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "num_keep": (), "num_batch": (), "num_gpu": (), "main_gpu": (), "num_thread": (), "draft_num_predict": (),
    "low_vram": (False,), "f16_kv": (True,), "logits_all": (False,), "vocab_only": (False,), "use_mmap": (True,),
    "use_mlock": (False,), "embedding_only": (False,), "numa": (False,), "tfs_z": (1,), "penalize_newline": (True,),
}  # fmt: skip
"""Options of Ollama that change nothing here, and the values with which they ask for nothing."""


def option_warnings(body: bytes, field: str = "options", *, known: frozenset[str] = _OPTIONS) -> list[str]:
    """Warnings for options that are not among the `known` and so left out of account. `body` was parsed already."""
    found = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get(field)
    options: dict[str, msgspec.Raw] = {}
    if found is not None and bytes(found) != b"null":
        check_num_fields(bytes(found), known)
        options = msgspec.json.decode(found, type=dict[str, msgspec.Raw])
    warnings: list[str] = []
    for name, raw in options.items():
        if len(warnings) == MAX_WARNINGS:
            break
        value: object = None if name in known else msgspec.json.decode(raw)
        if value is not None and value not in WITHOUT_EFFECT.get(name, ()):
            is_ours = name in WITHOUT_EFFECT or name in _OPTIONS
            why = "has no effect here" if is_ours else "is unknown and was ignored"
            warnings.append(passed_over(f"{field}.{name}", f"{field}.{name[:64]} {why}"))
    return warnings


# ---------------------------------------------------------------- requests

Format = str | Schema | None


def _structure(form: Format) -> Structure | None:
    if form is None or form == "":
        return None
    if form == "json":
        return Structure(Constraint("json_object", field="format"))
    if isinstance(form, str):
        raise InvalidRequest("'format' is neither \"json\" nor a JSON schema.", field="format")
    return Structure(Constraint("json_schema", parse_schema(form, "format"), "format"))


class FormedChat(ChatRequest, kw_only=True):
    """A conversation to answer as Ollama's clients mean it: in its `format`, and with as many tokens as there is room
    for."""

    cuts_max_tokens: ClassVar[bool] = True

    form: Format = None

    @override
    def structure(self) -> Structure | None:
        return _structure(self.form)


class FormedCompletion(CompletionRequest, kw_only=True):
    """A text to continue, likewise."""

    cuts_max_tokens: ClassVar[bool] = True

    form: Format = None

    @override
    def structure(self) -> Structure | None:
        return _structure(self.form)


class RawCompletion(FormedCompletion, kw_only=True):
    """A prompt to continue as it stands: who sends it wrote the model's markers himself."""

    is_raw: ClassVar[bool] = True


class AnswerFields(msgspec.Struct, kw_only=True):
    """Fields that chat and generate share."""

    model: Name
    stream: bool | None = None
    """Without it, the answer comes in lines."""
    format: Format = None
    options: Annotated[Options, CHECKED_APART] | None = None
    keep_alive: KeepAlive = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False

    def check(self) -> None:
        """Refuse what is not done.

        Raises:
            InvalidRequest: A field asks for it.
        """
        (self.options or Options()).check("options")
        if self.top_logprobs and not self.logprobs:
            hint = 'Send "logprobs": true with it.'
            raise InvalidRequest("'top_logprobs' needs 'logprobs'.", field="top_logprobs", hint=hint)

    def warnings(self) -> list[str]:
        """What was left out of account."""
        why = "shift has no effect: what does not fit the context is an error"
        return [passed_over("shift", why)] if self.shift else []

    def sampling(self) -> dict[str, object]:
        """Model, options and what else OpenAI's structs have a field for."""
        o = self.options or Options()
        return {
            "model": ollama_name(self.model), "stream": self.is_streamed, "form": self.format,
            "max_tokens": o.max_tokens, "temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p,
            "min_p": o.min_p, "typical_p": o.typical_p, "repeat_penalty": o.repeat_penalty,
            "repeat_last_n": o.repeat_last_n, "presence_penalty": o.presence_penalty,
            "frequency_penalty": o.frequency_penalty, "seed": None if o.seed == -1 else o.seed,
            "stop": o.stops() or None, "truncation": "auto" if self.truncate else None,
        }  # fmt: skip

    def effort(self) -> ReasoningEffort | None:
        """How much the model shall think; None leaves it to the model.

        Raises:
            InvalidRequest: `think` is no degree of it.
        """
        if self.think is None or isinstance(self.think, bool):
            return None if self.think is None else "medium" if self.think else "none"
        try:
            return msgspec.convert(self.think, ReasoningEffort)
        except msgspec.ValidationError as e:
            hint = 'Send true, false, or one of "low", "medium", "high".'
            raise InvalidRequest("'think' is no degree of thinking.", field="think", hint=hint) from e

    def chat(self, messages: list[ChatMessage], tools: list[ToolField] | None = None) -> FormedChat:
        """The request as a conversation."""
        fields: dict[str, Any] = self.sampling()
        return FormedChat(
            messages=messages, logprobs=self.logprobs, top_logprobs=self.top_logprobs, tools=tools,
            reasoning_effort=self.effort(), **fields,
        )  # fmt: skip


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _message(role: Role, content: str | None, images: list[Image] | None) -> ChatMessage:
    if not images:
        return ChatMessage(role=role, content=content)
    parts: list[TextPart | ImagePart] = [ImagePart(image_url=f"data:;base64,{image}") for image in images]
    return ChatMessage(role=role, content=[*parts, TextPart(text=content or "")])


class OllamaFunction(msgspec.Struct, kw_only=True):
    """A tool and the arguments it was called with, an object."""

    name: ToolName
    arguments: dict[str, object] = msgspec.field(default_factory=dict[str, object])


class OllamaCall(msgspec.Struct, kw_only=True):
    """A call in a message."""

    function: OllamaFunction
    id: Id = ""


class OllamaMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Role
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[OllamaCall], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_name: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    tool_call_id: Id | None = None
    images: list[Image] | None = None
    """Each as base64, before the text."""

    def openai(self) -> ChatMessage:
        """In OpenAI's words."""
        message = _message(self.role, self.content, self.images)
        message.reasoning_content = self.thinking
        message.name, message.tool_call_id = self.tool_name, self.tool_call_id
        message.tool_calls = [
            ToolCallField(id=c.id, function=CalledFunction(name=c.function.name, arguments=_json(c.function.arguments)))
            for c in self.tool_calls or ()
        ]
        return message


class OllamaChatRequest(AnswerFields, kw_only=True):
    """`POST /api/chat`. Without messages it loads the model, or unloads it with a `keep_alive` of 0."""

    messages: list[OllamaMessage] | None = None
    tools: Tools | None = None

    def answer(self) -> FormedChat:
        """The request in OpenAI's words."""
        return self.chat([m.openai() for m in self.messages or ()], self.tools)


class OllamaGenerateRequest(AnswerFields, kw_only=True):
    """`POST /api/generate`. Without a prompt it loads the model, or unloads it with a `keep_alive` of 0."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    """What shall follow the answer; an empty one is none."""
    raw: bool | None = None
    template: str | None = None
    context: list[TokenCount] | None = None
    images: list[Image] | None = None

    @property
    def is_continued(self) -> bool:
        """Whether the prompt is a text to continue, and no question."""
        return bool(self.raw or self.suffix)

    @override
    def check(self) -> None:
        super().check()
        hints = {
            "template": "Give it to the model: POST /api/create.",
            "context": "Send the conversation to /api/chat; what was computed of it is found again.",
        }
        for field, hint in hints.items():
            if getattr(self, field):
                raise InvalidRequest(f"'{field}' is not supported by this version.", field=field, hint=hint)
        for field in ("system", "images"):
            if self.is_continued and getattr(self, field):
                text = f"A prompt with 'raw' or 'suffix' has no '{field}' beside it."
                raise InvalidRequest(text, field=field, hint="Leave one of them out.")

    def answer(self) -> FormedChat:
        """The request as a conversation, in OpenAI's words."""
        messages = [_message("user", self.prompt, self.images)]
        if self.system:
            messages.insert(0, ChatMessage(role="system", content=self.system))
        return self.chat(messages)

    def completion(self) -> FormedCompletion:
        """The text to continue, in OpenAI's words."""
        fields: dict[str, Any] = self.sampling()
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        kind = RawCompletion if self.raw else FormedCompletion
        return kind(prompt=self.prompt or "", suffix=self.suffix or None, logprobs=logprobs, **fields)


class OllamaEmbedRequest(msgspec.Struct, kw_only=True):
    """`POST /api/embed`."""

    model: Name
    input: str | list[str] | None = None
    truncate: bool | None = None
    """Without it, the end of a text that is too long is cut off."""
    dimensions: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] | None = None
    options: Annotated[Options, CHECKED_APART] | None = None
    keep_alive: KeepAlive = None

    def texts(self) -> list[str]:
        """The texts; none where the model shall only be loaded."""
        if not self.input:
            return []
        return [self.input] if isinstance(self.input, str) else [*self.input]


class OllamaEmbeddingsRequest(msgspec.Struct, kw_only=True):
    """`POST /api/embeddings`, the older form."""

    model: Name
    prompt: str | None = None
    options: Annotated[Options, CHECKED_APART] | None = None
    keep_alive: KeepAlive = None


class ModelNamed(msgspec.Struct, kw_only=True):
    """A request about one model; `name` is the older word."""

    model: Name | None = None
    name: Name | None = None

    @property
    def given(self) -> str:
        """The name as it was sent.

        Raises:
            InvalidRequest: There is none.
        """
        if not (found := self.model or self.name):
            raise InvalidRequest("'model' is missing.", field="model", hint="GET /api/tags lists the names.")
        return found

    @property
    def wanted(self) -> str:
        """The name as the store has it."""
        return ollama_name(self.given)


class OllamaShowRequest(ModelNamed, kw_only=True):
    """`POST /api/show`."""

    verbose: bool | None = None


class OllamaPullRequest(ModelNamed, kw_only=True):
    """`POST /api/pull` and `/api/push`."""

    stream: bool | None = None
    insecure: bool | None = None


class OllamaCopyRequest(msgspec.Struct, kw_only=True):
    """`POST /api/copy`."""

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    destination: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]


class OllamaCreateRequest(ModelNamed, kw_only=True):
    """`POST /api/create`."""

    stream: bool | None = None
    base: Name | None = msgspec.field(default=None, name="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: Text | None = None
    system: Text | None = None
    license: Annotated[str, msgspec.Meta(max_length=500)] | list[str] | None = None
    parameters: Annotated[Options, CHECKED_APART] | None = None
    messages: list[OllamaMessage] | None = None
    quantize: str | None = None

    def check(self) -> None:
        """Refuse what is not done.

        Raises:
            InvalidRequest: A field asks for it, or there is nothing to make a model of.
        """
        hints = {
            "adapters": "Pull the adapter and ask for MODEL+ADAPTER.",
            "messages": "Send them with each conversation.",
            "quantize": "Use: edge quantize.",
        }
        for field, hint in hints.items():
            if getattr(self, field):
                raise InvalidRequest(f"'{field}' is not supported by this version.", field=field, hint=hint)
        if bool(self.base) == bool(self.files):
            hint = "Send one: the name of a model that is here, or one GGUF file with its digest."
            raise InvalidRequest("Neither 'from' nor 'files' was specified, or both.", field="from", hint=hint)
        if self.files and len(self.files) != 1:
            raise InvalidRequest("'files' has to be one GGUF file.", field="files", hint="Use: edge quantize.")
        (self.parameters or Options()).check("parameters")


# ---------------------------------------------------------------- answers


class SaidFunction(msgspec.Struct, kw_only=True):
    """A tool and the arguments it is called with, an object."""

    name: str
    arguments: msgspec.Raw


class SaidCall(msgspec.Struct, kw_only=True):
    """A call by the model."""

    id: str
    function: SaidFunction


class Said(msgspec.Struct, kw_only=True):
    """A message of the model, or a part of it."""

    role: str = "assistant"
    content: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[SaidCall] | msgspec.UnsetType = msgspec.UNSET


Count = int | msgspec.UnsetType


class Timed(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What an answer took; durations in nanoseconds."""

    total_duration: Count = msgspec.UNSET
    load_duration: Count = msgspec.UNSET
    prompt_eval_count: Count = msgspec.UNSET
    prompt_eval_duration: Count = msgspec.UNSET
    eval_count: Count = msgspec.UNSET
    eval_duration: Count = msgspec.UNSET
    warnings: list[str] = []
    """What was left out of account; no field of Ollama's."""


class Line(Timed, kw_only=True, omit_defaults=True):
    """An answer, or a part of it: of a chat in `message`, of a prompt in `response`."""

    model: str
    created_at: str
    message: Said | msgspec.UnsetType = msgspec.UNSET
    response: str | msgspec.UnsetType = msgspec.UNSET
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[ContentLogprob] | msgspec.UnsetType = msgspec.UNSET
    done: bool
    done_reason: str = ""


class Embeddings(Timed, kw_only=True, omit_defaults=True):
    """Vectors of texts, in their order."""

    model: str
    embeddings: list[msgspec.Raw]


class OneEmbedding(msgspec.Struct, kw_only=True):
    """The vector of one text."""

    embedding: msgspec.Raw


class OllamaDetails(msgspec.Struct, kw_only=True):
    """What lists say of a model."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Listed(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One model of the store, or of those in memory."""

    name: str
    model: str
    modified_at: str = ""
    size: int
    digest: str
    details: OllamaDetails
    capabilities: list[str] = []
    expires_at: str = ""
    size_vram: int | msgspec.UnsetType = msgspec.UNSET
    context_length: int = 0


class ListedModels(msgspec.Struct, kw_only=True):
    """Some of them."""

    models: list[Listed]


class Shown(msgspec.Struct, kw_only=True, omit_defaults=True):
    """All about one model."""

    license: str = ""
    modelfile: str
    parameters: str = ""
    template: str
    system: str = ""
    details: OllamaDetails
    model_info: dict[str, object]
    capabilities: list[str]
    modified_at: str
    warnings: list[str] = []


class Progressed(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How far a pull or a creation is."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str] = []


class OllamaVersion(msgspec.Struct, kw_only=True):
    """The version of Ollama's API that is followed, and the appliance's own."""

    version: str
    slm_edge: str
