"""The wire structs of OpenAI's endpoints."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from edge.errors import InvalidRequest
from edge.store.details import Sampling
from runtime.request import SamplingParams

T = TypeVar("T")
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
LogitBias = Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=1024)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
StopList = Annotated[list[StopString], msgspec.Meta(max_length=16)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    """A content part. Only text is read by the models of this version."""

    text: str


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    """Taken without effect: templates of this version's models have no place for it."""

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(p.text for p in self.content)
        return self.content or ""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TokenCount | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: StopString | StopList | None = None
    seed: Seed | None = None
    n: int | None = None
    user: str | None = None
    ignore_eos: bool = False
    """Go on past the model's own end, up to the token limit; for benchmarks."""
    return_token_ids: bool = False
    """Give the token ids of prompt and answer, as vLLM does."""

    def params(self, makers: Sampling) -> SamplingParams:
        """The sampling parameters: the request's, else what the model's makers advise, else OpenAI's defaults."""
        return SamplingParams(
            temperature=_first(self.temperature, makers.temperature, 1.0),
            top_k=_first(self.top_k, makers.top_k, 0),
            top_p=_first(self.top_p, makers.top_p, 1.0),
            min_p=_first(self.min_p, makers.min_p, 0.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else self.seed % (1 << 63),
            logit_bias=tuple((_token_id(k), v) for k, v in (self.logit_bias or {}).items()),
        )

    def stops(self) -> list[str]:
        """The stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(SamplingFields, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[TokenCount]


class TokenDetails(msgspec.Struct, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    role: str = "assistant"
    content: str = ""
    refusal: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: None = None
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
    logprobs: None = None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


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


class Models(msgspec.Struct, kw_only=True):
    """The models of the store."""

    object: str = "list"
    data: list[Model]


def _first(asked: T | None, advised: T | None, default: T) -> T:
    return next(v for v in (asked, advised, default) if v is not None)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal()) or len(key) > 9:
        raise InvalidRequest(f"logit_bias has the key {key!r}.", field="logit_bias", hint="Keys are token ids.")
    return int(key)
