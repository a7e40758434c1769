"""What models are for, and what keys may do: the words that the store, the API and the terminal share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ModelKind = Literal["text", "embeddings", "reranking", "adapter"]
"""An adapter is no model: it changes one, is named with it (``model+adapter``) and never loaded by itself."""

Scope = Literal["chat", "embed", "view", "operate", "fetch", "admin"]
"""What an API key may do."""
Role = Literal["user", "viewer", "operator", "admin"]
"""Scopes in one word."""

CAPABILITIES: Mapping[ModelKind, list[str]] = {
    "text": ["completion", "tools"], "embeddings": ["embedding"], "reranking": ["rerank"], "adapter": [],
}  # fmt: skip
"""What models of a kind do, for clients that ask before they send."""
