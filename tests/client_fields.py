"""Names of the fields that OpenAI's, Anthropic's and Ollama's own clients can send, read off their types."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Union, get_args, get_origin, get_type_hints

import pydantic
import typing_extensions

_CHAT = "openai.types.chat.completion_create_params"
_TYPES: dict[str, tuple[str, ...]] = {
    "POST /v1/chat/completions": (f"{_CHAT}.CompletionCreateParamsBase", f"{_CHAT}.CompletionCreateParamsStreaming"),
    "POST /v1/completions": (
        "openai.types.completion_create_params.CompletionCreateParamsBase",
        "openai.types.completion_create_params.CompletionCreateParamsStreaming",
    ),
    "POST /v1/responses": ("openai.types.responses.response_create_params.ResponseCreateParamsBase",),
    "POST /v1/embeddings": ("openai.types.embedding_create_params.EmbeddingCreateParams",),
    "POST /v1/moderations": ("openai.types.moderation_create_params.ModerationCreateParams",),
    "POST /v1/batches": ("openai.types.batch_create_params.BatchCreateParams",),
    "POST /v1/messages": (
        "anthropic.types.message_create_params.MessageCreateParamsBase",
        "anthropic.types.message_create_params.MessageCreateParamsStreaming",
    ),
    "POST /v1/messages/count_tokens": ("anthropic.types.message_count_tokens_params.MessageCountTokensParams",),
    "POST /api/chat": ("ollama._types.ChatRequest",),
    "POST /api/generate": ("ollama._types.GenerateRequest",),
    "POST /api/embed": ("ollama._types.EmbedRequest",),
    "POST /api/embeddings": ("ollama._types.EmbeddingsRequest",),
    "POST /api/show": ("ollama._types.ShowRequest",),
    "POST /api/create": ("ollama._types.CreateRequest",),
    "POST /api/copy": ("ollama._types.CopyRequest",),
}
OPENED = frozenset({"messages", "stream_options", "options", "parameters", "response_format"})
"""Fields whose own fields are named, too."""


def client_of(operation: str) -> str:
    """Whose client has it: ``OpenAI``; empty for what is no client's."""
    names = {"openai": "OpenAI", "anthropic": "Anthropic", "ollama": "Ollama"}
    return names[_TYPES[operation][0].partition(".")[0]] if operation in _TYPES else ""


def client_fields(operation: str) -> set[str]:
    """Paths of the fields that the client sends with an operation: ``top_p``, ``messages[].role``."""
    found: set[str] = set()
    for name in _TYPES.get(operation, ()):
        module, _, kind = name.rpartition(".")
        found.update(_fields(getattr(import_module(module), kind)))
    return found


def _fields(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(kind).items():
        yield f"{prefix}{name}"
        if name in OPENED and not prefix:
            for inner in _records(hint):
                yield from _fields(inner, f"{name}{'[]' if _is_list(hint) else ''}.")


def _hints(kind: Any) -> dict[str, Any]:
    if issubclass(kind, pydantic.BaseModel):
        return {f.serialization_alias or f.alias or name: f.annotation for name, f in kind.model_fields.items()}
    return get_type_hints(kind)


def _records(hint: Any) -> Iterator[Any]:
    """The classes with fields that stand in a type."""
    if typing_extensions.is_typeddict(hint) or (isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)):
        yield hint
    for part in get_args(hint):
        yield from _records(part)


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    parts = [p for p in get_args(hint) if p is not type(None)]
    if origin is Union:
        return any(map(_is_list, parts))
    return isinstance(origin, type) and "Mapping" not in origin.__name__ and origin is not dict and origin is not Union
