"""Equality of numbers up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def approx(expected: float | Sequence[float]) -> object:
    """Equal to `expected` up to a millionth."""
    return pytest.approx(expected)  # pyright: ignore[reportUnknownMemberType]  # pytest leaves its parameters untyped
