"""Values of JSON as they are parsed, told apart for the type checker."""

from __future__ import annotations

from typing import TypeGuard


def is_list(value: object) -> TypeGuard[list[object]]:
    """Whether a value is a list."""
    return isinstance(value, list)


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Whether a value is an object, whose names are texts."""
    return isinstance(value, dict)
