"""The wire structs of Anthropic's Messages API, and how they are said in OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from typing_extensions import override

from edge.errors import InvalidRequest
from runtime import wire
from runtime.api.json_schema import parse_schema
from runtime.api.openai_schema import (
    ChatMessage,
    ChatRequest,
    ImagePart,
    PositiveInt,
    Probability,
    StopList,
    TextPart,
    TokenCount,
    ToolFields,
)
from runtime.api.structured import Schema, Structure
from runtime.api.tools import (
    MAX_TOOLS,
    CalledFunction,
    ChosenFunction,
    ChosenTool,
    FunctionField,
    Id,
    ReasoningEffort,
    ToolCallField,
    ToolField,
    ToolName,
    unused_options,
)
from runtime.request import Constraint

FORM = "output_config.format.schema"
_HINTS = {
    ".role": "Roles: user and assistant; a system prompt stands in 'system'.",
    ".type": "Blocks are text, image and tool_result of the user; text, thinking and tool_use of the assistant.",
    "messages": "It is a list of objects with role and content, at least one.",
    "max_tokens": "It says how many tokens the answer may have, at most.",
    "model": "GET /v1/models lists the names.",
}


# ---------------------------------------------------------------- what is asked


class TextBlock(msgspec.Struct, tag="text", tag_field="type"):
    """A text."""

    text: str
    citations: object = None
    """Taken without effect."""
    cache_control: object = None
    """Taken without effect: every prefix is cached as long as there is room."""


class Base64Source(msgspec.Struct, tag="base64", tag_field="type"):
    """A file in the request itself."""

    media_type: Annotated[str, msgspec.Meta(max_length=100)]
    data: str


class UrlSource(msgspec.Struct, tag="url", tag_field="type"):
    """A file elsewhere, which is not fetched."""

    url: str


class ImageBlock(msgspec.Struct, tag="image", tag_field="type"):
    """An image, for models that see."""

    source: Base64Source | UrlSource
    cache_control: object = None

    def part(self) -> ImagePart:
        """The same as OpenAI has it."""
        source = self.source
        url = source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
        return ImagePart(url)


class ThinkingBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    """What the model thought. The signature is taken without effect."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call of a tool."""

    id: Id
    name: ToolName
    input: dict[str, object]
    cache_control: object = None

    def call(self) -> ToolCallField:
        """The same as OpenAI has it."""
        arguments = msgspec.json.encode(self.input).decode()
        return ToolCallField(id=self.id, function=CalledFunction(name=self.name, arguments=arguments))


class ToolResultBlock(msgspec.Struct, tag="tool_result", tag_field="type"):
    """What a tool gave. Whether it is an error is for the content to say."""

    tool_use_id: Id
    content: str | list[TextBlock | ImageBlock] = ""
    is_error: bool | None = None
    cache_control: object = None

    def message(self) -> ChatMessage:
        """The same as OpenAI has it."""
        content = self.content if isinstance(self.content, str) else [_part(block) for block in self.content]
        return ChatMessage(role="tool", tool_call_id=self.tool_use_id, content=content)


class UserMessage(msgspec.Struct, tag="user", tag_field="role"):
    """A message of the user."""

    content: str | list[TextBlock | ImageBlock | ToolResultBlock]

    def messages(self) -> list[ChatMessage]:
        """The same as OpenAI has it: the result of a tool is a message of its own."""
        if isinstance(self.content, str):
            return [ChatMessage(role="user", content=self.content)]
        results = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        said = [_part(block) for block in self.content if not isinstance(block, ToolResultBlock)]
        return [*results, *([ChatMessage(role="user", content=said)] if said or not results else [])]


class AssistantMessage(msgspec.Struct, tag="assistant", tag_field="role"):
    """A message of the model."""

    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock]

    def messages(self) -> list[ChatMessage]:
        """The same as OpenAI has it."""
        if isinstance(self.content, str):
            return [ChatMessage(role="assistant", content=self.content)]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        thought = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
        return [
            ChatMessage(role="assistant", content=text, reasoning_content=thought or None, tool_calls=calls or None)
        ]


def _part(block: TextBlock | ImageBlock) -> TextPart | ImagePart:
    return TextPart(block.text) if isinstance(block, TextBlock) else block.part()


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form that the answer shall have."""

    type: Literal["json_schema"]
    schema: Schema


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the answer shall be."""

    format: OutputFormat | None = None
    effort: ReasoningEffort | None = None
    """Of thinking."""


class AnthropicTool(msgspec.Struct, kw_only=True):
    """What the model may call, and the client runs."""

    name: ToolName
    type: Annotated[str, msgspec.Meta(max_length=100)] | None = None
    description: str | None = None
    input_schema: Schema | None = None
    strict: bool | None = None
    """The input always obeys the schema."""
    cache_control: object = None

    def field(self, path: str) -> ToolField:
        """The same as OpenAI has it.

        Raises:
            InvalidRequest: It is one that the server or the model itself has to know.
        """
        if self.type not in (None, "custom"):
            raise InvalidRequest(
                f"'{path}.type': '{self.type}' is a tool of Anthropic's own, which is not here.",
                field=f"{path}.type", hint="Give tools with name and input_schema, which your program runs.",
            )  # fmt: skip
        if self.input_schema is None:
            raise InvalidRequest(f"'{path}.input_schema' is missing.", field=f"{path}.input_schema")
        function = FunctionField(name=self.name, description=self.description, parameters=self.input_schema)
        return ToolField(function=function)


class AnthropicToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether tools are to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> Literal["none", "auto", "required"] | ChosenTool:
        """The same as OpenAI has it.

        Raises:
            InvalidRequest: It does not say which.
        """
        match self.type:
            case "tool":
                if self.name is None:
                    raise InvalidRequest("'tool_choice.name' is missing.", field="tool_choice.name")
                return ChosenTool(type="function", function=ChosenFunction(name=self.name))
            case "any":
                return "required"
            case _:
                return self.type


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model shall think before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None


_NAMES = {".function.parameters": ".input_schema", ".function.name": ".name"}
"""Of OpenAI's fields, as Anthropic calls them."""


def _renamed(text: str) -> str:
    for name, ours in _NAMES.items():
        text = text.replace(name, ours)
    return text


class AnthropicChat(ChatRequest, kw_only=True):
    """A conversation to answer as Anthropic's clients mean it: with `max_tokens`, or as many as there is room for."""

    cuts_max_tokens: ClassVar[bool] = True

    form: Schema | None = None

    @override
    def structure(self) -> Structure | None:
        """See :meth:`SamplingFields.structure`."""
        return None if self.form is None else Structure(Constraint("json_schema", parse_schema(self.form, FORM), FORM))

    @override
    def asks(self) -> ToolFields:
        """See :meth:`ChatRequest.asks`."""
        try:
            return super().asks()
        except InvalidRequest as e:
            raise InvalidRequest(_renamed(e.message), field=_renamed(e.field or ""), hint=e.hint) from e


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`: what makes the prompt."""

    hints: ClassVar[Mapping[str, str]] = _HINTS

    model: str
    messages: Annotated[list[UserMessage | AssistantMessage], msgspec.Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    output_config: OutputConfig | None = None
    tools: Annotated[list[AnthropicTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None

    def chat(self) -> AnthropicChat:
        """The same as OpenAI has it.

        Raises:
            InvalidRequest: It asks for what is not done.
        """
        if isinstance(self.messages[-1], AssistantMessage):
            raise InvalidRequest(
                "The last message is the assistant's, and going on from its words is not supported.",
                field="messages", hint="End with a message of the user.",
            )  # fmt: skip
        form = self.output_config.format if self.output_config is not None else None
        choice = self.tool_choice
        return AnthropicChat(
            model=self.model, messages=self._conversation(), form=form.schema if form is not None else None,
            tools=[tool.field(f"tools[{i}]") for i, tool in enumerate(self.tools or ())],
            tool_choice=choice.choice() if choice is not None else None,
            parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
            reasoning_effort=self.effort,
        )  # fmt: skip

    @property
    def effort(self) -> ReasoningEffort | None:
        """How much the model shall think; None leaves it to the model."""
        wanted = self.output_config.effort if self.output_config is not None else None
        match self.thinking.type if self.thinking is not None else "adaptive":
            case "disabled":
                return "none"
            case "enabled":
                return wanted or "medium"
            case _:
                return wanted

    def warnings(self, ready: wire.Ready | None) -> list[str]:
        """What this model leaves out of account."""
        found: list[str] = []
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            found.append("thinking.budget_tokens has no effect: max_tokens bounds thinking and answer together")
        if ready is not None and self.effort not in (None, "none") and not ready.thinks:
            found.append("thinking has no effect: this model does not think")
        elif ready is not None and ready.thinks and unused_options(None, self.effort, ready):
            found.append("thinking has no effect: this model decides by itself")
        return found

    def _conversation(self) -> list[ChatMessage]:
        system = self.system if isinstance(self.system, str) else "\n".join(b.text for b in self.system or ())
        first = [ChatMessage(role="system", content=system)] if system else []
        return [*first, *(said for message in self.messages for said in message.messages())]


class MessagesRequest(CountTokensRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: PositiveInt
    stop_sequences: StopList | None = None
    stream: bool | None = None
    temperature: Probability | None = None
    """0 to 1, unlike OpenAI's."""
    top_p: Probability | None = None
    top_k: TokenCount | None = None

    @override
    def chat(self) -> AnthropicChat:
        """See :meth:`CountTokensRequest.chat`."""
        return msgspec.structs.replace(
            super().chat(), max_tokens=self.max_tokens, stop=self.stop_sequences, stream=self.stream,
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
        )  # fmt: skip


# ---------------------------------------------------------------- what is answered


class AnsweredText(msgspec.Struct, tag="text", tag_field="type"):
    """A text of the answer."""

    text: str
    citations: None = None


class AnsweredThinking(msgspec.Struct, tag="thinking", tag_field="type"):
    """What the model thought before it answered. Nobody signs it here."""

    thinking: str
    signature: str = ""


class AnsweredToolUse(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, object]


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse


class AnthropicUsage(msgspec.Struct, kw_only=True):
    """Tokens: those of the prompt are `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(msgspec.Struct, kw_only=True):
    """An answer."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[AnsweredBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class CountedTokens(msgspec.Struct, kw_only=True):
    """How long a prompt is."""

    input_tokens: int
