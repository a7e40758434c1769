"""The wire structs of OpenAI's endpoints."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from typing_extensions import override

from edge.errors import InvalidRequest
from edge.store.details import Sampling
from runtime import wire
from runtime.api.structured import MAX_TEXT_CHARS, ResponseFormat, Structure, StructuredOutputs, structure_of
from runtime.api.tools import (
    ChosenTool,
    ReasoningEffort,
    ToolCallField,
    ToolCalls,
    ToolChoice,
    Tools,
    template_options,
    wire_choice,
    wire_tools,
)
from runtime.request import SamplingParams

T = TypeVar("T")
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, msgspec.Meta(ge=0.01, le=100)]
LastN = Annotated[int, msgspec.Meta(ge=-1, le=(1 << 31) - 1)]
DryMultiplier = Annotated[float, msgspec.Meta(ge=0, le=100)]
DryBase = Annotated[float, msgspec.Meta(ge=1, le=100)]
DryBreakers = Annotated[
    list[Annotated[str, msgspec.Meta(min_length=1, max_length=40)]], msgspec.Meta(min_length=1, max_length=16)
]
Priority = Annotated[int, msgspec.Meta(ge=0, le=3)]
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
LogitBias = Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=1024)]
MAX_ANSWERS = 128
"""To one request, of all its prompts."""
MAX_ECHOED = 500_000
"""Figures of tokens of echoed prompts: some 60 MB in each process that holds them."""
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
StopList = Annotated[list[StopString], msgspec.Meta(max_length=16)]
CacheKey = Annotated[str, msgspec.Meta(max_length=256)]
TopLogprobs = Annotated[int, msgspec.Meta(ge=0, le=20)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    """A content part that is text."""

    text: str


class ImageUrl(msgspec.Struct, kw_only=True):
    """Where an image is: in the URL itself."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Taken without effect: the model's own settings decide how closely it looks."""


