"""The wire structs of `/v1/responses`, as OpenAI's client has them (openai 3.51, `types/responses`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge.errors import InvalidRequest
from runtime.api.openai_schema import (
    CacheKey,
    ContentLogprob,
    LoraField,
    Penalty,
    PositiveInt,
    Priority,
    Probability,
    Seed,
    StopList,
    StopString,
    Temperature,
    TokenCount,
    TopLogprobs,
)
from runtime.api.structured import Schema
from runtime.api.tools import MAX_TOOLS, Arguments, ReasoningEffort
from runtime.api.tools import Id as CallId
from runtime.api.tools import ToolName as FunctionName

ShortText = Annotated[str, msgspec.Meta(max_length=512)]
ResponseId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Metadata = Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], ShortText], msgspec.Meta(max_length=16)]
Includes = Annotated[list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=16)]
Status = Literal["in_progress", "completed", "incomplete"]
Role = Literal["system", "developer", "user", "assistant"]
LOGPROBS = "message.output_text.logprobs"


# ---------------------------------------------------------------- items, of requests and of answers


class InputText(msgspec.Struct, tag="input_text", tag_field="type"):
    """A text that was sent."""

    text: str


class InputImage(msgspec.Struct, tag="input_image", tag_field="type", kw_only=True):
    """An image that was sent, in a data URL."""

    image_url: str | None = None
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Taken without effect: the model's own settings decide how closely it looks."""
    file_id: str | None = None


class InputFile(msgspec.Struct, tag="input_file", tag_field="type"):
    """A file; refused."""


class OutputText(msgspec.Struct, tag="output_text", tag_field="type"):
    """A text of an answer."""

    text: str
    annotations: list[dict[str, object]] = []
    logprobs: list[ContentLogprob] = []


class Refusal(msgspec.Struct, tag="refusal", tag_field="type"):
    """What another model said instead of an answer."""

    refusal: str


class ReasoningText(msgspec.Struct, tag="reasoning_text", tag_field="type"):
    """What a model thought."""

    text: str


class SummaryText(msgspec.Struct, tag="summary_text", tag_field="type"):
    """A summary of what another model thought."""

    text: str


Part = InputText | InputImage | InputFile | OutputText | Refusal | ReasoningText