class ImagePart(msgspec.Struct, tag="image_url", tag_field="type"):
    """A content part that is an image, for models that see."""

    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    """Of a tool's result: the tool. Else without effect."""
    tool_calls: ToolCalls | None = None
    tool_call_id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    reasoning_content: str | None = None
    """What an answer's author thought before it."""
    reasoning: str | None = None
    """Another name of it."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class LoraField(msgspec.Struct, kw_only=True):
    """An adapter of the store, and by how much of it the model is changed."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    scale: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 1.0


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share."""

    cuts_max_tokens: ClassVar[bool] = False
    """See :class:`runtime.wire.Generate`; no field of a request."""
    is_raw: ClassVar[bool] = False

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    priority: Priority | None = None
    """vLLM's: a lower value is served first. 0, the default, is for who waits at a screen."""
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TokenCount | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    """llama-server's, over the last `repeat_last_n` tokens, by default 64."""
    repetition_penalty: RepeatPenalty | None = None
    """vLLM's, over all tokens."""
    repeat_last_n: LastN | None = None
    dry_multiplier: DryMultiplier | None = None
    dry_base: DryBase | None = None
    dry_allowed_length: TokenCount | None = None
    dry_penalty_last_n: LastN | None = None
    dry_sequence_breakers: DryBreakers | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: StopString | StopList | None = None
    seed: Seed | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=8)] | None = None
    """How many answers: drawn with `seed`, `seed` + 1 and so on, the prompt read once."""
    user: str | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    """End with an error where the answer is not complete after this time; the appliance's own limit holds as well."""
    prompt_cache_key: CacheKey | None = None
    """A hint, as with OpenAI: of equally long cached prefixes, that of a request with the same key is gone on from."""
    ignore_eos: bool = False
    """Go on past the model's own end, up to the token limit; for benchmarks."""
    lora: Annotated[list[LoraField], msgspec.Meta(max_length=16)] | None = None
    """Adapters to answer with, beside those in the model's name (`model+adapter`)."""
    return_token_ids: bool = False
    """Give the token ids of prompt and answer, as vLLM does."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` leaves out the oldest of what does not fit the context."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's."""
    grammar: Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)] | None = None
    """llama-server's: GBNF, or Lark."""

    @property
    def num_draws(self) -> int:
        """How many answers are drawn to one prompt."""
        return self.n or 1

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported beside each; None reports nothing.

        Raises:
            InvalidRequest: Two fields contradict each other.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Look at what fields say together.

        Raises:
            InvalidRequest: They contradict each other.
        """
        if self.stream and self.return_token_ids:
            raise InvalidRequest("'return_token_ids' is not supported in streams.", field="return_token_ids")
        self._repetition(SamplingParams())
        self.num_logprobs()

    def params(self, makers: Sampling) -> SamplingParams:
        """The sampling parameters: the request's, else what the model's package advises, else those that cut nothing.

        Raises:
            InvalidRequest: Two fields contradict each other, or a token id of `logit_bias` is none.
        """
        plain = _advised(makers)
        repeat_penalty, repeat_last_n = self._repetition(plain)
        return SamplingParams(
            logit_bias=tuple((_token_id(k), v) for k, v in (self.logit_bias or {}).items()),
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            presence_penalty=_first(self.presence_penalty, plain.presence_penalty),
            frequency_penalty=_first(self.frequency_penalty, plain.frequency_penalty),
            dry_multiplier=self.dry_multiplier or 0.0,
            dry_base=_first(self.dry_base, plain.dry_base),
            dry_allowed_length=_first(self.dry_allowed_length, plain.dry_allowed_length),
            dry_penalty_last_n=_first(self.dry_penalty_last_n, plain.dry_penalty_last_n),
            dry_sequence_breakers=tuple(self.dry_sequence_breakers or plain.dry_sequence_breakers),
            top_k=_first(self.top_k, plain.top_k),
            typical_p=_first(self.typical_p, plain.typical_p),
            top_p=_first(self.top_p, plain.top_p),
            min_p=_first(self.min_p, plain.min_p),
            xtc_probability=self.xtc_probability or 0.0,
            xtc_threshold=_first(self.xtc_threshold, plain.xtc_threshold),
            temperature=_first(self.temperature, plain.temperature),
            seed=plain.seed if self.seed is None else self.seed % (1 << 63),
            logprobs=self.num_logprobs(),
        )

    def _repetition(self, plain: SamplingParams) -> tuple[float, int]:
        """The repetition penalty and its window, of whichever server's name was used."""
        if self.repeat_penalty is None:
            window = plain.repeat_last_n if self.repetition_penalty is None else -1
            return _first(self.repetition_penalty, plain.repeat_penalty), _first(self.repeat_last_n, window)
        if self.repetition_penalty not in (None, self.repeat_penalty):
            hint = "They are two servers' names of one penalty: send one of them."
            raise InvalidRequest(
                "'repeat_penalty' and 'repetition_penalty' differ.", field="repetition_penalty", hint=hint
            )
        return self.repeat_penalty, _first(self.repeat_last_n, plain.repeat_last_n)

    def structure(self) -> Structure | None:
        """The form that the answer shall have.

        Raises:
            InvalidRequest: It is not done, or there are two.
        """
        return structure_of(self.response_format, self.structured_outputs, self.grammar)

    def stops(self) -> list[str]:
        """The stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ToolFields(NamedTuple):
    """Tools as the engine takes them; see :class:`runtime.wire.Generate`."""

    tools: tuple[wire.Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True
    template_options: str = ""


class ChatRequest(SamplingFields, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, object] | None = None
    """llama-server's and vLLM's: further variables of the model's chat template."""

    def asks(self) -> ToolFields:
        """What is asked for beside the messages.

        Raises:
            InvalidRequest: A tool's schema is not one that is held, or one is to be called that is not there.
        """
        tools = wire_tools(self.tools or ())
        # Who names a tool wants one call of it, as OpenAI's clients take for granted; others say so where they do.
        is_one = isinstance(self.tool_choice, ChosenTool) and not self.parallel_tool_calls
        many = not is_one and self.parallel_tool_calls is not False
        return ToolFields(
            tools, wire_choice(self.tool_choice, tools), many,
            template_options(self.chat_template_kwargs, self.reasoning_effort),
        )  # fmt: skip

    @override
    def num_logprobs(self) -> int | None:
        """See :meth:`SamplingFields.num_logprobs`."""
        if self.top_logprobs and not self.logprobs:
            hint = 'Send "logprobs": true with it.'
            raise InvalidRequest("'top_logprobs' needs 'logprobs'.", field="top_logprobs", hint=hint)
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(SamplingFields, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | TokenCount | list[TokenCount]]
    """A text, a list of token ids, or a list of either."""
    suffix: str | None = None
    """What shall follow the answer, for models that fill in middles."""
    echo: bool | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=8)] | None = None
    """Draw so many answers to each prompt, and give the `n` likeliest."""

    @property
    @override
    def num_draws(self) -> int:
        """See :attr:`SamplingFields.num_draws`."""
        return max(self.best_of or 1, self.n or 1)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more.

        Raises:
            InvalidRequest: Texts and tokens are mixed.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if len(tokens) == len(self.prompt):
            return [tokens]
        if len({type(item) for item in self.prompt}) != 1:
            hint = "It is a text, a list of texts, a list of token ids, or a list of such lists."
            raise InvalidRequest("'prompt' mixes texts with tokens.", field="prompt", hint=hint)
        return [item for item in self.prompt if not isinstance(item, int)]

    @override
    def num_logprobs(self) -> int | None:
        """See :meth:`SamplingFields.num_logprobs`. The likeliest answers are known by theirs."""
        return 0 if self.logprobs is None and self.num_draws > (self.n or 1) else self.logprobs

    @override
    def check(self) -> None:
        """See :meth:`SamplingFields.check`."""
        super().check()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise InvalidRequest(
                "'best_of' is less than 'n'.", field="best_of", hint="It is how many 'n' are chosen of."
            )
        if self.stream and self.num_draws > (self.n or 1):
            raise InvalidRequest("Which answers are the best is not known in a stream.", field="best_of")
        if self.echo and self.suffix is not None:
            raise InvalidRequest("'echo' and 'suffix' do not go together.", field="echo", hint="Send one of them.")
        if self.max_tokens == 0 and not self.echo:
            hint = "0 is for who asks for the prompt alone, by 'echo'."
            raise InvalidRequest("'max_tokens' has to be at least 1.", field="max_tokens", hint=hint)
        self._check_size()

    def _check_size(self) -> None:
        prompts = self.prompts()
        if len(prompts) * self.num_draws > MAX_ANSWERS:
            hint = "Send several requests."
            raise InvalidRequest(f"These are more than {MAX_ANSWERS} answers at once.", field="prompt", hint=hint)
        num_tokens = sum(len(p.encode()) if isinstance(p, str) else len(p) for p in prompts) * self.num_draws
        if self.echo and self.logprobs is not None and num_tokens * (self.logprobs + 1) > MAX_ECHOED:
            hint = "Ask for fewer logprobs, or send several requests."
            raise InvalidRequest("The prompts are too long to report on each token.", field="echo", hint=hint)


class TokenDetails(msgspec.Struct, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    dropped_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """What `truncation` left out of it; about, where that is more than anybody would count."""


class OutputDetails(msgspec.Struct, kw_only=True):
    """What the answer's tokens were, and what became of guesses at them. Those that proved wrong are no part of it."""

    reasoning_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Only of models that think."""
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    completion_tokens_details: OutputDetails | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str | None = ""
    refusal: str | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallField] | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token and the natural logarithm of its probability, by the model's own scores."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob, kw_only=True):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """The tokens of an answer."""

    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, kw_only=True):
    """The tokens of a continuation, in the older endpoint's shape."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """A whole chat completion."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    """Where there are several prompts; of one, they stand beside the choices."""


class Completion(msgspec.Struct, kw_only=True):
    """A whole text completion."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    """One model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    capabilities: Sequence[str] = ()
    """What it does: ``completion``, with ``vision`` where it reads images; ``embedding``; ``rerank``."""
    parent: str | msgspec.UnsetType = msgspec.UNSET
    """Of a model with an adapter: the model; of a slot: the one that serves there."""
    type: str = "model"
    """This and what follows is for Anthropic's clients."""
    display_name: str = ""
    created_at: str = ""

    def __post_init__(self) -> None:
        created = datetime.datetime.fromtimestamp(self.created, datetime.UTC)
        self.display_name, self.created_at = self.id, created.isoformat().replace("+00:00", "Z")


class Models(msgspec.Struct, kw_only=True):
    """The models of the store."""

    object: str = "list"
    data: list[Model]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


def _advised(makers: Sampling) -> SamplingParams:
    told = {
        k: v for k, v in msgspec.structs.asdict(makers).items() if v is not None and k not in ("max_tokens", "stop")
    }
    return SamplingParams(**told)


def _first(*values: T | None) -> T:
    """The first that was given; the last one always is."""
    return next(v for v in values if v is not None)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal()) or len(key) > 9:
        raise InvalidRequest(f"logit_bias has the key {key!r}.", field="logit_bias", hint="Keys are token ids.")
    return int(key)