class Item(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One item of a request or of an answer: a message, what a model thought, a function call or what it gave. Which
    fields it has depends on its type."""

    type: ShortText | None = None
    """`message` where it is missing."""
    id: ShortText | None = None
    """Of an `item_reference`: the item that is meant. Items that are kept get ids of their own."""
    status: Status | None = None
    role: Role | None = None
    content: str | list[Part] | None = None
    summary: list[SummaryText] | None = None
    encrypted_content: str | None = None
    call_id: CallId | None = None
    name: FunctionName | None = None
    arguments: Arguments | None = None
    output: str | list[Part] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    """Taken without effect."""


# ---------------------------------------------------------------- requests


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form that an answer shall have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | msgspec.UnsetType = msgspec.UNSET
    description: str | msgspec.UnsetType = msgspec.UNSET
    schema: Schema | msgspec.UnsetType = msgspec.UNSET
    strict: bool | msgspec.UnsetType | None = msgspec.UNSET


class TextField(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the answer's text shall be."""

    format: TextFormat = msgspec.field(default_factory=TextFormat)
    verbosity: Literal["low", "medium", "high"] | None = None
    """Warned: models here take no such advice."""


class ReasoningField(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How much a model shall think."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Warned: no summaries are made; what the model thought stands in its item."""
    generate_summary: Literal["auto", "concise", "detailed"] | msgspec.UnsetType | None = msgspec.UNSET
    """The older name."""


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function that the model may ask for. Tools of other types are refused."""

    type: ShortText
    name: FunctionName | None = None
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedTool(msgspec.Struct, kw_only=True):
    """One of the tools."""

    type: ShortText
    name: ShortText | None = None


class ToolChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One function that has to be called, or those of the tools that may be."""

    type: ShortText
    name: ShortText | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries besides the answer."""

    include_obfuscation: bool | None = None
    """Warned where it is true: events are as long as what they say."""


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/responses`. From `top_k` on the fields are ours, as those of chat completions."""

    model: str
    input: str | Annotated[list[Item], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    store: bool | None = None
    """Unless it is false, the response is kept."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: PositiveInt | None = None
    max_tool_calls: PositiveInt | None = None
    """Taken without effect: it counts calls of tools that are not here."""
    temperature: Temperature | None = None
    top_p: Probability | None = None
    text: TextField | None = None
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningField | None = None
    include: Includes | None = None
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["disabled", "auto"] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: CacheKey | None = None
    safety_identifier: ShortText | None = None
    service_tier: ShortText | None = None
    user: ShortText | None = None
    prompt: object = None
    """A template that OpenAI keeps; refused."""
    top_k: TokenCount | None = None
    min_p: Probability | None = None
    seed: Seed | None = None
    stop: StopString | StopList | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    priority: Priority | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    lora: Annotated[list[LoraField], msgspec.Meta(max_length=16)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens are reported with their probabilities."""
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Look at what fields say that their types leave open.

        Raises:
            InvalidRequest: They ask for what is not done.
        """
        if self.prompt is not None:
            hint = "Send instructions and input."
            raise InvalidRequest("'prompt' is not supported by this version.", field="prompt", hint=hint)
        for i, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                raise InvalidRequest(
                    f"The tool '{tool.type}' is not here: tools are functions that the client carries out.",
                    field=f"tools[{i}].type",
                    hint="Send tools of type 'function'.",
                )
            if not tool.name:
                raise InvalidRequest(f"'tools[{i}].name' is missing.", field=f"tools[{i}].name")
        if self.truncation == "auto":
            hint = "Leave it out."
            raise InvalidRequest("'truncation' is not supported by this version.", field="truncation", hint=hint)

    def warnings(self) -> list[str]:
        """What is left out of account."""
        text, reasoning = self.text or TextField(), self.reasoning or ReasoningField()
        found = {
            "text.verbosity has no effect": text.verbosity is not None,
            "reasoning.summary has no effect: what the model thought stands in its item": bool(
                reasoning.summary or reasoning.generate_summary
            ),
            f"top_logprobs has no effect without '{LOGPROBS}' in include": bool(
                self.top_logprobs and not self.wants_logprobs
            ),
            "stream_options.include_obfuscation has no effect": bool(
                self.stream_options and self.stream_options.include_obfuscation
            ),
        }
        others = [f"include '{name}' has no effect" for name in self.include or () if name not in _INCLUDED]
        return [what for what, is_so in found.items() if is_so] + others


_INCLUDED = frozenset({LOGPROBS, "message.input_image.image_url"})


# ---------------------------------------------------------------- answers


class InputDetails(msgspec.Struct, kw_only=True):
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """What is written to the cache is not counted."""


class OutputDetails(msgspec.Struct, kw_only=True):
    """What the output's tokens were for."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFault(msgspec.Struct, kw_only=True):
    """Why a response failed. `code` is one of OpenAI's, `type` ours."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    type: str
    param: str | None = None


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why a response ends before its end."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response. Kept ones are read by later versions, so what is added has to have a default."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningField
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float | None
    text: TextField
    tool_choice: str | ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class DeletedResponse(msgspec.Struct, kw_only=True):
    """A response that was forgotten."""

    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    """A page of items."""

    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Event(msgspec.Struct, kw_only=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | msgspec.UnsetType = msgspec.UNSET
    output_index: int | msgspec.UnsetType = msgspec.UNSET
    item_id: str | msgspec.UnsetType = msgspec.UNSET
    content_index: int | msgspec.UnsetType = msgspec.UNSET
    item: Item | msgspec.UnsetType = msgspec.UNSET
    part: Part | msgspec.UnsetType = msgspec.UNSET
    delta: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[ContentLogprob] | msgspec.UnsetType = msgspec.UNSET
